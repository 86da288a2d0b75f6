"""Whose jobs these are."""

from __future__ import annotations

import getpass
import os


def this_user() -> str:
    """Who runs this process: `SUPERRES_OWNER`, which a service sets for the person it acts for, or the user here."""
    if named := os.environ.get("SUPERRES_OWNER"):
        return named
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # A user that the machine does not know by name, as in containers.
        return str(os.getuid())
