"""A registry of images on loopback, Debian's `docker-registry`: it asks for a password, as those of clouds do."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import pytest

from infra import debian
from tests.waiting import eventually

USER: Final = "superres"
PASSWORD: Final = "open"
_HASH: Final = "$2b$04$oEo9D/mrDxk1jGFfZwyHH.Kbdssy2/JwVGek3rWXBxzXXTXS9/FPq"

#: The kind of manifest that images in Docker's format have.
MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"


@dataclass(frozen=True)
class Registry:
    """A registry that runs.

    Attributes:
        address: Host and port.
    """

    address: str

    def get(self, path: str) -> httpx.Response:
        """What it answers by its HTTP API, below `/v2/`."""
        url = f"http://{self.address}/v2/{path}"
        return httpx.get(url, auth=(USER, PASSWORD), headers={"Accept": MANIFEST}, timeout=30)

    def tags(self, repository: str) -> list[str]:
        """Names of what was pushed to a repository."""
        return sorted(self.get(f"{repository}/tags/list").json().get("tags") or [])

    def digest(self, repository: str, tag: str) -> str:
        """The digest of an image, as the registry says it."""
        answer = self.get(f"{repository}/manifests/{tag}")
        assert answer.status_code == 200, answer.text
        return answer.headers["Docker-Content-Digest"]


def registry_or_skip() -> tuple[Path, Path]:
    """The program, and a shell's `cat` that needs no library, as something to put into images.

    The test that asks is skipped where they are not to be had.
    """
    cache = debian.cache_folder("registry")
    tree = cache / debian.release()
    try:
        with debian.locked(cache):
            if not (tree / "usr/bin/docker-registry").exists():
                debian.fetch(["docker-registry", "busybox-static"], tree)
    except debian.PackagesError as error:
        pytest.skip(f"there is no registry to push images to: {error}")
    return tree / "usr/bin/docker-registry", tree / "bin/busybox"


@contextmanager
def running_registry(program: Path, folder: Path, *, readonly: bool = False) -> Iterator[Registry]:
    """A registry on a free port of 127.0.0.1 while the block runs.

    Args:
        program: From `registry_or_skip`.
        folder: Where it keeps images; it is made.
        readonly: Whether it shows what it has, and takes nothing.
    """
    folder.mkdir(parents=True)
    (folder / "users").write_text(f"{USER}:{_HASH}\n")
    settings = {
        "version": 0.1,
        "storage": {
            "filesystem": {"rootdirectory": str(folder / "images")},
            "maintenance": {"readonly": {"enabled": readonly}},
        },
        "http": {"addr": "127.0.0.1:0", "secret": "of this test"},
        "auth": {"htpasswd": {"realm": "images", "path": str(folder / "users")}},
    }
    (folder / "config.yml").write_text(json.dumps(settings))
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen([program, "serve", folder / "config.yml"], stdout=output, stderr=output)

    def listens() -> re.Match[str] | None:
        assert process.poll() is None, log.read_text()
        return re.search(r"listening on (127\.0\.0\.1:\d+)", log.read_text())

    try:
        yield Registry(eventually(listens)[1])
    finally:
        process.terminate()
        process.wait(30)
