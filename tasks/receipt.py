"""The receipt of a published result: lets a command repeated after a crash see that its work is already there.

A job writes it into its folder in scratch just before it publishes its result. The folder goes away at the end of
the job, for the command line (`kept_receipts`) at the end of the command. So a receipt that is found belongs to a
command that was killed between those two moments.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from tasks.destinations import Destination, Output
from tasks.scratch import give_up

NAME = "receipt.json"

_kept: ContextVar[bool] = ContextVar("kept", default=False)


def write_receipt(folder: Path, destination: Destination, digest: str) -> None:
    """Record that the job in `folder` publishes a file with hash `digest` (XXH3, 128 bits) at `destination`."""
    partial = folder / f"{NAME}.partial"
    partial.write_text(json.dumps({"destination": destination.uri, "digest": digest}))
    os.replace(partial, folder / NAME)


def published(folder: Path, destination: Destination) -> Output | None:
    """What lies at `destination` now, if the job in `folder` published it.

    Raises:
        SuperResolutionError: The store cannot be asked, so nobody knows.
    """
    try:
        receipt = json.loads((folder / NAME).read_text())
        if receipt["destination"] != destination.uri:
            return None
        found = destination.found()
        return found if found is not None and found.digest == receipt["digest"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_published(scratch: Path, destination: Destination) -> bool:
    """Whether any interrupted job in `scratch` published what lies at `destination` now."""
    return any(published(path.parent, destination) for path in scratch.glob(f"*/{NAME}"))


@contextmanager
def kept_receipts() -> Iterator[None]:
    """Have `clear_away` leave the receipt of jobs run inside the block: their caller is not at its end yet."""
    token = _kept.set(True)
    try:
        yield
    finally:
        _kept.reset(token)


def clear_away(folder: Path) -> None:
    """Remove the folder of a job that has ended, unless somebody works in it; what cannot be removed stays."""
    give_up(folder, keep=(NAME,) if _kept.get() else ())
