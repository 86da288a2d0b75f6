"""An installation as an operator has it: a Prefect server, a worker, and a deployment of `upscale-video`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.upscale_video import upscale_video
from tasks.ledger import LedgerSettings, open_ledger
from tasks.ledger.ledger import Ledger
from tasks.ledger.record import JobRecord, JobState
from tests.flows.jobs import PATIENCE
from tests.waiting import eventually

CHECKOUT = Path(__file__).resolve().parents[2]
POOL = "local"


@dataclass
class Deployed:
    """A deployment of `upscale-video` that a worker serves, and the ledger of its runs."""

    id: UUID
    folder: Path
    film: Path
    ledger: Ledger

    def start(self, name: str, **options: Any) -> UUID:
        """Start a run that makes the result `name`; gives its id."""
        parameters = {
            "source": str(self.film),
            "destination": str(self.folder / name),
            "options": {"scratch": str(self.folder / "scratch"), "owner": "ann", **options},
        }
        with get_client(sync_client=True) as client:
            return client.create_flow_run_from_deployment(self.id, parameters=parameters).id

    def record(self, run: UUID) -> JobRecord | None:
        return next((record for record in self.ledger.by_owner("ann") if record.flow_run_id == str(run)), None)

    def await_state(self, run: UUID, *states: JobState) -> JobRecord:
        """Wait until the job of a run has reached one of these states."""

        def reached() -> JobRecord | None:
            record = self.record(run)
            assert record is None or not record.ended or record.state in states, record.error
            return record if record is not None and record.state in states else None

        found = eventually(reached, PATIENCE / 2)
        assert isinstance(found, JobRecord)
        return found


@contextmanager
def installed(folder: Path, film: Path) -> Iterator[Deployed]:
    """A whole installation on this machine, with records of its own.

    Args:
        folder: Where it keeps everything.
        film: What its runs upscale.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUPERRES_HOME", str(folder / "home"))
        patch.setenv("PREFECT_HOME", str(folder / "profile"))
        patch.setenv("PYTHONPATH", str(CHECKOUT))
        # A whole server, as an installation has: it also tells workers of cancellations.
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        patch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{port}/api")
        patch.delenv("PREFECT_API_AUTH_STRING", raising=False)  # Of the server that other tests share.
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        with ExitStack() as running:
            running.enter_context(_prefect(folder, "server", "start", "--host", "127.0.0.1", "--port", port))
            eventually(lambda: _answers(f"http://127.0.0.1:{port}/api/health"), PATIENCE)
            running.enter_context(temporary_settings({PREFECT_API_URL: os.environ["PREFECT_API_URL"]}))
            running.enter_context(_prefect(folder, "worker", "start", "--pool", POOL, "--type", "process"))
            yield Deployed(_deploy(), folder, film, open_ledger(LedgerSettings()))


@contextmanager
def _prefect(folder: Path, *arguments: str) -> Iterator[None]:
    """A part of Prefect in a process of its own."""
    with (folder / f"{arguments[0]}.log").open("wb") as log:
        command = [sys.executable, "-m", "prefect", *arguments]
        process = subprocess.Popen(command, cwd=CHECKOUT, stdout=log, stderr=log, start_new_session=True)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


def _deploy() -> UUID:
    """Deploy the flow from this checkout; gives the deployment's id."""
    with get_client(sync_client=True) as client:
        eventually(lambda: [pool for pool in client.read_work_pools() if pool.name == POOL], PATIENCE)
        return client.create_deployment(
            client.create_flow(upscale_video),
            "local",
            work_pool_name=POOL,
            entrypoint="flows/upscale_video.py:upscale_video",
            # One at a time, as the deployments of `make ui` have it.
            concurrency_limit=1,
            pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(CHECKOUT)}}],
        )
