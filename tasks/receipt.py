"""The receipt of a published result: lets a command repeated after a crash see that its work is already there.

A job writes it into its folder in scratch just before the result gets its name. The folder goes away at the end of
the job, for the command line (`kept_receipts`) at the end of the command. So a receipt that is found belongs to a
command that was killed between those two moments.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from tasks.media.chunk_file import remove_leftover
from tasks.media.encoders import file_digest

NAME = "receipt.json"

_kept: ContextVar[bool] = ContextVar("kept", default=False)


def write_receipt(folder: Path, destination: Path, digest: str) -> None:
    """Record that the job in `folder` publishes a file with hash `digest` (XXH3, 128 bits) at `destination`."""
    partial = folder / f"{NAME}.partial"
    partial.write_text(json.dumps({"destination": str(destination), "digest": digest}))
    os.replace(partial, folder / NAME)


def is_published(folder: Path, destination: Path) -> bool:
    """Whether the job in `folder` published what lies at `destination` now."""
    try:
        receipt = json.loads((folder / NAME).read_text())
        return receipt["destination"] == str(destination) and receipt["digest"] == file_digest(destination)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def find_published(scratch: Path, destination: Path) -> bool:
    """Whether any interrupted job in `scratch` published what lies at `destination` now."""
    return any(is_published(path.parent, destination) for path in scratch.glob(f"*/{NAME}"))


@contextmanager
def kept_receipts() -> Iterator[None]:
    """Have `clear_away` leave the receipt of jobs run inside the block: their caller is not at its end yet."""
    token = _kept.set(True)
    try:
        yield
    finally:
        _kept.reset(token)


def clear_away(folder: Path) -> None:
    """Remove the folder of a job whose result is published. What cannot be removed does not make the job fail."""
    if not _kept.get():
        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name != NAME:
                remove_leftover(path)
