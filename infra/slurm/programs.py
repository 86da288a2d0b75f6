"""The programs of Slurm: those of this machine, or else unpacked Debian packages in a folder of the user.

`Programs.environment` makes them work from there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from infra import debian
from infra.slurm.errors import SlurmMissingError

#: What a cluster needs, by the names that `Programs` has for them.
_NAMES: Final = ("sbatch", "scancel", "squeue", "sinfo", "scontrol", "slurmctld", "slurmd", "slurmstepd", "munged")

#: Debian packages that carry them. What these need is up to apt.
_PACKAGES: Final = ("slurm-client", "slurmctld", "slurmd", "slurm-wlm-basic-plugins", "munge")

#: Folders of daemons, which the PATH of a plain user lacks.
_DAEMON_FOLDERS: Final = ("/usr/local/sbin", "/usr/sbin", "/sbin")


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
    unpacked = cache / debian.release()
    if found := _look_in(unpacked, cache):
        return found
    try:
        with debian.locked(cache):
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
    """Where unpacked packages are kept."""
    return debian.cache_folder("slurm")


def _look_in(unpacked: Path | None, cache: Path) -> Programs | None:
    """The programs in a folder of unpacked packages and, for what was not missing there, on this machine."""
    folders: tuple[Path, ...] = ()
    plugin_folders: list[Path] = []
    if unpacked is not None:
        folders = tuple(folder for folder in (unpacked / "usr/bin", unpacked / "usr/sbin") if folder.is_dir())
        plugin_folders = sorted(unpacked.glob("usr/lib/*/slurm-wlm"))
    # A process that uses a cluster of this package has the unpacked programs on its PATH, which may be those of another
    # user who started it: they are not this machine's.
    usual = default_cache().parts[-2:]
    own = [
        folder
        for folder in os.environ.get("PATH", os.defpath).split(os.pathsep)
        if not any(parent == cache or parent.parts[-2:] == usual for parent in Path(folder).parents)
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

    def name_as_installed(tree: Path) -> None:
        # Debian adds these names when it installs: the packages have `slurmctld-wlm` and so on. Called by those names,
        # the daemons start and then ignore parts of their configuration.
        for program in [*tree.glob("usr/bin/*-wlm"), *tree.glob("usr/sbin/*-wlm")]:
            program.with_name(program.name.removesuffix("-wlm")).symlink_to(program.name)

    try:
        debian.fetch(_PACKAGES, target, name_as_installed)
    except debian.PackagesError as error:
        raise SlurmMissingError(
            f"Slurm is not installed, and could not be fetched ({error})",
            _remedy("or let this machine reach its package sources"),
        ) from error


def _remedy(otherwise: str = "") -> str:
    return f"Install Slurm and munge (Debian: apt-get install {' '.join(_PACKAGES)}) {otherwise}".rstrip()


def _in_front(folders: Sequence[Path], path: str) -> str:
    wanted = [str(folder) for folder in folders]
    return os.pathsep.join([*wanted, *(entry for entry in path.split(os.pathsep) if entry and entry not in wanted)])
