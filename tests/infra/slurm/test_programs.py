"""Where the programs come from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from infra import debian
from infra.slurm import Programs, SlurmMissingError, find_programs, programs

NAMES = ("sbatch", "scancel", "squeue", "sinfo", "scontrol", "slurmctld", "slurmd", "slurmstepd", "munged")


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH without any program; the folder it consists of."""
    folder = tmp_path / "path"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(programs, "_DAEMON_FOLDERS", ())
    return folder


def program(path: Path, script: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


class TestInstalled:
    def test_programs_of_the_machine_come_first(self, nothing_installed: Path, tmp_path: Path) -> None:
        for name in NAMES:
            program(nothing_installed / name)
        found = find_programs(tmp_path / "cache")
        assert found.sbatch == nothing_installed / "sbatch"
        assert (found.plugins, found.environment(os.environ)) == (None, {})
        assert not (tmp_path / "cache").exists()

    def test_links_are_not_followed(self, nothing_installed: Path, tmp_path: Path) -> None:
        for name in NAMES:
            program(tmp_path / "elsewhere" / f"{name}-wlm")
            (nothing_installed / name).symlink_to(tmp_path / "elsewhere" / f"{name}-wlm")
        assert find_programs().slurmctld == nothing_installed / "slurmctld"


class TestUnpacked:
    @pytest.fixture
    def cache(self, nothing_installed: Path, tmp_path: Path) -> Path:
        tree = tmp_path / "cache" / debian.release()
        for name in NAMES[:-1]:
            program(tree / "usr" / "bin" / name)
        (tree / "usr/lib/x86_64-linux-gnu/slurm-wlm").mkdir(parents=True)
        program(nothing_installed / "munged")  # This much the machine had already.
        program(nothing_installed / "sbatch")  # This also, but without the rest it is of no use.
        return tree.parent

    def test_unpacked_programs_find_each_other(self, cache: Path) -> None:
        found = find_programs(cache)
        tree = cache / debian.release()
        libraries = tree / "usr/lib/x86_64-linux-gnu"
        assert (found.sbatch, found.plugins) == (tree / "usr/bin/sbatch", libraries / "slurm-wlm")
        assert found.environment({"PATH": "/bin", "LD_LIBRARY_PATH": "/lib"}) == {
            "PATH": f"{tree}/usr/bin:/bin",
            "LD_LIBRARY_PATH": f"{libraries}/slurm-wlm:{libraries}:/lib",
        }

    def test_those_that_another_user_unpacked_are_not_the_machines(
        self, cache: Path, nothing_installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        theirs = tmp_path / "them/.cache/media-super-resolution/slurm/debian-12-x86_64/usr/bin"
        for name in NAMES:
            program(theirs / name)
        monkeypatch.setenv("PATH", f"{theirs}{os.pathsep}{nothing_installed}")
        assert find_programs(cache).sbatch == cache / debian.release() / "usr/bin/sbatch"

    def test_environment_does_not_grow(self, cache: Path) -> None:
        found = find_programs(cache)
        once = found.environment({"PATH": "/bin"})
        assert found.environment(once) == once

    def test_default_cache(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
        assert programs.default_cache() == Path("/cache/media-super-resolution/slurm")


class TestMissing:
    def test_without_apt(self, nothing_installed: Path, tmp_path: Path) -> None:
        with pytest.raises(SlurmMissingError, match=r"has no apt to fetch it with.* Install Slurm and munge"):
            find_programs(tmp_path / "cache")

    def test_where_apt_finds_nothing(self, nothing_installed: Path, tmp_path: Path) -> None:
        program(nothing_installed / "apt-config")
        program(nothing_installed / "dpkg-deb")
        program(nothing_installed / "apt-get", "echo 'E: Unable to locate package slurmd' >&2; exit 100")
        with pytest.raises(SlurmMissingError, match=r"apt-get: Unable to locate package slurmd.* reach its package"):
            find_programs(tmp_path / "cache")
        assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["lock"]

    def test_where_the_cache_cannot_be_written(self, nothing_installed: Path, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("a file")
        with pytest.raises(SlurmMissingError, match=r"could not be unpacked .* XDG_CACHE_HOME"):
            find_programs(tmp_path / "cache")


@pytest.mark.slurm
def test_fetching_leaves_the_system_alone(slurm_programs: Programs, tmp_path: Path) -> None:
    if slurm_programs.plugins is None:
        pytest.skip("Slurm is installed here: there is nothing to fetch")
    folders = [Path("/var/lib/apt"), Path("/var/lib/apt/lists"), Path("/var/cache/apt"), Path("/var/lib/dpkg")]
    before = [folder.stat().st_mtime_ns for folder in folders if folder.is_dir()]
    try:
        programs._fetch(tmp_path / "unpacked")
    except SlurmMissingError as error:
        pytest.skip(str(error))  # Fetched earlier; now without network.
    assert [entry.name for entry in tmp_path.iterdir()] == ["unpacked"]
    assert (tmp_path / "unpacked/usr/sbin/slurmctld").readlink() == Path("slurmctld-wlm")
    assert [folder.stat().st_mtime_ns for folder in folders if folder.is_dir()] == before
