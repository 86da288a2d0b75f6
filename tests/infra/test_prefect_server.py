"""The private Prefect server: found, started, shared, recorded to, ended."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.prefect_server import Api, ApiError, configured_url, default_home, ensure_api
from infra.prefect_server import process as server_process
from tests.infra.test_pools import alive
from tests.waiting import eventually


@pytest.fixture(autouse=True)
def unconfigured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No API but what a test configures."""
    for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "no-prefect"))


class TestConfiguredApi:
    def test_nothing_is_configured(self) -> None:
        assert configured_url() is None

    def test_environment_comes_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PREFECT_API_URL", "http://there/api")
        assert configured_url() == "http://there/api"

    def test_active_profile(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
        (tmp_path / "profiles.toml").write_text(
            'active = "site"\n[profiles.site]\nPREFECT_API_URL = "http://site/api"\n[profiles.empty]\n'
        )
        assert configured_url() == "http://site/api"
        monkeypatch.setenv("PREFECT_PROFILE", "empty")
        assert configured_url() is None

    def test_project_file(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "prefect.toml").write_text('[api]\nurl = "http://project/api"\n')
        assert configured_url() == "http://project/api"

    def test_a_configured_server_is_used_and_left_alone(
        self, prefect_api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert prefect_api.url is not None
        monkeypatch.setenv("PREFECT_API_URL", prefect_api.url)
        with ensure_api() as api:
            assert (api.url, api.private) == (prefect_api.url, False)
        assert answers(prefect_api.url)

    def test_a_configured_server_that_does_not_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("infra.prefect_server.ANSWER_TIMEOUT", 0.1)
        monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
        with pytest.raises(ApiError, match=r"127\.0\.0\.1:9.*unset it"), ensure_api():
            pass

    def test_home_follows_the_environment(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("SUPERRES_HOME", str(tmp_path))
        assert default_home() == tmp_path


def answers(url: str) -> bool:
    """Whether a server answers there."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False


RECORD = """
from prefect import flow, task
from infra.prefect_server import ensure_api

@task
def stage(index):
    return index

@flow
def job():
    print(sum(stage(index) for index in range(5)))

with ensure_api(home={home!r}) as api:
    job()
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run a program in the root of the project."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PREFECT_LOGGING_LEVEL": "WARNING"},
        capture_output=True,
        text=True,
        timeout=120,
    )


class TestPrivateServer:
    def test_what_a_run_did_is_written_down_when_it_ends(self, tmp_path: Path) -> None:
        done = python(RECORD.format(home=str(tmp_path)))
        assert (done.returncode, done.stdout, done.stderr) == (0, "10\n", "")
        (database,) = tmp_path.glob("prefect-*.db")
        with contextlib.closing(sqlite3.connect(database)) as connection:
            assert connection.execute("SELECT state_name FROM flow_run").fetchall() == [("Completed",)]
            assert connection.execute("SELECT state_name FROM task_run").fetchall() == [("Completed",)] * 5
            (logs,) = connection.execute("SELECT count(*) FROM log").fetchone()
        assert logs == 0  # Level WARNING: nothing to say.
        assert (tmp_path / "server.log").read_text() == ""

    def test_a_password_is_needed(self, prefect_api: Api) -> None:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{prefect_api.url}/flows/count", data=b"{}", timeout=10)

    def test_private_home_and_restored_environment(self, tmp_path: Path) -> None:
        with ensure_api(home=tmp_path / "home") as api:
            assert os.environ["PREFECT_API_URL"] == api.url
            assert (tmp_path / "home").stat().st_mode & 0o077 == 0
        assert "PREFECT_API_URL" not in os.environ

    def test_start_returns_at_once_and_names_the_address(self, tmp_path: Path) -> None:
        began = time.monotonic()
        api = ensure_api(home=tmp_path).start()
        took = time.monotonic() - began
        try:
            assert took < 1
            assert api.url is not None
            assert api.url.startswith("http://127.0.0.1:")
        finally:
            api.stop()

    def test_a_server_that_cannot_start(self, tmp_path: Path) -> None:
        (tmp_path / "database.lock").mkdir()
        with pytest.raises(ApiError, match="ended while starting"), ensure_api(home=tmp_path):
            pass

    def test_ends_with_the_process_that_needs_it(self, tmp_path: Path) -> None:
        code = (
            "import time\nfrom infra.prefect_server import ensure_api\n"
            f"api = ensure_api(home={str(tmp_path)!r}).start()\napi.wait()\n"
            "print(api._process.pid, flush=True)\ntime.sleep(600)\n"
        )
        program = subprocess.Popen(
            [sys.executable, "-c", code], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True
        )
        assert program.stdout is not None
        server = int(program.stdout.readline())
        program.send_signal(signal.SIGKILL)
        program.wait()
        eventually(lambda: not alive(server), 10)


class TestDatabase:
    @pytest.fixture
    def shipped(self) -> Iterator[Path]:
        version = server_process.importlib.metadata.version("prefect")
        yield Path(server_process.__file__).parent / "schema" / f"prefect-{version}.sql"

    def test_schema_is_shipped_for_the_installed_prefect(self, shipped: Path) -> None:
        assert shipped.exists(), "run infra/prefect_server/process.py --write-schema"

    def test_made_once_and_by_a_rename(self, tmp_path: Path, shipped: Path) -> None:
        database = tmp_path / f"{shipped.stem}.db"
        database.with_suffix(".draft").write_bytes(b"left behind by a process that was killed")
        server_process.prepare_database(tmp_path, database)
        made = database.stat().st_ino
        server_process.prepare_database(tmp_path, database)
        assert database.stat().st_ino == made
        assert not list(tmp_path.glob("*.draft*"))
        assert server_process.schema_of(database) == shipped.read_text().partition("\n\n")[2]

    @pytest.mark.chaos
    def test_shipped_schema_is_what_migrations_make(self, shipped: Path, tmp_path: Path) -> None:
        code = (
            "from pathlib import Path\nfrom infra.prefect_server import process\n"
            f"process.migrate(Path({str(tmp_path / 'm.db')!r}))\n"
            f"print(process.schema_of(Path({str(tmp_path / 'm.db')!r})), end='')\n"
        )
        done = python(code)
        assert done.returncode == 0, done.stderr

        # The order of constraints within a table differs from run to run.
        def lines(sql: str) -> list[str]:
            return sorted(line.strip().rstrip(",") for line in sql.splitlines())

        assert lines(shipped.read_text().partition("\n\n")[2]) == lines(done.stdout)
