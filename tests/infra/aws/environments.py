"""Environments that `infra/aws/environment.sh` makes, once for each version of their lock, for all checkouts."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from infra import debian

AWS: Final = Path(__file__).parents[3] / "infra" / "aws"

#: What pip says where there is no index, or none with these packages.
_NO_PACKAGES: Final = ("No matching distribution found", "Could not find a version", "ConnectionError", "Max retries")


def environment(name: str, lock: str, here: Path) -> Path:
    """The folder `bin` of an environment; the test that asks is skipped where its packages cannot be had.

    Args:
        name: Of the folder in the user's cache.
        lock: Of the environment, below `infra/aws`.
        here: Folder in this checkout, used where it is of this lock already.
    """
    content = (AWS / lock).read_bytes()
    made, cache = here / ".made-from", debian.cache_folder(name)
    if made.exists() and made.read_bytes() == content:
        return here / "bin"
    folder = cache / hashlib.sha256(content + sys.version.encode()).hexdigest()[:12]
    with debian.locked(cache):
        done = make(folder, lock)
    if done.returncode and any(each in done.stderr for each in _NO_PACKAGES):
        pytest.skip(f"the packages of infra/aws/{lock} cannot be had: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def make(folder: Path, lock: str) -> subprocess.CompletedProcess[str]:
    """Run the script, with the interpreter of the tests."""
    return subprocess.run(
        ["sh", AWS / "environment.sh", folder, lock],
        env={**os.environ, "SUPERRES_PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
