"""Twenty runs at once on one Prefect server, as it keeps its data in SQLite and in PostgreSQL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import httpx
import pytest

from tests.flows.libraries import make_clip
from tests.ports import free_port
from tests.postgres import running_postgres
from tests.waiting import eventually

RUNS: Final = 20

#: Seconds in which a server that is busy, and not stuck, answers.
ANSWER: Final = 30.0


@contextmanager
def running_server(folder: Path, database: str) -> Iterator[tuple[str, Path]]:
    """A whole server, with all its services, as an administrator starts it; gives its address and its log."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {
        "PREFECT_HOME": str(folder),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    command = [sys.executable, "-m", "infra.prefect_server", "start", "--host", "127.0.0.1", "--port", str(port)]
    log = folder / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}/api"

    def answers() -> bool:
        assert server.poll() is None, log.read_text()
        try:
            return httpx.get(f"{url}/health", timeout=5).is_success
        except httpx.HTTPError:
            return False

    try:
        eventually(answers, 180)
        yield url, log
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    with ExitStack() as stack:
        url = f"sqlite+aiosqlite:///{tmp_path}/prefect.db"
        if request.param == "PostgreSQL":
            url = stack.enter_context(running_postgres())
        yield stack.enter_context(running_server(tmp_path, url))


def test_twenty_runs_at_once_complete_and_the_server_goes_on_answering(
    server: tuple[str, Path], tmp_path: Path
) -> None:
    url, log = server
    for number in range(RUNS):
        make_clip(tmp_path / "videos" / f"{number}.mp4", number)
    places = [str(tmp_path / "videos"), str(tmp_path / "out"), "--scratch", str(tmp_path / "scratch")]
    # A process of its own: one that has talked to another server goes on asking that for slots.
    sweep = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "library", *places, "--parallel", str(RUNS), "--json"],
        env={**os.environ, "PREFECT_API_URL": url, "SUPERRES_HOME": str(tmp_path / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with httpx.Client(base_url=url, timeout=ANSWER) as client:
        while sweep.poll() is None:
            client.post("/flow_runs/filter", json={"limit": 50}).raise_for_status()
            time.sleep(0.2)
        runs = client.post("/flow_runs/filter", json={"limit": 50}).json()
    said, complaints = sweep.communicate()
    assert sweep.returncode == 0, f"{complaints}\n{said}"
    assert Counter(row["outcome"] for row in json.loads(said.splitlines()[-1])["rows"]) == {"published": RUNS}
    assert len(list((tmp_path / "out").iterdir())) == RUNS
    videos = [run for run in runs if run["parent_task_run_id"]]
    assert Counter(run["state_name"] for run in videos) == {"Completed": RUNS}
    # Most were under way at one time: the first one is done before the last one begins.
    assert (
        max(sum(other["start_time"] < run["start_time"] < other["end_time"] for other in videos) for run in videos)
        > RUNS // 2
    )
    written = log.read_text()
    assert "database is locked" not in written
    assert "Traceback" not in written
