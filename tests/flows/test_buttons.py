"""What the buttons of the Prefect UI do to a run: suspend, resume, retry and cancel, with a worker and without one.

Each button is pressed as the UI does it: by the same request to the server. And a run that is killed leaves a record
that says so: a real Prefect worker runs the hooks.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import copy_context
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect import Flow
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterName,
)
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows.parameters import UpscaleOptions
from flows.upscale_library import LibraryOptions, upscale_library
from flows.upscale_video import upscale_video
from infra.pools import PooledCluster, local_pools, open_pools
from tasks.errors import StoppedError
from tasks.ledger import LedgerSettings, open_ledger
from tasks.ledger.ledger import Ledger
from tasks.ledger.record import JobRecord, JobState
from tests.flows.jobs import GROUP, PATIENCE, Scratch, make_film
from tests.flows.libraries import make_clip
from tests.installation import Installation
from tests.waiting import eventually

#: Of the films: many short chunks, so that there is always one under way and never long to wait for it.
CHUNKS = 24
OPTIONS = {"chunk_seconds": 1.0, "scale": 4}

#: Seconds after which nothing new begins in a pause: longer than a run takes to notice one, and to begin a video.
PAUSE = 6.0


@dataclass
class Deployed:
    """The deployment of `upscale-video`, and the ledger of its runs."""

    id: str
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
            return client.create_flow_run_from_deployment(UUID(self.id), parameters=parameters).id

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


@pytest.fixture(scope="module")
def deployed(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    folder = tmp_path_factory.mktemp("buttons")
    film = make_film(folder / "film.mp4", CHUNKS * GROUP, "96x64", sound=())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUPERRES_HOME", str(installation.home))  # Where its runs have their records.
        with temporary_settings({PREFECT_API_URL: installation.api, PREFECT_API_AUTH_STRING: None}):
            yield Deployed(installation.deployment("upscale-video"), folder, film, open_ledger(LedgerSettings()))


def press(run: UUID, path: str, **body: Any) -> dict[str, Any]:
    """Send what the UI sends; gives the answer."""
    with get_client(sync_client=True) as client:
        answer = client._client.post(f"/flow_runs/{run}/{path}", json=body)
        answer.raise_for_status()
        return dict(answer.json())


def suspend(run: UUID) -> None:
    expires = (datetime.now(UTC) + timedelta(seconds=300)).isoformat()
    details = {"pause_timeout": expires, "pause_reschedule": True, "deferred": False, "untrackable_result": False}
    press(run, "set_state", state={"type": "PAUSED", "name": "Suspended", "state_details": details}, force=True)


def pause(run: UUID) -> None:
    press(run, "set_state", state={"type": "PAUSED", "name": "Paused"}, force=True)


def cancel(run: UUID) -> None:
    press(run, "set_state", state={"type": "CANCELLING", "name": "Cancelling"}, force=True)


def retry(run: UUID) -> None:
    state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the UI"}
    assert press(run, "set_state", state=state, force=False)["status"] == "ACCEPT"


def resume(run: UUID) -> None:
    assert press(run, "resume")["status"] == "ACCEPT"


def read(run: UUID) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run)


def await_name(run: UUID, *names: str) -> FlowRun:
    """Wait until the state of a run has one of these names."""
    return eventually(lambda: found if (found := read(run)).state_name in names else None, PATIENCE / 2)


def shown(run: UUID, key: str) -> Any:
    """What the newest artifact of a run with this key says: its description and its content."""
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(
                flow_run_id=ArtifactFilterFlowRunId(any_=[run]), key=ArtifactFilterKey(any_=[key])
            )
        )
    newest: Artifact = max(found, key=lambda artifact: artifact.created)
    return f"{newest.description}\n{newest.data}"


def is_gone(pid: int) -> bool:
    return not Path("/proc", str(pid)).exists()


def children_of(pid: int) -> list[int]:
    """All processes that came out of one."""
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def test_suspend_resume_and_retry_go_on_from_what_is_finished(deployed: Deployed) -> None:
    run = deployed.start("film-4x.mp4", **OPTIONS)
    scratch = Scratch(deployed.folder / "scratch")
    first = deployed.await_state(run, JobState.UPSCALING)
    eventually(lambda: len(scratch.finished()) >= 2, PATIENCE)
    workers = children_of(first.holder.pid)
    assert workers

    suspend(run)
    eventually(lambda: is_gone(first.holder.pid) and all(map(is_gone, workers)), PATIENCE)
    paused = read(run)
    assert paused.state_name == "Suspended"
    assert paused.state is not None
    assert paused.state.state_details.pause_timeout is None  # After it, resuming would fail the run.
    finished = scratch.finished()
    assert 2 <= len(finished) < CHUNKS
    scratch.check_kept()
    record = deployed.record(run)
    assert record is not None and record.error is not None
    assert (record.state, record.error.kind) == (JobState.CANCELLED, "paused")
    assert "pausing" in shown(run, "progress")

    in_the_way = deployed.folder / "film-4x.mp4"
    in_the_way.write_bytes(b"something dear")
    resume(run)
    await_name(run, "Failed")
    page = shown(run, "result")
    assert "was not upscaled" in page
    assert "destination" in page
    scratch.check_kept()
    assert scratch.finished().keys() == finished.keys()

    in_the_way.unlink()
    retry(run)
    eventually(lambda: scratch.check_kept() or read(run).state_name == "Completed", PATIENCE)
    record = deployed.record(run)
    assert record is not None
    assert (record.state, record.attempt, record.job_id) == (JobState.PUBLISHED, 3, first.job_id)
    assert record.result["chunks_reused"] >= len(finished)
    assert record.result["frames_out"] == CHUNKS * GROUP
    assert f"{record.result['chunks_reused']} of them by an earlier run" in shown(run, "result")


def test_cancel_ends_a_run_of_a_worker_and_all_its_processes(deployed: Deployed) -> None:
    run = deployed.start("cancelled.mp4", **OPTIONS)
    record = deployed.await_state(run, JobState.UPSCALING)
    workers = children_of(record.holder.pid)
    assert workers
    cancel(run)
    await_name(run, "Cancelled")
    record = deployed.await_state(run, JobState.CANCELLED)
    assert record.error is not None and record.error.kind == "cancelled"
    eventually(lambda: is_gone(record.holder.pid) and all(map(is_gone, workers)))
    assert not (deployed.folder / "cancelled.mp4").exists()


@pytest.mark.chaos
def test_a_run_whose_process_is_killed_ends_as_failed(deployed: Deployed) -> None:
    run = deployed.start("killed.mp4", **OPTIONS)
    record = deployed.await_state(run, JobState.UPSCALING)
    os.kill(record.holder.pid, signal.SIGKILL)
    record = deployed.await_state(run, JobState.FAILED)
    assert record.error is not None
    assert (record.error.kind, record.error.phase) == ("lost", "upscaling")
    assert "-9" in record.error.message
    assert not (deployed.folder / "killed.mp4").exists()


class Called(threading.Thread):
    """A flow that is called in this process, as a notebook does it: no signal will ever tell it anything."""

    def __init__(self, flow: Flow[Any, Any], *arguments: Any) -> None:
        super().__init__(daemon=True)
        self._flow, self._arguments = flow, arguments
        self.ended: BaseException | None = None
        self._context = copy_context()  # Knows the server.
        self.start()

    def run(self) -> None:
        self._context.run(self._call)

    def _call(self) -> None:
        try:
            self._flow(*self._arguments)
        except BaseException as error:
            self.ended = error


def lasts(condition: Callable[[], bool]) -> bool:
    """Whether a condition holds for as long as it takes to tell a pause from a moment without work."""
    until = time.monotonic() + PAUSE
    while condition():
        if time.monotonic() > until:
            return True
        time.sleep(0.1)
    return False


def workers_of(cluster: PooledCluster) -> int:
    return sum(len(pool["workers"]) for pool in cluster.snapshot()["pools"].values())


def test_pause_and_cancel_reach_a_run_that_no_worker_has_started(deployed: Deployed) -> None:
    scratch = Scratch(deployed.folder / "here")
    with open_pools(local_pools(idle_seconds=1.0)) as cluster:
        options = UpscaleOptions(scratch=str(scratch.folder), owner="ann", **OPTIONS)
        called = Called(upscale_video, str(deployed.film), str(deployed.folder / "here.mp4"), options)
        eventually(lambda: len(scratch.finished()) >= 2, PATIENCE)
        records = deployed.ledger.by_owner("ann")
        run = UUID(next(record.flow_run_id for record in records if record.destination.endswith("here.mp4")))
        pause(run)
        eventually(lambda: "paused" in shown(run, "progress"), PATIENCE)
        finished = scratch.finished()
        assert len(finished) < CHUNKS
        eventually(lambda: not workers_of(cluster), PATIENCE)
        assert scratch.finished() == finished
        record = deployed.record(run)
        assert record is not None and record.state == JobState.UPSCALING

        resume(run)
        assert read(run).state_name == "Running"
        eventually(lambda: len(scratch.finished()) > len(finished), PATIENCE)
        scratch.check_kept()

        cancel(run)
        called.join(PATIENCE)
        assert isinstance(called.ended, StoppedError)
        assert read(run).state_name == "Cancelled"
        record = deployed.record(run)
        assert record is not None and record.error is not None
        assert (record.state, record.error.kind) == (JobState.CANCELLED, "cancelled")
        assert not (deployed.folder / "here.mp4").exists()


def test_pause_and_cancel_reach_a_library_that_no_worker_has_started(deployed: Deployed) -> None:
    videos, results = deployed.folder / "videos", deployed.folder / "results"
    for number in range(24):
        make_clip(videos / f"{number}.mp4", number)

    def published() -> int:
        return len(list(results.glob("*.mp4")))

    def records() -> list[JobRecord]:
        return deployed.ledger.by_owner("bob")

    with open_pools(local_pools(idle_seconds=1.0)) as cluster:
        upscale = UpscaleOptions(scratch=str(deployed.folder / "there"), owner="bob")
        options = LibraryOptions(upscale=upscale, parallel=1)
        called = Called(upscale_library, str(videos), str(results), options)
        eventually(published, PATIENCE)
        with get_client(sync_client=True) as client:
            named = FlowRunFilter(name=FlowRunFilterName(any_=[str(videos)]))
            (run,) = [found.id for found in client.read_flow_runs(flow_run_filter=named)]
        pause(run)
        # Between two videos nothing is under way either, for a moment, and the workers may be gone.
        eventually(lambda: lasts(lambda: all(each.ended for each in records()) and not workers_of(cluster)), PATIENCE)
        finished = published()
        assert 0 < finished < 24
        assert [record.state for record in records()] == [JobState.PUBLISHED] * finished

        resume(run)
        eventually(lambda: published() > finished, PATIENCE)
        cancel(run)
        called.join(PATIENCE)
        assert isinstance(called.ended, StoppedError)
        assert read(run).state_name == "Cancelled"
        assert published() < 24
        states = {record.state for record in records()}
        assert JobState.PUBLISHED in states and states <= {JobState.PUBLISHED, JobState.CANCELLED}
