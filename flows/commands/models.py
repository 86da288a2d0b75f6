"""`superres models` and `superres bench`: models, their weights, and how fast they are here."""

from __future__ import annotations

import argparse

from flows.commands.common import Commands, print_json


def add_to(commands: Commands) -> None:
    """Add the commands to those of the program."""
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
    bench.add_argument(
        "--backend", action="append", help="torch, openvino, winograd or cuda; may be repeated (default: by device)"
    )
    bench.add_argument("--precision", action="append", help="may be repeated (default: by device)")
    bench.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    bench.add_argument("--tile", type=int, metavar="PIXELS", help="edge of a tile (default: by free memory)")
    bench.add_argument("--batch", type=int, metavar="FRAMES", help="frames at a time (default: by size and memory)")
    bench.add_argument("--turns", type=int, default=5, help="turns of two seconds (default 5)")
    bench.add_argument("--reference", action="store_true", help="let the official RealESRGANer take turns with it")
    bench.add_argument("--json", action="store_true", help="print JSON")
    bench.set_defaults(run=_bench)

    models = commands.add_parser(
        "models", help="list, fetch and verify models", description="Models and their weights."
    )
    actions = models.add_subparsers(dest="action", metavar="list|fetch|verify")
    models.set_defaults(run=_list_models, json=False)
    listing = actions.add_parser("list", help="the model cards")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(run=_list_models)
    fetch = actions.add_parser("fetch", help="download the weights of a model, with size and hash checked")
    fetch.add_argument("name")
    fetch.set_defaults(run=_fetch_model)
    check = actions.add_parser("verify", help="check all weights that are on this machine")
    check.set_defaults(run=_verify_models)


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
        print_json({"results": results})
    else:
        print(as_table(results))


def _list_models(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from tasks.models.cards import all_cards
    from tasks.models.weights import is_present

    rows = [{**asdict(card), "present": is_present(card)} for card in all_cards().values()]
    if arguments.json:
        print_json({"models": rows})
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
