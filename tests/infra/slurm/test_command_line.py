"""`python -m infra.slurm`, also as a plain user, and the fixture that other tests share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from infra.slurm import Programs
from infra.slurm.programs import default_cache

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.slurm


def run(*arguments: str, home: Path, prefix: tuple[str, ...] = (sys.executable,)) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SUPERRES_HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [*prefix, "-m", "infra.slurm", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


class TestCommands:
    def test_up_status_env_down(self, slurm_programs: Programs, tmp_path: Path) -> None:
        up = run("up", home=tmp_path)
        try:
            assert up.returncode == 0, up.stderr
            assert "cpu-1, cpu-2, gpu-1, gpu-2" in up.stderr
            assert f"export SLURM_CONF={tmp_path}/slurm/slurm.conf" in up.stdout.splitlines()
            assert run("env", home=tmp_path).stdout == up.stdout
            # What a user does with it.
            job = "sbatch --parsable --chdir=/tmp --output=/dev/null --job-name=mine --wrap 'sleep 60'"
            submitted = subprocess.run(["sh", "-c", f'eval "$0"; {job}', up.stdout], capture_output=True, text=True)
            assert submitted.stdout.strip() == "1", submitted.stderr
            status = run("status", home=tmp_path).stdout
            assert "cpu*" in status
            assert "mine" in status
            again = run("up", home=tmp_path)
            assert (again.returncode, again.stdout) == (13, "")
            assert again.stderr.startswith("error: a Slurm already runs in")
        finally:
            down = run("down", home=tmp_path)
        assert (down.returncode, down.stdout, down.stderr) == (0, "", "")

    @pytest.mark.parametrize("command", ["down", "status", "env"])
    def test_nothing_runs(self, tmp_path: Path, command: str) -> None:
        done = run(command, home=tmp_path)
        assert (done.returncode, done.stdout) == (13, "")
        assert done.stderr == f"error: no Slurm runs in {tmp_path}/slurm. Start one with: python -m infra.slurm up.\n"

    def test_folder(self, tmp_path: Path) -> None:
        (tmp_path / "film.mkv").touch()
        done = run("up", "--folder", str(tmp_path), home=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "holds other things" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="all of these tests run as a plain user already")
def test_a_plain_user(slurm_programs: Programs) -> None:
    as_nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin") or "python3"
    # The interpreter of the tests may lie in root's own folders.
    version = "import sys, infra.slurm; sys.exit(sys.version_info < (3, 11))"
    able = subprocess.run([*as_nobody, python, "-B", "-c", version], cwd=ROOT, capture_output=True, text=True)
    if able.returncode:
        pytest.skip("no Python for plain users can import this project")
    # Not in a folder of pytest: those are for their owner only.
    home = Path("/tmp", f"superres-nobody-{os.getpid()}")
    home.mkdir()
    try:
        cache = home / "cache"
        if slurm_programs.plugins is not None:  # Spare it the download.
            shutil.copytree(default_cache(), cache / "media-super-resolution/slurm", symlinks=True)
        subprocess.run(["chown", "--recursive", "65534:65534", str(home)], check=True)
        prefix = (*as_nobody, "env", f"HOME={home}", f"XDG_CACHE_HOME={cache}", python)
        up = run("up", home=home, prefix=prefix)
        try:
            assert up.returncode == 0, up.stderr
            script = (
                f'cd {home}; eval "$0"; sbatch --wait --output=out --partition=gpu --gres=gpu:1 --wrap "id -u; sleep 1"'
            )
            job = [*as_nobody, "sh", "-c", script, up.stdout]
            done = subprocess.run(job, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            assert (home / "out").read_text() == "65534\n"
        finally:
            down = run("down", home=home, prefix=prefix)
        assert down.returncode == 0, down.stderr
    finally:
        shutil.rmtree(home)


class TestSharedFixture:
    TEST = """
        import os, subprocess
        from tests.infra.slurm_cluster import slurm

        def test_it(slurm):
            assert os.environ["SLURM_CONF"] == str(slurm.folder / "slurm.conf")
            assert "SBATCH_PARTITION" not in os.environ
            subprocess.run(["sinfo"], check=True)
    """

    def pytest(self, folder: Path, **variables: str) -> str:
        file = folder / "test_shared.py"
        file.write_text(textwrap.dedent(self.TEST))
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={ROOT}", "-c"]
        done = subprocess.run(
            [*command, str(ROOT / "pyproject.toml"), str(file)],
            cwd=ROOT,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def test_processes_use_it(self, slurm_programs: Programs, tmp_path: Path) -> None:
        assert "1 passed" in self.pytest(tmp_path, SBATCH_PARTITION="elsewhere")

    def test_without_slurm_tests_are_skipped_with_the_reason(self, tmp_path: Path) -> None:
        output = self.pytest(tmp_path, PATH="/nonexistent", XDG_CACHE_HOME=str(tmp_path))
        assert "1 skipped" in output
        assert "this machine has no apt to fetch it with" in output
