"""Programs from Debian packages, unpacked into a folder of the user.

Nothing is installed into the system and no privilege is needed: apt runs with lists, caches and locks of its own, takes
from the sources that the machine is set up with, checks signatures and hashes, and picks the packages that are named,
and those they need and the machine lacks. They are unpacked beside each other.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_APT_SECONDS: Final = 600.0


class PackagesError(Exception):
    """Packages are not to be had; says why in a few words."""


def cache_folder(name: str) -> Path:
    """Where what is unpacked is kept: below `$XDG_CACHE_HOME`, or `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "media-super-resolution" / name


def release() -> str:
    """This release of its distribution: what is unpacked on one is not for another, say after an upgrade."""
    try:
        found = platform.freedesktop_os_release()
    except OSError:
        found = {}
    parts = (found.get("ID", "linux"), found.get("VERSION_ID", ""), platform.machine())
    return "-".join(part for part in parts if part)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from unpacking into the same folder, which is made, while the block runs."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        flock(lock, LOCK_EX)
        yield


def fetch(packages: Sequence[str], target: Path, finish: Callable[[Path], None] = lambda tree: None) -> None:
    """Download and unpack packages, and those they need and the machine lacks; the folder appears when it is complete.

    Args:
        packages: Names of Debian packages.
        target: Folder to unpack them in; one that is there is replaced.
        finish: What to do with the unpacked tree before that.

    Raises:
        PackagesError: They are not to be had.
    """
    if not (shutil.which("apt-get") and shutil.which("apt-config") and shutil.which("dpkg-deb")):
        raise PackagesError("this machine has no apt to fetch it with")
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as name:
        work = Path(name)
        tree = work / "tree"
        for package in _download(packages, work):
            _run(["dpkg-deb", "--extract", str(package), str(tree)])
        finish(tree)
        tree.chmod(0o755)  # The folder of an mkdtemp is for its owner only; others may run these programs.
        shutil.rmtree(target, ignore_errors=True)  # Left from before a package was removed from the system.
        tree.rename(target)


def libraries(tree: Path) -> list[Path]:
    """Folders of a tree that hold shared libraries, for LD_LIBRARY_PATH; the usual one first."""
    found = {path.parent for path in tree.glob("usr/lib/*-linux-*/**/*.so*")}
    return sorted(found, key=lambda folder: (len(folder.parts), folder))


def _download(packages: Sequence[str], work: Path) -> list[Path]:
    """Download packages and what this machine lacks for them, with an apt that leaves the machine's own apt alone."""
    for folder in ("lists/partial", "archives/partial"):
        (work / folder).mkdir(parents=True)
    # The machine's settings (proxies, certificates, checks), without hooks that would act on the system, and without
    # additional indexes that nothing here reads.
    machine = _run(["apt-config", "dump"]).splitlines()
    unwanted = re.compile(r"(APT::Update|DPkg|Acquire::IndexTargets)\b")
    settings = [line for line in machine if not unwanted.match(line)] + [
        'Dir::Etc::parts "/dev/null";',
        'Dir::Etc::main "/dev/null";',
        f'Dir::State::lists "{work}/lists";',
        f'Dir::Cache "{work}";',
        'Dir::Cache::archives "archives";',
        'Debug::NoLocking "true";',
        'APT::Sandbox::User "";',  # Its usual user may not enter this folder.
        'APT::Install-Recommends "false";',
        'Acquire::Languages "none";',
        'Acquire::Retries "1";',
        'Acquire::http::Timeout "20";',
        'Acquire::https::Timeout "20";',
    ]
    configuration = work / "apt.conf"
    configuration.write_text("\n".join(settings) + "\n")
    # Does not fail where one of several sources does; what matters is whether the packages are to be had.
    _run(["apt-get", "-qy", "update"], configuration, check=False)
    # Also those that are installed: whoever asks for a program finds it in the tree, and may change it there.
    _run(["apt-get", "-qqy", "install", "--reinstall", "--download-only", *packages], configuration)
    return sorted((work / "archives").glob("*.deb"))


def _run(command: Sequence[str], configuration: Path | None = None, *, check: bool = True) -> str:
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    if configuration is not None:
        environment["APT_CONFIG"] = str(configuration)
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_APT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise PackagesError(f"{command[0]} did not end in {_APT_SECONDS:.0f} s") from error
    if done.returncode and check:
        complaints = [line for line in done.stderr.splitlines() if line.startswith("E:")] or [f"exit {done.returncode}"]
        raise PackagesError(f"{command[0]}: {complaints[0].removeprefix('E: ')}")
    return done.stdout
