"""What all commands share."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn, TypeAlias

from tasks.errors import SettingsError


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as the one-line error that every other mistake gives."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message, f"See {self.prog} --help")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def add_site(parser: Parser) -> None:
    """Add the options that name a site's store and ledger."""
    parser.add_argument(
        "--store",
        default=os.environ.get("SUPERRES_STORE", ""),
        metavar="BLOCK",
        help="how to reach S3 (default: SUPERRES_STORE, or this machine's own AWS credentials)",
    )
    parser.add_argument(
        "--ledger",
        default=os.environ.get("SUPERRES_LEDGER", ""),
        metavar="BLOCK",
        help="where records of jobs are kept (default: SUPERRES_LEDGER, or a file on this machine)",
    )


def add_size(parser: Parser) -> None:
    """Add the options that say how large the result is."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--scale", type=int, metavar="2..4", help="how many times larger (default 2)")
    size.add_argument("--height", type=int, metavar="ROWS", help="rows of the result, for example 1080")


#: Names of the options of `add_treatment`.
TREATMENT: Final = ("encoder", "crf", "preset", "stream", "deinterlace", "square_pixels")


def add_treatment(parser: Parser) -> None:
    """Add the options that say how a source is read and its result encoded; see `docs/media.md`."""
    parser.add_argument("--encoder", default="h264", help="h264 (default), h265, h265-10, av1, prores or ffv1")
    parser.add_argument("--crf", type=int, metavar="N", help="rate factor: lower is better (default of the encoder)")
    parser.add_argument("--preset", metavar="NAME", help="preset of the encoder, such as slow (or 4 for av1)")
    parser.add_argument(
        "--stream", type=int, metavar="N", help="index of the video stream (default: the largest picture; see probe)"
    )
    parser.add_argument(
        "--deinterlace",
        default="auto",
        metavar="WHEN",
        help="auto (default: where pictures are interlaced), field-rate (a frame of each field), or off",
    )
    parser.add_argument("--square-pixels", action="store_true", help="make anamorphic video as wide as it is shown")


def print_json(record: dict[str, Any]) -> None:
    """Print one JSON object on a line of its own."""
    print(json.dumps(record), flush=True)


@contextmanager
def refused(program: str) -> Iterator[None]:
    """Report options that a form does not take as the one-line error that every other mistake gives.

    Args:
        program: Whose help says what it takes.
    """
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        raise SettingsError(f"{first['loc'][-1]}: {first['msg']}", f"See {program} --help") from error
