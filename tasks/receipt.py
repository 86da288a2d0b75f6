"""The receipt of a published result: lets a command repeated after a crash see that its work is already there.

A job writes it into its folder in scratch just before the result gets its name, and the folder goes away at the end of
the job. So a receipt that is found belongs to a job that was killed between those two moments.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from tasks.media.encoders import file_digest

NAME = "receipt.json"


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
