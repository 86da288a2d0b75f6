"""The chunks of one job, streamed through the three stages, with progress for whoever watches."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger

from flows.stopping import LOOK_SECONDS, check_stop, settled
from tasks.chunk_report import StageReport
from tasks.chunks import Chunk
from tasks.encode import encode
from tasks.errors import ChunkFileError, PoolError, SuperResolutionError
from tasks.extract import extract
from tasks.failures import Scene, scene_of
from tasks.ledger.record import JobState
from tasks.media.ffmpeg import FfmpegError
from tasks.place import Place
from tasks.plan import Plan
from tasks.progress import Progress, ProgressMeter, TransferNote, tell
from tasks.track import JobTracker
from tasks.upscale import upscale

#: Attempts at one chunk before the job gives up. Only failures that another attempt can mend are repeated; lost workers
#: are not counted here, the task runner has already repeated those.
CHUNK_ATTEMPTS: Final = 3

#: Chunks that may fail for good before the others are given up too: by then it is not the chunks.
FAILED_CHUNKS: Final = 3

#: Seconds between two updates of the progress artifact in the UI.
_ARTIFACT_SECONDS: Final = 10.0

#: The stages of a chunk, in order, and the pool of each.
STAGES: Final = {"extract": "cpu", "upscale": "gpu", "encode": "cpu"}


class Meter:
    """Progress to whoever watches: the command line once a second, the UI every few seconds, the record now and then.

    Args:
        job: The job.
        tracker: Of its record.
    """

    def __init__(self, job: Plan, tracker: JobTracker) -> None:
        self._tracker = tracker
        self._meter = ProgressMeter(job)
        # Typed as maybe a coroutine; in a flow that is not async it is the identifier.
        self._artifact = cast(UUID, create_progress_artifact(0.0, key="progress", description="Frames upscaled"))
        self._updated = time.monotonic()
        self._looked = 0.0
        self.report("upscaling")

    def report(self, phase: str) -> None:
        """Look, unless the last look was just now, and tell; afterwards `seen` is what was told.

        Raises:
            LostJobError: Another run has taken this job over.
        """
        if phase == "upscaling" and time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        self._tracker.check()
        self.seen = progress = self._meter.look(phase)
        self._tracker.note(frames_done=progress.frames_done)
        if phase == "upscaling" and progress.frames_done == progress.frames_total:
            self._tracker.reach(JobState.ENCODING)
        tell(progress)
        if time.monotonic() - self._updated >= _ARTIFACT_SECONDS or phase == "done":
            self._updated = time.monotonic()
            update_progress_artifact(self._artifact, 100.0 * progress.frames_done / progress.frames_total)


def watch_transfer(future: PrefectFuture[Any], note: TransferNote, otherwise: Progress) -> None:
    """Tell how far a transfer is until its task run has ended.

    Args:
        future: Of the task run.
        note: Where the worker notes how far it is.
        otherwise: What else there is to tell.
    """
    while not settled(future, 0):
        done, total = note.read()
        if total:
            tell(replace(otherwise, bytes_done=done, bytes_total=total))
        settled(future)


@dataclass
class _ChunkRun:
    """One attempt at one chunk: its three futures, in order."""

    chunk: Chunk
    failed: tuple[str, ...]
    """The stage at which each earlier attempt failed."""
    futures: tuple[PrefectFuture[StageReport], ...]
    submitted: float = field(default_factory=time.time)

    @property
    def attempt(self) -> int:
        """1 for the first."""
        return 1 + len(self.failed)


def run_chunks(
    job: Plan, path: str, chunks: list[Chunk], window: int, meter: Meter, tracker: JobTracker
) -> list[StageReport]:
    """Stream chunks through the stages in plan order, at most `window` at a time.

    A chunk that fails for good does not stop the others: what they finish need not be done again.

    Raises:
        SuperResolutionError: A chunk failed for good; carries the error of the first one.
    """
    waiting: deque[tuple[Chunk, tuple[str, ...]]] = deque((chunk, ()) for chunk in chunks)
    ended: queue.SimpleQueue[_ChunkRun] = queue.SimpleQueue()
    reports: list[StageReport] = []
    failures: list[BaseException] = []
    running = 0
    tracker.reach(JobState.EXTRACTING)
    while waiting or running:
        while waiting and running < window:
            _submit(job, path, *waiting.popleft(), ended.put, tracker)
            running += 1
        check_stop()
        meter.report("upscaling")
        try:
            run = ended.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            continue
        running -= 1
        failure = _failure(run)
        if failure is None:
            reports += _count(run, tracker)
        elif run.attempt < CHUNK_ATTEMPTS and isinstance(failure, ChunkFileError | FfmpegError):
            get_run_logger().warning(
                "chunk %d (frames %d-%d), attempt %d: %s",
                run.chunk.index,
                run.chunk.first,
                run.chunk.last,
                run.attempt,
                failure,
            )
            scene = scene_of(failure)
            waiting.appendleft((run.chunk, (*run.failed, scene.stage if scene else "")))
        else:
            failures.append(_naming(run.chunk, run.attempt, failure))
            get_run_logger().error("chunk %d failed for good: %s", run.chunk.index, failures[-1])
            # What is wrong with the source or the model is wrong for all chunks.
            if not isinstance(failure, PoolError | ChunkFileError | FfmpegError) or len(failures) == FAILED_CHUNKS:
                break
    if failures:
        raise failures[0]
    return reports


def _submit(
    job: Plan,
    path: str,
    chunk: Chunk,
    failed: tuple[str, ...],
    put: Callable[[_ChunkRun], None],
    tracker: JobTracker,
) -> None:
    label = f"{chunk.index + 1}/{len(job.chunks)} frames {chunk.first}-{chunk.last}"
    extracted = extract.submit(path, chunk.index, label)
    upscaled = upscale.submit(path, chunk.index, label, return_state=False, wait_for=[extracted])
    encoded = encode.submit(path, chunk.index, label, return_state=False, wait_for=[upscaled])
    run = _ChunkRun(chunk, failed, (extracted, upscaled, encoded))
    extracted.add_done_callback(lambda future: _begun(future, tracker))
    encoded.add_done_callback(lambda _: put(run))


def _begun(extracted: PrefectFuture[StageReport], tracker: JobTracker) -> None:
    if extracted.state.is_completed():
        tracker.reach(JobState.UPSCALING)


def _count(run: _ChunkRun, tracker: JobTracker) -> list[StageReport]:
    """Count what the stages of a finished chunk took.

    Returns:
        Their reports.
    """
    reports, ready = [], run.submitted
    for future in run.futures:
        report = future.result()
        # Clocks of nodes differ a little.
        wait = max(0.0, report.started - ready)
        tracker.stage_ended(
            report,
            frames=run.chunk.frames,
            pool=STAGES[report.stage],
            queue_wait=wait,
            retries=run.failed.count(report.stage),
        )
        reports.append(report)
        ready = report.started + report.seconds
    return reports


def _failure(run: _ChunkRun) -> BaseException | None:
    """The error of the first stage that failed; later stages only say that they could not start."""
    for stage, future in zip(STAGES, run.futures, strict=True):
        future.wait()
        if future.state.is_completed():
            continue
        failure = future.state.result(raise_on_failure=False)
        if not isinstance(failure, BaseException):
            failure = PoolError(f"task run {future.task_run_id} ended {future.state.name}: {future.state.message}")
        if scene_of(failure) is None:
            nowhere = Place("", "", "", 0)  # The worker is gone; the message says what is known of it.
            failure.scene = Scene(stage, run.chunk.first, run.chunk.last, nowhere)  # type: ignore[attr-defined]
        return failure
    return None


def _naming(chunk: Chunk, attempt: int, failure: BaseException) -> BaseException:
    """The chunk's own error if it is one of ours, else one that names the chunk."""
    if isinstance(failure, SuperResolutionError):
        return failure
    named = PoolError(
        f"chunk {chunk.index} (frames {chunk.first}-{chunk.last}) failed after {attempt} attempts: {failure}",
        "Run the same command again to continue from the finished chunks",
    )
    named.__cause__ = failure
    return named
