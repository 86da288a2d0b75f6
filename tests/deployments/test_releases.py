"""From one release to the next, and from one cluster to another, on a real server with real workers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import httpx
import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkQueueUpdate
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from infra.aws.cluster import DEVELOPMENT, pools_toml
from infra.prefect_server.process import database_of, prepare_database
from tests.infra.releases import copy_checkout
from tests.waiting import eventually

pytestmark = pytest.mark.infra

#: Stands in for a flow of each release: says what it runs on when it starts, and again when it may end.
FLOW: Final = """
import json, os, sys, time
from pathlib import Path
from typing import Any
from prefect import flow

VERSION = "{version}"

def note(folder: str, when: str, module: Any) -> None:
    facts = dict(version=VERSION, python=sys.executable, code=module.__file__, worker=os.getppid())
    path = Path(folder, when)
    path.with_suffix(".partial").write_text(json.dumps(facts))
    path.with_suffix(".partial").rename(path)

@flow(name="preview")
def preview(notes: str, options: Any = None) -> None:
    import tasks.errors
    note(notes, "start", tasks.errors)
    while not Path(notes, "end here").exists():
        time.sleep(0.1)
    import tasks.place  # Not read before now, as much of a long run is not.
    note(notes, "end", tasks.place)
"""


@dataclass(frozen=True)
class Release:
    """A release as it lies on the shared file system.

    Attributes:
        folder: Where.
        environment: What reaches the server from there.
    """

    folder: Path
    environment: dict[str, str]

    @property
    def python(self) -> Path:
        return self.folder / ".venv/bin/python"

    def register(self, queue: str) -> None:
        """Register its deployments, as on a login node."""
        node = self.folder.parents[2]
        script = self.folder / "infra/aws/cluster/bootstrap/register.sh"
        done = subprocess.run(
            [script, self.folder.name, queue],
            env={**os.environ, "SUPERRES_ROOT": str(node)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    @contextlib.contextmanager
    def worker(self, queue: str, log: Path) -> Iterator[int]:
        """Run its worker, as on a login node; yields its process."""
        command = [self.python, "-m", "prefect", "worker", "start", "--pool", "slurm", "--work-queue", queue]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=output, stderr=output, process_group=0
            )
        try:
            eventually(lambda: b"started!" in log.read_bytes(), 60)
            yield process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server as its unit starts it: the private one has no use for queues that are paused, and hangs over them.

    Yields:
        What reaches it, as variables.
    """
    home = tmp_path_factory.mktemp("server")
    prepare_database(home, database := database_of(home))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    reach = {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_API_AUTH_STRING": "superres:secret",
    }
    serve = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{database}",
        "PREFECT_SERVER_API_AUTH_STRING": reach["PREFECT_API_AUTH_STRING"],
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env={**kept, **reach, **serve}, stdout=log, stderr=log)

    def answers() -> bool:
        assert process.poll() is None, (home / "server.log").read_text()
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{reach['PREFECT_API_URL']}/health", timeout=5).is_success
        return False

    try:
        eventually(answers, 120)
        settings = {
            PREFECT_API_URL: reach["PREFECT_API_URL"],
            PREFECT_API_AUTH_STRING: reach["PREFECT_API_AUTH_STRING"],
        }
        with temporary_settings(updates=settings):
            yield reach
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


@pytest.fixture(scope="module")
def releases(server: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Release, Release]:
    """Two releases that differ in a flow."""
    node = tmp_path_factory.mktemp("node")
    folder = node / "fsx/envs"
    settings = node / "etc/superres"
    settings.mkdir(parents=True)
    # With a folder of another release, as it is on a login node whose worker is of one.
    lines = [f"{name}={value}" for name, value in {**server, "PYTHONPATH": "/opt/superres"}.items()]
    (settings / "environment").write_text("# Of the worker\n" + "\n".join(lines) + "\n")
    (settings / "blocks.toml").write_text(pools_toml(DEVELOPMENT))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    found: list[Release] = []
    for version in ("1.0.0", "2.0.0"):
        if found:
            shutil.copytree(found[0].folder, folder / version, symlinks=True)
        else:
            copy_checkout(folder / version)
            subprocess.run(["sh", folder / version / "deployments/environment.sh"], check=True)
            described = yaml.safe_load((folder / version / "prefect.yaml").read_text())
            # As described but for the hour, which nobody knows here.
            described["deployments"] = [
                {key: value for key, value in each.items() if key != "schedules"}
                for each in described["deployments"]
                if each["entrypoint"].startswith("flows/preview") and each["name"] == "slurm"
            ]
            (folder / version / "prefect.yaml").write_text(yaml.safe_dump(described))
            (folder / version / ".complete").touch()
        (folder / version / "flows/preview.py").write_text(FLOW.format(version=version))
        environment = {
            **kept,
            **server,
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PYTHONPATH": str(folder / version),
        }
        found.append(Release(folder / version, environment))
    return found[0], found[1]


@dataclass(frozen=True)
class Run:
    """A run that goes on until it may end.

    Attributes:
        id: Its id.
        notes: Where it says what it runs on.
    """

    id: UUID
    notes: Path

    def says(self, when: str) -> dict[str, Any]:
        """What it said at its `start` or `end`, once it has."""
        eventually(lambda: (self.notes / when).exists(), 60)
        found: dict[str, Any] = json.loads((self.notes / when).read_text())
        return found

    def end(self) -> None:
        (self.notes / "end here").touch()

    @property
    def state(self) -> str:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(self.id).state
        return state.name if state else ""


def start(notes: Path) -> Run:
    notes.mkdir()
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("preview/slurm")
        run = client.create_flow_run_from_deployment(deployment.id, parameters={"notes": str(notes)})
    return Run(run.id, notes)


def pause(queue: str, paused: bool) -> None:
    with get_client(sync_client=True) as client:
        found = client.read_work_queue_by_name(queue, work_pool_name="slurm")
        client.update_work_queue(found.id, **WorkQueueUpdate(is_paused=paused).model_dump(exclude_unset=True))


def is_of(said: dict[str, Any], release: Release) -> bool:
    """Whether a run said that version, interpreter and code are those of a release."""
    assert (said["version"] == release.folder.name) == (said["python"] == str(release.python))
    assert (said["version"] == release.folder.name) == Path(said["code"]).is_relative_to(release.folder)
    return bool(said["version"] == release.folder.name)


def test_runs_keep_their_release_and_clusters_take_turns(releases: tuple[Release, Release], tmp_path: Path) -> None:
    old, new = releases
    old.register("slurm-a")
    with (
        old.worker("slurm-a", tmp_path / "a.log") as cluster_a,
        new.worker("slurm-b", tmp_path / "b.log") as cluster_b,
    ):
        first = start(tmp_path / "first")
        assert is_of(first.says("start"), old)
        assert first.says("start")["worker"] == cluster_a

        # A new release on another cluster, with a run under way on the first and another one that waits for it.
        pause("slurm-a", True)
        waits = start(tmp_path / "waits")
        new.register("slurm-b")
        second = start(tmp_path / "second")
        assert is_of(second.says("start"), new)
        assert second.says("start")["worker"] == cluster_b != cluster_a
        first.end()
        assert is_of(first.says("end"), old)
        second.end()
        assert is_of(second.says("end"), new)
        eventually(lambda: (first.state, second.state) == ("Completed", "Completed"))
        assert not (waits.notes / "start").exists()
        assert waits.state in ("Scheduled", "Late")

        # What waited for the first cluster is not lost: its worker starts it, all of it of the new release.
        pause("slurm-a", False)
        assert waits.says("start")["worker"] == cluster_a
        waits.end()
        assert is_of(waits.says("start"), new) and is_of(waits.says("end"), new)
        eventually(lambda: waits.state == "Completed")
