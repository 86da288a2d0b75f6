"""The programs of Slurm: those of this machine, or else unpacked Debian packages in a folder of the user.

Nothing is installed into the system and no privilege is needed: apt runs with lists, caches and locks of its own, takes
from the sources that the machine is set up with, checks signatures and hashes, and picks exactly the packages that the
machine lacks. They are unpacked beside each other; `Programs.environment` makes them work from there.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from infra.slurm.errors import SlurmMissingError

#: What a cluster needs, by the names that `Programs` has for them.
_NAMES: Final = ("sbatch", "scancel", "squeue", "sinfo", "scontrol", "slurmctld", "slurmd", "slurmstepd", "munged")

#: Debian packages that carry them. What these need is up to apt.
_PACKAGES: Final = ("slurm-client", "slurmctld", "slurmd", "slurm-wlm-basic-plugins", "munge")

#: Folders of daemons, which the PATH of a plain user lacks.
_DAEMON_FOLDERS: Final = ("/usr/local/sbin", "/usr/sbin", "/sbin")

_APT_SECONDS: Final = 600.0


@dataclass(frozen=True)
class Programs:
    """Where the programs of Slurm are, and what they need to run there.

    Attributes:
        plugins: Slurm's plugin folder where it is not the built-in one.
        folders: Folders to put in front of PATH.
        libraries: Folders to put in front of LD_LIBRARY_PATH.
    """

    sbatch: Path
    scancel: Path
    squeue: Path
    sinfo: Path
    scontrol: Path
    slurmctld: Path
    slurmd: Path
    slurmstepd: Path
    munged: Path
    plugins: Path | None = None
    folders: tuple[Path, ...] = ()
    libraries: tuple[Path, ...] = ()

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """Variables to set on top of `base`, so that these programs are found and find their libraries."""
        wanted = {"PATH": self.folders, "LD_LIBRARY_PATH": self.libraries}
        return {name: _in_front(folders, base.get(name, "")) for name, folders in wanted.items() if folders}


def find_programs(cache: Path | None = None) -> Programs:
    """Find the programs on this machine, or fetch and unpack them once.

    Args:
        cache: Folder that keeps unpacked packages; `~/.cache/media-super-resolution/slurm` by default.

    Raises:
        SlurmMissingError: They are neither here nor to be had.
    """
    # All from one place: clients and daemons of different releases do not talk to each other.
    cache = default_cache() if cache is None else cache
    if installed := _look_in(None, cache):
        return installed
    unpacked = cache / _release()
    if found := _look_in(unpacked, cache):
        return found
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (found := _look_in(unpacked, cache)):  # Another process may have been first.
                _fetch(unpacked)
                found = _look_in(unpacked, cache)
    except OSError as error:
        raise SlurmMissingError(
            f"Slurm is not installed and could not be unpacked ({error})", _remedy("or set XDG_CACHE_HOME")
        ) from error
    if found is None:
        raise SlurmMissingError(f"the packages unpacked in {unpacked} lack a program of Slurm", _remedy())
    return found


def default_cache() -> Path:
    """Where unpacked packages are kept: below `$XDG_CACHE_HOME`, or `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "media-super-resolution" / "slurm"


def _look_in(unpacked: Path | None, cache: Path) -> Programs | None:
    """The programs in a folder of unpacked packages and, for what was not missing there, on this machine."""
    folders: tuple[Path, ...] = ()
    plugin_folders: list[Path] = []
    if unpacked is not None:
        folders = tuple(folder for folder in (unpacked / "usr/bin", unpacked / "usr/sbin") if folder.is_dir())
        plugin_folders = sorted(unpacked.glob("usr/lib/*/slurm-wlm"))
    # A process that uses a cluster of this package has the unpacked programs on its PATH: they are not this machine's.
    own = [
        folder for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if cache not in Path(folder).parents
    ]
    path = os.pathsep.join([*map(str, folders), *own, *_DAEMON_FOLDERS])
    # Links are not followed: Slurm's daemons look at the name they are called by.
    found = {name: Path(where) for name in _NAMES if (where := shutil.which(name, path=path))}
    if len(found) < len(_NAMES):
        return None
    libraries = [*plugin_folders, *(sorted(unpacked.glob("usr/lib/*-linux-*")) if unpacked else [])]
    return Programs(
        **found,
        plugins=plugin_folders[0] if plugin_folders else None,
        folders=folders,
        libraries=tuple(libraries),
    )


def _fetch(target: Path) -> None:
    """Download and unpack the packages; the folder appears when it is complete."""
    if not (shutil.which("apt-get") and shutil.which("apt-config") and shutil.which("dpkg-deb")):
        raise SlurmMissingError("Slurm is not installed, and this machine has no apt to fetch it with", _remedy())
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as name:
        work = Path(name)
        packages = _download(work)
        tree = work / "tree"
        for package in packages:
            _apt(["dpkg-deb", "--extract", str(package), str(tree)])
        # Debian adds these names when it installs: the packages have `slurmctld-wlm` and so on. Called by those names,
        # the daemons start and then ignore parts of their configuration.
        for program in [*tree.glob("usr/bin/*-wlm"), *tree.glob("usr/sbin/*-wlm")]:
            program.with_name(program.name.removesuffix("-wlm")).symlink_to(program.name)
        tree.chmod(0o755)  # The folder of an mkdtemp is for its owner only; jobs of others may run these programs.
        shutil.rmtree(target, ignore_errors=True)  # Left from before a package was removed from the system.
        tree.rename(target)


def _download(work: Path) -> list[Path]:
    """Download all packages that this machine lacks, with an apt that leaves the machine's own apt alone."""
    for folder in ("lists/partial", "archives/partial"):
        (work / folder).mkdir(parents=True)
    # The machine's settings (proxies, certificates, checks), without hooks that would act on the system, and without
    # additional indexes that nothing here reads.
    machine = _apt(["apt-config", "dump"]).splitlines()
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
    _apt(["apt-get", "-qy", "update"], configuration, check=False)
    _apt(["apt-get", "-qqy", "install", "--download-only", *_PACKAGES], configuration)
    return sorted((work / "archives").glob("*.deb"))


def _apt(command: Sequence[str], configuration: Path | None = None, *, check: bool = True) -> str:
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    if configuration is not None:
        environment["APT_CONFIG"] = str(configuration)
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_APT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise SlurmMissingError(
            f"Slurm is not installed, and {command[0]} did not end in {_APT_SECONDS:.0f} s", _remedy()
        ) from error
    if done.returncode and check:
        complaints = [line for line in done.stderr.splitlines() if line.startswith("E:")] or [f"exit {done.returncode}"]
        raise SlurmMissingError(
            f"Slurm is not installed, and could not be fetched ({command[0]}: {complaints[0].removeprefix('E: ')})",
            _remedy("or let this machine reach its package sources"),
        )
    return done.stdout


def _remedy(otherwise: str = "") -> str:
    return f"Install Slurm and munge (Debian: apt-get install {' '.join(_PACKAGES)}) {otherwise}".rstrip()


def _release() -> str:
    """Packages unpacked on one release of a distribution are not for another, say after an upgrade."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    parts = (release.get("ID", "linux"), release.get("VERSION_ID", ""), platform.machine())
    return "-".join(part for part in parts if part)


def _in_front(folders: Sequence[Path], path: str) -> str:
    wanted = [str(folder) for folder in folders]
    return os.pathsep.join([*wanted, *(entry for entry in path.split(os.pathsep) if entry and entry not in wanted)])
