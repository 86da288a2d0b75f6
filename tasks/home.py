"""Where this project keeps what outlives a run. Imports nothing of the project, so that every part can ask."""

from __future__ import annotations

import os
from pathlib import Path


def default_home() -> Path:
    """`$SUPERRES_HOME`, or the user's data folder."""
    configured = os.environ.get("SUPERRES_HOME")
    if configured:
        return Path(configured).expanduser()
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "media-super-resolution"
