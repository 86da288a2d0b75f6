"""How other processes see the pools that are open: a small file per cluster, kept while it is open.

The scheduler lives in the process of a flow run, and a terminal cannot ask it: that would take its credentials.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from infra.prefect_server import default_home

#: Seconds between two writes.
_INTERVAL: Final = 2.0


def status_folder() -> Path:
    """Where the files are."""
    return default_home() / "pools"


class StatusFile:
    """The file of one cluster.

    Args:
        folder: Where it lies; `status_folder()` by default.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._path = (folder or status_folder()) / f"{socket.gethostname()}-{os.getpid()}-{id(self):x}.json"
        self._written = 0.0

    def write(self, snapshot: Callable[[], dict[str, Any]]) -> None:
        """Write what is so now, unless that was done a moment ago. A full disk does not stop a run."""
        if time.monotonic() - self._written < _INTERVAL:
            return
        self._written = time.monotonic()
        record = {"host": socket.gethostname(), "process": os.getpid(), "written": time.time(), **snapshot()}
        partial = self._path.with_suffix(".partial")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(record))
            os.replace(partial, self._path)
        except OSError:
            return

    def remove(self) -> None:
        """The cluster is closed."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def open_clusters(folder: Path | None = None) -> list[dict[str, Any]]:
    """What all clusters of this user wrote last; files of processes of this machine that are gone are removed."""
    records = []
    for path in sorted((folder or status_folder()).glob("*.json")):
        try:
            record = json.loads(path.read_text())
            is_alive = Path("/proc", str(record["process"])).exists()
            is_over = record["host"] == socket.gethostname() and not is_alive
            if is_over:
                path.unlink(missing_ok=True)
                continue
        except (OSError, ValueError, TypeError, KeyError):
            continue  # Not readable, or not a file of this project.
        records.append(record)
    return records
