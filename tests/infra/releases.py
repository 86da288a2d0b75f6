"""Releases of this project as they lie on the file system of a site, made of this checkout and its environment."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

CHECKOUT: Final = Path(__file__).parents[2]

#: What runs, and registers itself.
_PARTS: Final = ("blocks", "deployments", "flows", "infra", "tasks", "prefect.yaml")


def copy_checkout(target: Path) -> Path:
    """A copy of what runs, as a checkout of its own whose `deployments/environment.sh` links to this environment.

    Installing takes minutes; that it works is what everybody finds out who sets up these tests.
    """
    for part in _PARTS:
        source = CHECKOUT / part
        if source.is_dir():
            shutil.copytree(source, target / part, ignore=shutil.ignore_patterns(".venv", "__pycache__"))
        else:
            shutil.copy2(source, target / part)
    script = target / "deployments/environment.sh"
    script.write_text(f'#!/bin/sh\nset -eu\ncd "$(dirname "$0")/.."\nln -s "{(CHECKOUT / ".venv").resolve()}" .venv\n')
    commit(target)
    return target


def commit(checkout: Path) -> str:
    """Commit everything in a folder, which becomes a repository; returns the commit."""
    who = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "All"]):
        subprocess.run(["git", *command], cwd=checkout, env={**os.environ, **who}, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True)
    return head.stdout.strip()
