"""The chunks of one job, streamed through the three stages, with progress for whoever watches."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, cast

from prefect.exceptions import Pause
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger

from flows.artifacts.progress import Meter
from flows.stopping import LOOK_SECONDS, Pausing, check_stop, first_failure, settled
from infra.pools.runner import PoolFuture
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
from tasks.progress import TransferNote
from tasks.track import JobTracker
from tasks.upscale import upscale

#: Attempts at one chunk before the job gives up. Only failures that another attempt can mend are repeated; lost workers
#: are not counted here, the task runner has already repeated those.
CHUNK_ATTEMPTS: Final = 3

#: Chunks that may fail for good before the others are given up too: by then it is not the chunks.
FAILED_CHUNKS: Final = 3

#: The stages of a chunk, in order, and the pool of each.
STAGES: Final = {"extract": "cpu", "upscale": "gpu", "encode": "cpu"}


def watch_transfer(future: PrefectFuture[Any], note: TransferNote, tell: Callable[[int, int], None]) -> None:
    """Tell how far a transfer is until its task run has ended.

    Args:
        future: Of the task run.
        note: Where the worker notes how far it is.
        tell: Called with bytes done and bytes in all.
    """
    while not settled(future, 0):
        done, total = note.read()
        if total:
            tell(done, total)
        settled(future)


@dataclass(frozen=True)
class FinishedChunk:
    """A chunk that is encoded."""

    chunk: Chunk
    reports: tuple[StageReport, ...]
    """What its stages took, in order."""
    failed: tuple[str, ...]
    """The stage at which each attempt before the last one failed."""


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
    job: Plan,
    path: str,
    chunks: list[Chunk],
    window: int,
    meter: Meter,
    tracker: JobTracker,
    finished: Callable[[FinishedChunk], None],
    look: Callable[[], None] = lambda: None,
) -> None:
    """Stream chunks through the stages in plan order, at most `window` at a time.

    A chunk that fails for good does not stop the others: what they finish need not be done again.

    Args:
        job: The job.
        path: Path of its plan.
        chunks: Those to do.
        window: How many may be under way.
        meter: Told about progress.
        tracker: Of the job's record.
        finished: Called with each chunk that is done.
        look: Called now and then.

    Raises:
        SuperResolutionError: A chunk failed for good; carries the error of the first one.
        Pause: The run was paused and its process is to end; what was under way is finished.
    """
    waiting: deque[tuple[Chunk, tuple[str, ...]]] = deque((chunk, ()) for chunk in chunks)
    ended: queue.SimpleQueue[_ChunkRun] = queue.SimpleQueue()
    failures: list[BaseException] = []
    running: dict[int, _ChunkRun] = {}
    pausing = Pausing()
    last: set[int] | None = None
    tracker.reach(JobState.EXTRACTING)
    while waiting or running:
        if not pausing.is_wanted:
            last = None
            try:
                while waiting and len(running) < window:
                    run = _submit(job, path, *waiting[0], ended.put, tracker)
                    running[run.chunk.index] = run
                    waiting.popleft()
            except Pause:
                pausing.begin()
        else:
            if last is None:
                get_run_logger().info("pausing: what is under way is finished, nothing further is started")
                # A process that leaves need not wait for what has only been queued; one that stays cannot take it back.
                last = {index for index, run in running.items() if not pausing.leaves or _is_upscaled(job, run)}
                meter.report("pausing")
            if pausing.is_urgent or not last & running.keys():
                get_run_logger().info("paused: %d of %d chunks are left", len(waiting) + len(running), len(job.chunks))
                pausing.rest(lambda: meter.report("paused"))
                get_run_logger().info("resumed")
                continue
        check_stop()
        meter.report("upscaling" if last is None else "pausing")
        look()
        try:
            run = ended.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            continue
        del running[run.chunk.index]
        failure = _failure(run)
        if failure is None:
            finished(_count(run, tracker))
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


def _is_upscaled(job: Plan, run: _ChunkRun) -> bool:
    """Whether the upscaling of a chunk is under way or done."""
    begun = any(path.name.startswith("upscale-") for path in job.unfinished(run.chunk))
    return begun or cast(PoolFuture[StageReport], run.futures[1]).is_settled


def _submit(
    job: Plan,
    path: str,
    chunk: Chunk,
    failed: tuple[str, ...],
    put: Callable[[_ChunkRun], None],
    tracker: JobTracker,
) -> _ChunkRun:
    label = f"{chunk.index + 1}/{len(job.chunks)} frames {chunk.first}-{chunk.last}"
    extracted = extract.submit(path, chunk.index, label)
    upscaled = upscale.submit(path, chunk.index, label, return_state=False, wait_for=[extracted])
    encoded = encode.submit(path, chunk.index, label, return_state=False, wait_for=[upscaled])
    run = _ChunkRun(chunk, failed, (extracted, upscaled, encoded))
    extracted.add_done_callback(lambda future: _begun(future, tracker))
    encoded.add_done_callback(lambda _: put(run))
    return run


def _begun(extracted: PrefectFuture[StageReport], tracker: JobTracker) -> None:
    if extracted.state.is_completed():
        tracker.reach(JobState.UPSCALING)


def _count(run: _ChunkRun, tracker: JobTracker) -> FinishedChunk:
    """Count what the stages of a finished chunk took."""
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
    return FinishedChunk(run.chunk, tuple(reports), run.failed)


def _failure(run: _ChunkRun) -> BaseException | None:
    """The error of the first stage that failed; later stages only say that they could not start."""
    found = first_failure(run.futures)
    if found is None:
        return None
    position, failure = found
    if scene_of(failure) is None:
        nowhere = Place("", "", "", 0)  # The worker is gone; the message says what is known of it.
        scene = Scene(list(STAGES)[position], run.chunk.first, run.chunk.last, nowhere)
        failure.scene = scene  # type: ignore[attr-defined]
    return failure


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
