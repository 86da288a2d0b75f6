"""`superres plan` and `superres preview`: what a job will take, and what it will look like, before it runs."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from typing import Any

from flows.commands.common import TREATMENT, Commands, add_site, add_size, add_treatment, print_json, refused
from tasks.errors import SettingsError
from tasks.store.address import parse


def add_to(commands: Commands) -> None:
    """Add the commands to those of the program."""
    plan = commands.add_parser(
        "plan",
        help="what a job will take, before anything runs",
        description="Say how many chunks a job has, and how long it will take and what it will cost; starts nothing.",
    )
    plan.add_argument("source", help="path of the video")
    add_size(plan)
    plan.add_argument("--model", default="compact", help="model card or weight file (default: bundled model that fits)")
    add_treatment(plan)
    plan.add_argument("--precision", default="auto", metavar="P", help="auto (default), fp32, fp16, bf16 or int8")
    plan.add_argument("--pools", default="local", metavar="NAME", help="where the job would run (default local)")
    plan.add_argument("--chunk-seconds", type=float, metavar="S", help="length of a chunk (default: a minute of work)")
    add_site(plan)
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=_plan)

    preview = commands.add_parser(
        "preview",
        help="a few excerpts through several models, side by side",
        description="Upscale a few excerpts with several models, and say what each would take for the whole video.",
    )
    preview.add_argument("source", help="path or s3:// URI of the video")
    preview.add_argument(
        "--models", default="compact", metavar="A,B", help="models to compare (default: bundled model that fits)"
    )
    add_size(preview)
    preview.add_argument("--excerpts", type=int, default=3, metavar="N", help="parts of the video (default 3)")
    preview.add_argument("--seconds", type=float, default=2.0, metavar="S", help="length of each (default 2)")
    preview.add_argument("--frames", type=int, default=1, metavar="N", help="pictures of each (default 1)")
    preview.add_argument("--precision", default="auto", metavar="P", help="auto (default), fp32, fp16 or bf16")
    add_treatment(preview)
    preview.add_argument("--folder", default="", metavar="DIR", help="for the pictures (default: in the user's data)")
    preview.add_argument("--pools", default="local", metavar="NAME", help="where to work (default local)")
    preview.add_argument("--scratch", default="", metavar="DIR", help="folder for chunk files")
    add_site(preview)
    preview.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    preview.add_argument("--verbose", action="store_true", help="show the log of the flow")
    preview.set_defaults(run=_preview)


def _plan(arguments: argparse.Namespace) -> None:
    from tasks.request import UpscaleRequest, check_content, check_request, check_settings

    if parse(arguments.source):
        raise SettingsError(
            f"{arguments.source} would have to be downloaded to be planned",
            "Plan a copy of it on this machine; upscale and preview download it themselves",
        )
    names = ("source", "scale", "height", "model", "precision", "chunk_seconds", *TREATMENT)
    request = UpscaleRequest(destination="", **{name: getattr(arguments, name) for name in names})
    check_settings(request, publishes=False)
    check_content(check_request(request, publishes=False))  # Before anything heavy is loaded.
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    with ExitStack() as stack:
        if arguments.pools != "local" or arguments.ledger:
            from infra.prefect_server import ensure_api

            stack.enter_context(ensure_api())  # It knows the blocks.
        from flows.forecast import earlier_jobs, forecast
        from flows.pools import site_of
        from tasks.models.weights import content_hash
        from tasks.plan import make_plan

        site, earlier = site_of(arguments.pools), earlier_jobs(arguments.ledger)
    checked = check_request(request, site.capacity, publishes=False)
    job = make_plan(checked, content_hash(checked.card))
    expected = forecast(job, site, earlier)
    record: dict[str, Any] = {
        "source": str(request.source_path),
        "frames": job.frames,
        "width": job.target.width,
        "height": job.target.height,
        "chunks": expected.chunks,
        "chunk_frames": expected.chunk_frames,
        "model": job.card.name,
        "gpu_seconds": round(expected.gpu_seconds, 1),
        "cpu_seconds": round(expected.cpu_seconds, 1),
        "wall_seconds": round(expected.wall_seconds, 1),
        "finish_at": expected.finish_at,
        "cost": expected.cost,
        "basis": expected.basis,
        "notes": list(job.notes),
        "not_carried": job.carried.left_out,
    }
    if arguments.json:
        print_json(record)
        return
    from flows.terminal import duration

    facts, target = job.facts, job.target
    print(f"{facts.path}: {job.frames} frames {facts.width}x{facts.height} -> {target.width}x{target.height}")
    print(f"model      {job.card.name}, {job.profile.name}")
    print(f"chunks     {expected.chunks} of up to {expected.chunk_frames} frames")
    print(f"gpu pool   {duration(expected.gpu_seconds)}, {site.capacity.gpu_slots} chunk(s) at a time")
    print(f"cpu pool   {duration(expected.cpu_seconds)}, {site.capacity.cpu_slots} chunk(s) at a time")
    print(f"finished   after {duration(expected.wall_seconds)}, at {expected.finish_at} if it began now")
    print(f"cost       {'unknown: the pools have no prices' if expected.cost is None else f'{expected.cost:.2f}'}")
    print(f"{expected.basis}")
    for note in job.notes:
        print(note)
    for index, reason in job.carried.left_out.items():
        print(f"stream {index} is left out: {reason}")


def _preview(arguments: argparse.Namespace) -> None:
    from flows.parameters import PreviewOptions, model_fields
    from flows.preview_checks import check_folder, check_models, pictures_folder

    models = [model_fields(name.strip()) for name in arguments.models.split(",") if name.strip()]
    names = ("excerpts", "seconds", "frames", "precision", "folder", "pools", "scratch", "store", "ledger")
    given = {name: getattr(arguments, name) for name in (*names, "scale", "height", *TREATMENT)}
    with refused("superres preview"):
        options = PreviewOptions(
            models=[fields["model"] for fields in models if "weights" not in fields],
            weights=[fields["weights"] for fields in models if "weights" in fields],
            **{name: value for name, value in given.items() if value is not None},
        )
    if not parse(arguments.source):  # Before anything heavy is loaded; the flow does it again.
        check_models(arguments.source, options)
    check_folder(pictures_folder(options, "", ""))
    if not arguments.verbose:
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    from flows.working_place import working_place
    from tasks.store.address import uri_of

    with working_place(arguments.pools):
        from flows.preview import preview, table

        seen = preview(uri_of(arguments.source), options)
    if arguments.json:
        print_json(seen)
        return
    print(table(seen))
    for excerpt, first in enumerate(seen["excerpts"]):
        print(f"excerpt {excerpt + 1}: frames {first['first']}-{first['last']}, at {first['start_seconds']:.1f} s")
    for picture in seen["pictures"]:
        print(picture)
