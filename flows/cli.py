"""`superres`: a thin door to the flows.

Input is checked before anything heavy is loaded, so a mistake costs a fraction of a second. What people read goes to
stderr; with `--json` the last line of stdout is one JSON object, whether the command succeeded or failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from tasks.errors import SettingsError, SuperResolutionError

#: What a shell expects of a program that was interrupted.
_INTERRUPTED = 130
_TERMINATED = 143


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as the one-line error that every other mistake gives."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message, f"See {self.prog} --help")


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
    except SuperResolutionError as error:
        _complain(f"error: {error}")
        _print_json(wants_json, {"status": "failed", "kind": error.kind, "error": str(error)})
        return error.exit_code
    except KeyboardInterrupt:
        return _cancelled("stopped", _INTERRUPTED, wants_json)
    except SystemExit as end:
        if end.code != _TERMINATED:
            raise
        return _cancelled("terminated", _TERMINATED, wants_json)


def _cancelled(how: str, code: int, wants_json: bool) -> int:
    _complain(f"{how}; run the same command again to continue where it stopped")
    _print_json(wants_json, {"status": "cancelled"})
    return code


def _complain(text: str) -> None:
    print(f"superres: {' '.join(text.split())}", file=sys.stderr, flush=True)


def _print_json(wanted: bool, record: dict[str, Any]) -> None:
    if wanted:
        print(json.dumps(record), flush=True)


def _parser() -> _Parser:
    parser = _Parser(prog="superres", description="Upscale video with Real-ESRGAN-class models.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser, metavar="COMMAND")

    upscale = commands.add_parser("upscale", help="upscale one video", description="Upscale one video.")
    upscale.add_argument("source", help="path of the video")
    upscale.add_argument("destination", help="path of the result; its ending (.mp4, .mov, .mkv) names the container")
    size = upscale.add_mutually_exclusive_group()
    size.add_argument("--scale", type=int, metavar="2..4", help="how many times larger (default 2)")
    size.add_argument("--height", type=int, metavar="ROWS", help="rows of the result, for example 1080")
    upscale.add_argument(
        "--model", default="compact", help="model card or weight file (default: bundled model that fits)"
    )
    upscale.add_argument(
        "--denoise",
        type=float,
        metavar="0..1",
        help="noise to remove, for models that come in two strengths (default 1)",
    )
    upscale.add_argument("--encoder", default="h264", help="encoder profile (default h264)")
    upscale.add_argument(
        "--precision",
        default="auto",
        metavar="P",
        help="auto (default: fp16 on GPUs, fp32 on CPUs), fp32, fp16, bf16 (several times faster on CPUs that compute"
        " in it), or int8 (several times faster on CPUs, where it proves good enough)",
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

    bench = commands.add_parser(
        "bench",
        help="how fast models are on this machine",
        description="Frames per second of the engine on this machine, and its share of the fastest matrix product.",
    )
    bench.add_argument("--model", action="append", help="name or path; may be repeated (default compact-x2)")
    bench.add_argument(
        "--size", action="append", metavar="WxH", help="of the source; may be repeated (default 640x360)"
    )
    bench.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    bench.add_argument("--backend", action="append", help="torch or openvino; may be repeated (default: by device)")
    bench.add_argument("--precision", action="append", help="may be repeated (default: by device)")
    bench.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    bench.add_argument("--tile", type=int, metavar="PIXELS", help="edge of a tile (default: by free memory)")
    bench.add_argument("--batch", type=int, metavar="FRAMES", help="frames at a time (default: by size and memory)")
    bench.add_argument("--turns", type=int, default=5, help="turns of two seconds (default 5)")
    bench.add_argument("--reference", action="store_true", help="let the official RealESRGANer take turns with it")
    bench.add_argument("--json", action="store_true", help="print JSON")
    bench.set_defaults(run=_bench)

    pools = commands.add_parser("pools", help="what pools do, and which there are", description="Pools of workers.")
    actions = pools.add_subparsers(dest="action", parser_class=_Parser, metavar="status|save", required=True)
    status = actions.add_parser("status", help="jobs, workers and tasks of the pools that are open")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(run=_pools_status)
    save = actions.add_parser("save", help="save the pools that a TOML file describes as blocks")
    save.add_argument("file", help="with tables such as [slurm-pools.NAME], see infra/pools/README.md")
    save.set_defaults(run=_save_pools)

    models = commands.add_parser(
        "models", help="list, fetch and verify models", description="Models and their weights."
    )
    actions = models.add_subparsers(dest="action", parser_class=_Parser, metavar="list|fetch|verify")
    models.set_defaults(run=_list_models, json=False)
    listing = actions.add_parser("list", help="the model cards")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(run=_list_models)
    fetch = actions.add_parser("fetch", help="download the weights of a model, with size and hash checked")
    fetch.add_argument("name")
    fetch.set_defaults(run=_fetch_model)
    check = actions.add_parser("verify", help="check all weights that are on this machine")
    check.set_defaults(run=_verify_models)
    return parser


def _upscale(arguments: argparse.Namespace) -> None:
    began = time.time()
    from tasks.receipt import kept_receipts
    from tasks.request import UpscaleRequest, check_content, check_request

    request = UpscaleRequest(
        source=arguments.source,
        destination=arguments.destination,
        scale=arguments.scale,
        height=arguments.height,
        model=arguments.model,
        denoise=arguments.denoise,
        encoder=arguments.encoder,
        precision=arguments.precision,
        tolerance=arguments.tolerance,
        scratch=arguments.scratch,
        chunk_seconds=arguments.chunk_seconds,
        overwrite=arguments.overwrite,
        salvage=arguments.salvage,
        fresh=arguments.fresh,
    )
    checked = check_request(request)
    check_content(checked)
    if not arguments.verbose:
        # Prefect logs each failure with a traceback; the one line that matters is printed at the end.
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    from flows.terminal import show_progress, show_start, show_summary

    show_start(checked)
    with show_progress(checked) as observer, _working_place(arguments.pools):
        from flows.parameters import UpscaleOptions
        from flows.upscale_video import upscale_video
        from tasks.progress import observed_by

        timeline = str(Path(arguments.timeline).absolute()) if arguments.timeline else ""
        options = UpscaleOptions.from_request(request, pools=arguments.pools, timeline=timeline)
        with observed_by(observer), kept_receipts():
            result = upscale_video(str(request.source_path), str(request.destination_path), options)
    shutil.rmtree(result.pop("folder"), ignore_errors=True)
    result["startup_seconds"] = round(result["startup_seconds"] + result.pop("flow_started") - began, 3)
    show_summary(result)
    _print_json(arguments.json, result)


@contextmanager
def _working_place(name: str) -> Iterator[None]:
    """A Prefect API and open pools.

    For the pools of this machine both start in the background while the flow's modules load, which takes as long.
    Other pools are described by blocks, which only an API that answers can give.
    """
    from infra.prefect_server import ensure_api

    with ExitStack() as stack:
        api = ensure_api().start()
        stack.callback(api.stop)
        if name == "local":
            from flows.pools import pools_of_this_machine
            from infra.pools import open_pools

            pools = open_pools(pools_of_this_machine()).start()
            stack.callback(pools.close)
            import flows.upscale_video

            stack.enter_context(api)
        else:
            from blocks.pools import load_pools

            reach = stack.enter_context(ExitStack())
            reach.enter_context(api)
            block = load_pools(name)
            block.check()
            host = block.scheduler_host
            if api.private and host != "127.0.0.1":
                reach.close()  # Workers on other machines need a server that they can reach.
                stack.enter_context(ensure_api(host=host))
            pools = block.open(warm=False)
            import flows.upscale_video  # noqa: F401
        stack.enter_context(pools)
        yield


def _pools_status(arguments: argparse.Namespace) -> None:
    from infra.pools.status import open_clusters

    clusters = open_clusters()
    if arguments.json:
        _print_json(True, {"clusters": clusters})
        return
    if not clusters:
        print("no pools are open")
    for cluster in clusters:
        age = time.time() - cluster["written"]
        print(f"{cluster['host']} process {cluster['process']}, scheduler {cluster['scheduler']}, {age:.0f} s ago")
        for pool, facts in cluster["pools"].items():
            tasks = f"{facts['running']} running, {facts['waiting']} waiting, {facts['coming']} coming"
            print(f"  {pool}: {len(facts['workers'])} of at most {facts['maximum']} workers; tasks: {tasks}")
            for worker in facts["workers"]:
                job = f"job {worker['job']}" if worker["job"] else ""
                facets = (worker["name"], worker["state"], job, worker["node"], f"{worker['seconds']} s", worker["log"])
                print("    " + "  ".join(filter(None, facets)))


def _save_pools(arguments: argparse.Namespace) -> None:
    from blocks.seeds import read_pools
    from infra.prefect_server import ensure_api

    blocks = read_pools(Path(arguments.file))
    with ensure_api():
        for name, block in blocks.items():
            block.save(name, overwrite=True)
            print(f"saved {block.get_block_type_slug()}/{name}")


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
        _print_json(True, {**facts.to_dict(), "supported": obstacle is None, "obstacle": obstacle})
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


def _bench(arguments: argparse.Namespace) -> None:
    import itertools

    from tasks.errors import SettingsError
    from tasks.models.bench import as_table, measure
    from tasks.models.cards import find_model
    from tasks.models.weights import locate

    if arguments.turns < 1:
        raise SettingsError(f"{arguments.turns} turns are too few", "Ask for at least one")
    sizes = []
    for text in arguments.size or ["640x360"]:
        width, _, height = text.partition("x")
        if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
            raise SettingsError(f"{text!r} is not a size", "Write it like 640x360")
        sizes.append((int(width), int(height)))
    cards = [find_model(name) for name in arguments.model or ["compact-x2"]]
    for card in cards:
        locate(card)
    shared = {name: getattr(arguments, name) for name in ("device", "threads", "tile", "batch")}
    results = []
    for card, size, backend, precision in itertools.product(
        cards, sizes, arguments.backend or ["auto"], arguments.precision or ["auto"]
    ):
        options = {**shared, "backend": backend, "precision": precision}
        results.append(measure(card, size, turns=arguments.turns, reference=arguments.reference, options=options))
    if arguments.json:
        _print_json(True, {"results": results})
    else:
        print(as_table(results))


def _list_models(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from tasks.models.cards import all_cards
    from tasks.models.weights import is_present

    rows = [{**asdict(card), "present": is_present(card)} for card in all_cards().values()]
    if arguments.json:
        _print_json(True, {"models": rows})
        return
    for row in rows:
        state = "here" if row["present"] else "not here"
        print(f"{row['name']:26} x{row['scale']}  {row['bytes'] / 1e6:6.1f} MB  {state:8}  {row['best_for']}")


def _fetch_model(arguments: argparse.Namespace) -> None:
    from flows.terminal import show_download
    from tasks.models.cards import find_model
    from tasks.models.weights import fetch

    card = find_model(arguments.name)
    with show_download(card.name) as progress:
        path = fetch(card, progress)
    print(path)


def _verify_models(_: argparse.Namespace) -> None:
    from tasks.models.cards import all_cards
    from tasks.models.weights import is_present, locate

    for card in all_cards().values():
        if is_present(card):
            print(f"{card.name}: good ({locate(card)})")
        else:
            print(f"{card.name}: not here")


if __name__ == "__main__":
    sys.exit(main())
