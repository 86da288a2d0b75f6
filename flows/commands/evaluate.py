"""`superres evaluate`: models on clips, as a table of quality, speed and cost."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flows.commands.common import Commands, print_json, refused
from tasks.errors import SuperResolutionError
from tasks.store.address import parse, uri_of

if TYPE_CHECKING:
    from flows.parameters import EvaluateOptions

#: Columns of the table that people read: the name of each, and the digits behind its point.
_SHOWN: Final = {
    "psnr": ("PSNR dB", 2),
    "psnr_worst": ("worst", 2),
    "ssim": ("SSIM", 4),
    "vmaf": ("VMAF", 1),
    "flicker": ("flicker", 2),
    "fidelity": ("fidelity dB", 2),
    "sharpness": ("sharpness", 2),
    "flicker_ratio": ("flicker ratio", 2),
    "frames_per_second": ("frames/s", 2),
    "gpu_seconds_per_minute": ("GPU s/min", 1),
    "cost_per_minute": ("cost/min", 4),
}

#: Columns that a table is printed in where there is no terminal to ask.
_PLAIN_WIDTH: Final = 140


def add_to(commands: Commands) -> None:
    """Add the command to those of the program."""
    evaluate = commands.add_parser(
        "evaluate",
        help="compare models on clips: quality, speed, cost",
        description="Enlarge some seconds of each clip by each model, and say how good and how fast that was.",
    )
    evaluate.add_argument("clips", nargs="+", metavar="CLIP", help="path or s3:// URI of a video")
    evaluate.add_argument("--models", required=True, metavar="A,B", help="model cards or weight files, with commas")
    evaluate.add_argument(
        "--mode",
        default="restore",
        choices=("restore", "no-reference"),
        help="restore (default): shrink the clips and compare what comes back; no-reference: enlarge them as they are",
    )
    evaluate.add_argument("--scale", type=int, default=2, metavar="2..4", help="how many times larger (default 2)")
    evaluate.add_argument("--seconds", type=float, default=2.0, metavar="S", help="of each clip (default 2)")
    evaluate.add_argument(
        "--crf", type=int, default=23, metavar="0..51", help="of H.264 for shrunk clips (default 23; 0 for no coding)"
    )
    evaluate.add_argument("--precision", default="auto", metavar="P", help="auto (default), fp32, fp16 or bf16")
    evaluate.add_argument("--folder", default="", metavar="DIR", help="for table and plots (default: a new one)")
    evaluate.add_argument("--pools", default="local", metavar="NAME", help="where to work (default local)")
    evaluate.add_argument("--scratch", default="", metavar="DIR", help="folder for frames while it runs")
    evaluate.add_argument(
        "--store", default=os.environ.get("SUPERRES_STORE", ""), metavar="BLOCK", help="how to reach S3"
    )
    evaluate.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    evaluate.add_argument("--verbose", action="store_true", help="show the log of the flow")
    evaluate.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    from flows.parameters import EvaluateOptions
    from tasks.errors import EvaluationError

    names = ("mode", "scale", "seconds", "crf", "precision", "folder", "pools", "scratch", "store")
    with refused("superres evaluate"):
        options = EvaluateOptions(**{name: getattr(arguments, name) for name in names})
    models = [name for name in arguments.models.split(",") if name]
    clips = [uri_of(clip) for clip in arguments.clips]
    _refuse_early(clips, models, options)
    if not arguments.verbose:
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    from flows.working_place import working_place

    failure = None
    with working_place(arguments.pools):
        from flows.evaluate import evaluate

        try:
            result = evaluate(clips, models, options)
        except EvaluationError as error:
            failure, result = error, error.result
    _print_table(result["rows"])
    for path in (result["csv"], result["parquet"], *result["plots"]):
        print(path)
    if failure is not None:
        raise failure
    if arguments.json:
        print_json({"status": "evaluated", **result})


def _refuse_early(clips: list[str], models: list[str], options: EvaluateOptions) -> None:
    """Refuse what the flow would refuse, before anything heavy is loaded; objects in S3 it looks at itself."""
    from tasks.contenders import find_contender, with_baselines
    from tasks.excerpts import check_named, find_all, find_excerpt, refuse

    check_named(clips, models)
    refusals: list[SuperResolutionError] = []
    with_baselines(find_all(lambda model: find_contender(model, options.scale), models, refusals))
    find_all(
        lambda clip: find_excerpt(clip, Path(clip), options.mode, options.scale, options.seconds, options.crf),
        [clip for clip in clips if parse(clip) is None],
        refusals,
    )
    refuse(refusals)


def _print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rows, and those over all clips where there are several."""
    from rich.console import Console
    from rich.table import Table

    from flows.evaluation_files import mean_rows

    table = Table(box=None, pad_edge=False)
    shown = {name: text for name, text in _SHOWN.items() if any(row[name] is not None for row in rows)}
    table.add_column("clip", overflow="fold")
    table.add_column("model", no_wrap=True)
    for title, _ in shown.values():
        table.add_column(title, justify="right", no_wrap=True)
    several = len({row["clip"] for row in rows}) > 1
    clip = None
    for row in [*rows, *(mean_rows(rows) if several else [])]:
        cells = ["" if row[name] is None else f"{row[name]:.{digits}f}" for name, (_, digits) in shown.items()]
        if row["error"]:
            cells = ["failed"]
        table.add_row("" if row["clip"] == clip else row["clip"], row["model"], *cells)
        clip = row["clip"]
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=_PLAIN_WIDTH)
    console.print(table)
