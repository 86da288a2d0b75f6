"""`superres`: a thin door to the flows.

Input is checked before anything heavy is loaded, so a mistake costs a fraction of a second. What people read goes to
stderr; with `--json` the last line of stdout is one JSON object, whether the command succeeded or failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from flows.commands import evaluate, forecasts, jobs, library, models, pools
from flows.commands.common import TREATMENT, Parser, add_site, add_size, add_treatment, print_json
from tasks.errors import StoppedError, SuperResolutionError

#: What a shell expects of a program that was interrupted.
_INTERRUPTED = 130
_TERMINATED = 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 after success; the error's exit code, 130 when interrupted or 143 when terminated, otherwise.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # A polite end from outside takes the same way out as an error: workers and the embedded server are closed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    wants_json = "--json" in arguments
    try:
        parsed = _parser().parse_args(arguments)
        parsed.run(parsed)
        return 0
    except StoppedError:
        return _cancelled("cancelled", StoppedError.exit_code, wants_json)
    except SuperResolutionError as error:
        _complain(f"error: {error}")
        if wants_json:
            print_json({"status": "failed", "kind": error.kind, "error": str(error)})
        return error.exit_code
    except KeyboardInterrupt:
        return _cancelled("stopped", _INTERRUPTED, wants_json)
    except SystemExit as end:
        if end.code != _TERMINATED:
            raise
        return _cancelled("terminated", _TERMINATED, wants_json)


def _cancelled(how: str, code: int, wants_json: bool) -> int:
    _complain(f"{how}; run the same command again to continue where it stopped")
    if wants_json:
        print_json({"status": "cancelled"})
    return code


def _complain(text: str) -> None:
    print(f"superres: {' '.join(text.split())}", file=sys.stderr, flush=True)


def _parser() -> Parser:
    parser = Parser(prog="superres", description="Upscale video with Real-ESRGAN-class models.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")

    upscale = commands.add_parser("upscale", help="upscale one video", description="Upscale one video.")
    upscale.add_argument("source", help="path or s3:// URI of the video")
    upscale.add_argument(
        "destination",
        help="path or s3:// URI of the result; its ending (.mp4, .mov, .mkv) names the container; or a folder",
    )
    upscale.add_argument(
        "--container", default="mp4", choices=("mp4", "mov", "mkv"), help="if DESTINATION is a folder (default mp4)"
    )
    add_size(upscale)
    upscale.add_argument(
        "--model", default="compact", help="model card or weight file (default: bundled model that fits)"
    )
    upscale.add_argument(
        "--denoise",
        type=float,
        metavar="0..1",
        help="noise to remove, for models that come in two strengths (default 1)",
    )
    add_treatment(upscale)
    upscale.add_argument(
        "--precision",
        default="auto",
        metavar="P",
        help="auto (default: fp16 on GPUs, fp32 on CPUs), fp32, fp16, bf16 (faster on CPUs with AMX), or int8 (up to"
        " twice as fast on CPUs, where it proves good enough)",
    )
    upscale.add_argument(
        "--tolerance",
        type=int,
        default=0,
        metavar="N",
        help="keep parts of the picture that differ by up to N code values from what was upscaled there last"
        " (default 0: only what is exactly equal, which changes no result)",
    )
    upscale.add_argument(
        "--pools", default="local", metavar="NAME", help="where to work: local (default), slurm, or a block of pools"
    )
    upscale.add_argument("--timeline", metavar="SVG", help="write a picture of who worked on which chunk when")
    upscale.add_argument(
        "--scratch", metavar="DIR", help="folder for chunk files (default: in the user's cache folder)"
    )
    upscale.add_argument(
        "--chunk-seconds", type=float, metavar="S", help="length of a chunk (default: a minute of work)"
    )
    add_site(upscale)
    upscale.add_argument("--overwrite", action="store_true", help="replace an existing destination")
    upscale.add_argument("--salvage", action="store_true", help="keep what decodes of a damaged source")
    upscale.add_argument("--fresh", action="store_true", help="do not use chunks of an earlier, interrupted run")
    upscale.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    upscale.add_argument("--verbose", action="store_true", help="show the log of the flow")
    upscale.set_defaults(run=_upscale)

    probe = commands.add_parser("probe", help="what a source is", description="Show what a source is.")
    probe.add_argument("source", help="path of the video")
    probe.add_argument("--json", action="store_true", help="print JSON")
    probe.set_defaults(run=_probe)
    for group in (forecasts, library, evaluate, jobs, pools, models):
        group.add_to(commands)
    return parser


def _upscale(arguments: argparse.Namespace) -> None:
    began = time.time()
    from tasks.destinations import result_in
    from tasks.receipt import clear_away, kept_receipts
    from tasks.request import UpscaleRequest, check_content, check_request, check_settings
    from tasks.store.address import parse, uri_of

    destination = result_in(arguments.destination, arguments.source, arguments.container)
    request = UpscaleRequest(
        source=uri_of(arguments.source),
        destination=uri_of(destination) if parse(destination) else destination,
        scale=arguments.scale,
        height=arguments.height,
        model=arguments.model,
        denoise=arguments.denoise,
        precision=arguments.precision,
        tolerance=arguments.tolerance,
        scratch=arguments.scratch,
        chunk_seconds=arguments.chunk_seconds,
        overwrite=arguments.overwrite,
        salvage=arguments.salvage,
        fresh=arguments.fresh,
        **{name: getattr(arguments, name) for name in TREATMENT},
    )
    checked = None
    if parse(request.source) or arguments.store:
        check_settings(request)  # The rest when the source is here, and the store known.
    else:
        checked = check_request(request)
        check_content(checked)
    if not arguments.verbose:
        # Prefect logs each failure with a traceback; the one line that matters is printed at the end.
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    from flows.terminal import show_progress, show_start, show_summary
    from flows.working_place import working_place

    show_start(request, checked)
    with show_progress() as observer, working_place(arguments.pools):
        from flows.parameters import UpscaleOptions
        from flows.upscale_video import upscale_video
        from tasks.progress import observed_by

        timeline = str(Path(arguments.timeline).absolute()) if arguments.timeline else ""
        options = UpscaleOptions.from_request(
            request, pools=arguments.pools, timeline=timeline, store=arguments.store, ledger=arguments.ledger
        )
        with observed_by(observer), kept_receipts():
            result = upscale_video(request.source, request.destination, options)
    clear_away(Path(result.pop("folder")))
    result["startup_seconds"] = round(result["startup_seconds"] + result.pop("flow_started") - began, 3)
    show_summary(result)
    if arguments.json:
        print_json(result)


def _probe(arguments: argparse.Namespace) -> None:
    from tasks.errors import UnsupportedSourceError
    from tasks.media.probe import probe, refuse_unsupported

    facts = probe(Path(arguments.source).expanduser().absolute())
    try:
        refuse_unsupported(facts)
        obstacle = None
    except UnsupportedSourceError as error:
        obstacle = error.problem
    if arguments.json:
        print_json({**facts.to_dict(), "supported": obstacle is None, "obstacle": obstacle})
        return
    colour = facts.colour
    rate = f"{facts.frame_rate} ({float(facts.frame_rate):.3f})" if facts.frame_rate else "unknown"
    assumed = f" (assumed: {', '.join(facts.colour_assumed)})" if facts.colour_assumed else ""
    print(f"{facts.path}: {facts.container}, {facts.size_bytes} bytes, {facts.duration_seconds or 0:.3f} s")
    print(f"video   stream {facts.video_index}: {facts.codec} {facts.width}x{facts.height} {facts.pix_fmt}")
    print(f"        {facts.declared_frames or 'unknown number of'} frames at {rate} frames/s, {facts.field_order}")
    print(f"        sample aspect {facts.sample_aspect_ratio}, rotation {facts.rotation}")
    print(f"colour  {colour.matrix}, {'full' if colour.full_range else 'limited'} range{assumed}")
    for stream in facts.streams:
        if stream.index != facts.video_index:
            facets = (stream.kind, stream.codec, stream.language or "", stream.title or "")
            print(f"other   stream {stream.index}: {' '.join(facets)}".rstrip())
    print(f"can be upscaled: {'yes' if obstacle is None else 'no, ' + obstacle}")


if __name__ == "__main__":
    sys.exit(main())
