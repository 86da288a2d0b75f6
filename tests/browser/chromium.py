"""A browser for tests and for the pictures of the docs: the Chromium of this machine, or the one that Debian brings."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from playwright.sync_api import Browser, sync_playwright

from infra import debian

#: Debian's names of it and of fonts, which it needs to show anything.
_PACKAGES: Final = ("chromium", "fonts-dejavu-core")


@contextmanager
def running_chromium() -> Iterator[Browser]:
    """A headless browser while the block runs.

    Raises:
        PackagesError: It is neither here nor to be had.
    """
    program, environment = _program()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program,
            env={**os.environ, **environment},
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
        )
        try:
            yield browser
        finally:
            browser.close()


def _program() -> tuple[Path, dict[str, str]]:
    """The program, and the variables it needs to find its libraries and fonts."""
    if installed := shutil.which("chromium"):
        return Path(installed), {}
    cache = debian.cache_folder("chromium")
    tree = cache / debian.release()
    try:
        with debian.locked(cache):
            if not tree.is_dir():
                debian.fetch(_PACKAGES, tree, _write_fonts_configuration)
    except OSError as error:
        raise debian.PackagesError(str(error)) from error
    libraries = os.pathsep.join(map(str, debian.libraries(tree)))
    # The program beside its libraries; `usr/bin/chromium` is a script that looks for them in the system.
    return tree / "usr/lib/chromium/chromium", {
        "LD_LIBRARY_PATH": libraries,
        "FONTCONFIG_FILE": str(tree / "fonts.conf"),
    }


def _write_fonts_configuration(tree: Path) -> None:
    # Relative to the file, so that the tree may be renamed.
    folders = ('<dir prefix="relative">usr/share/fonts</dir>', "<dir>/usr/share/fonts</dir>")
    (tree / "fonts.conf").write_text(
        f'<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd"><fontconfig>{"".join(folders)}'
        '<cachedir prefix="xdg">fontconfig</cachedir></fontconfig>'
    )
