"""Track one job: its record in the ledger and its metrics, from the first second to the last.

    with tracked(ledger, metrics, job, flow_run_id) as tracker:
        tracker.reach(JobState.STAGING)
        ...
        tracker.publish(output)

However the block ends, the record ends too: `published`, `failed` with what went wrong and where, or `cancelled`. What
is written on the way goes through a thread of its own, which also renews the job's lease, so that a ledger that is slow
or away for a while slows nothing down. Only the beginning and the end wait for it.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Final

from prefect.exceptions import CancelledRun, Pause

from tasks.chunk_report import StageReport
from tasks.destinations import Output
from tasks.errors import FrameError, LedgerError
from tasks.failures import scene_of
from tasks.ledger.holder import this_holder
from tasks.ledger.ledger import Ledger, LostJobError, new_write_id
from tasks.ledger.record import JobError, JobRecord, JobState, NewJob, may_follow
from tasks.metrics import Metrics, Outcome, samples_of_job, samples_of_stage
from tasks.place import this_place

#: Seconds between two renewals of the lease: a few may be missed before it lapses.
_RENEW_SECONDS: Final = 20.0

#: Seconds after which a write that failed is tried again, and for how long the last one is tried.
_AGAIN_SECONDS: Final = 2.0
_LAST_SECONDS: Final = 90.0

#: The same for a job that somebody stops, who waits for it.
_STOP_SECONDS: Final = 5.0


class JobTracker:
    """The record and the metrics of a job that this process works on; made by `tracked()`.

    Attributes:
        record: As this process last wrote it.
    """

    def __init__(self, ledger: Ledger, metrics: Metrics, record: JobRecord) -> None:
        self.record = record
        self._ledger = ledger
        self._metrics = metrics
        self._state = record.state
        self._facts: dict[str, Any] = {}
        self._phase_seconds: defaultdict[str, float] = defaultdict(float)
        self._totals: defaultdict[str, float] = defaultdict(float)
        self._slurm_jobs: dict[str, None] = {}
        self._steps: deque[tuple[JobState, str]] = deque()
        self._changed = threading.Condition()
        self._lost: LostJobError | None = None
        self._ending = False
        self._patience = _LAST_SECONDS
        self._began = time.time()
        self._keeper = threading.Thread(target=self._keep, name="job-record", daemon=True)
        self._keeper.start()

    def reach(self, state: JobState, **facts: Any) -> None:
        """Say which state the job is in now, unless it is further already, and what became known."""
        with self._changed:
            self._facts |= facts
            if may_follow(self._state, state):
                self._state = state
                self._steps.append((state, new_write_id()))
                self._changed.notify()

    def note(self, **facts: Any) -> None:
        """Keep facts for the next write, which need not be soon."""
        with self._changed:
            self._facts |= facts

    def check(self) -> None:
        """Refuse to go on with a job that is no longer this process's.

        Raises:
            LostJobError: Another run has taken it over.
        """
        if self._lost is not None:
            raise self._lost

    def stage_ended(self, report: StageReport, *, frames: int, pool: str, queue_wait: float, retries: int) -> None:
        """Count one stage of one chunk.

        Args:
            report: What it took.
            frames: Frames of the chunk.
            pool: The pool it ran on.
            queue_wait: Seconds between its inputs being there and its start.
            retries: Attempts at the chunk that failed at this stage.
        """
        # Not the record's: it lags behind, and without a ledger for as long as that is away.
        model = self._facts.get("model", "")
        samples = samples_of_stage(
            report, frames=frames, model=model, pool=pool, queue_wait=queue_wait, retries=retries
        )
        self._metrics.record(samples)
        with self._changed:
            for sample in samples:
                if sample.name != "FramesPerSecond":  # Speeds cannot be added.
                    self._totals[f"{sample.name}.{sample.phase}"] += sample.value
            if not report.was_reused:
                self._phase_seconds[report.stage] += report.seconds
            if report.where.job:
                self._slurm_jobs[report.where.job] = None
            self._facts |= self._counted()

    def phase_took(self, phase: str, seconds: float) -> None:
        """Count the seconds of a step that is not one of a chunk's."""
        with self._changed:
            self._phase_seconds[phase] += seconds
            self._facts |= self._counted()

    def publish(self, output: Output, **facts: Any) -> None:
        """End the job as published. Waits for the ledger.

        Raises:
            LedgerError: It cannot be told; the result is published all the same.
        """
        self._stop()
        all_facts = {**self._facts, **facts, "write_id": new_write_id()}
        self.record = self._insist(lambda: self._ledger.publish(self.record, asdict(output), **all_facts))
        self._count_job("published")

    def end(self, error: BaseException) -> None:
        """End the job as failed or cancelled, whatever the ledger says to that."""
        self._stop()
        was_cancelled = isinstance(error, CancelledRun) or not isinstance(error, Exception)
        if was_cancelled:
            self._patience = min(self._patience, _STOP_SECONDS)
        try:
            if not isinstance(error, LostJobError):
                facts = {**self._facts, "write_id": new_write_id()}
                self.record = self._insist(lambda: self._write_end(error, was_cancelled, facts))
        except LedgerError as unreachable:
            error.add_note(f"The record of job {self.record.job_id} could not be ended: {unreachable}")
        self._count_job("cancelled" if was_cancelled else "failed")

    def _write_end(self, error: BaseException, was_cancelled: bool, facts: dict[str, Any]) -> JobRecord:
        if isinstance(error, Pause):
            return self._ledger.cancel(self.record, "Paused while " + self._state, kind="paused", **facts)
        if was_cancelled:
            return self._ledger.cancel(self.record, "Stopped while " + self._state, **facts)
        return self._ledger.fail(self.record, describe(error, self._state), **facts)

    def _count_job(self, outcome: Outcome) -> None:
        record = self.record
        self._metrics.record(
            samples_of_job(
                outcome,
                seconds=time.time() - self._began,
                node_seconds=record.node_seconds,
                cost=record.cost,
                model=record.model,
            )
        )

    def _counted(self) -> dict[str, Any]:
        return {
            "phase_seconds": {name: round(seconds, 3) for name, seconds in self._phase_seconds.items()},
            "metrics": dict(self._totals),
            "slurm_jobs": tuple(self._slurm_jobs),
        }

    def _stop(self) -> None:
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._keeper.join()

    def _insist(self, write: Callable[[], JobRecord]) -> JobRecord:
        """Write what must be written."""
        deadline = time.monotonic() + self._patience
        while True:
            try:
                return write()
            except LostJobError:
                raise
            except LedgerError:
                if time.monotonic() > deadline:
                    self._patience = 0.0  # Enough for one job.
                    raise
                time.sleep(_AGAIN_SECONDS)

    def _keep(self) -> None:
        """Write each state once, in order, and renew the lease now and then."""
        renewed = time.monotonic()
        while True:
            with self._changed:
                if not self._steps and not self._ending:
                    self._changed.wait(max(0.0, renewed + _RENEW_SECONDS - time.monotonic()))
                if self._ending and not self._steps:
                    return
                step = self._steps[0] if self._steps else None
                facts = dict(self._facts)
            try:
                if step is None:
                    self.record = self._ledger.renew(self.record, **facts)
                else:
                    self.record = self._ledger.advance(self.record, step[0], write_id=step[1], **facts)
            except LostJobError as lost:
                with self._changed:
                    self._lost = lost
                return
            except LedgerError:  # Away for now: what is known is kept, and the end insists.
                with self._changed:
                    if self._ending:
                        return
                    self._changed.wait(_AGAIN_SECONDS)
                continue
            renewed = time.monotonic()
            if step is not None:
                with self._changed:
                    self._steps.popleft()


def describe(error: BaseException, phase: str) -> JobError:
    """What a record says of an error.

    Args:
        error: The error.
        phase: What the job was doing, for errors that do not say where they happened.
    """
    scene = scene_of(error)
    first, last = (scene.first_frame, scene.last_frame) if scene else (None, None)
    if isinstance(error, FrameError) and error.frame is not None:
        first = last = error.frame
    where = scene.where if scene else this_place()
    return JobError(
        phase=scene.stage if scene else str(phase),
        kind=getattr(error, "kind", "internal"),
        message=str(error) or type(error).__name__,
        first_frame=first,
        last_frame=last,
        node=where.node,
        slurm_job=where.job,
        log=where.log,
    )


@contextmanager
def tracked(
    ledger: Ledger,
    metrics: Metrics,
    job: NewJob,
    *,
    flow_run_id: str,
    is_done: Callable[[JobRecord], bool] = lambda _: False,
) -> Iterator[JobTracker]:
    """Track a job while the block runs.

    Raises:
        DoneBeforeError: It is published, and `is_done` says that this holds.
        LedgerError: The ledger cannot be reached, or another run works on the same job.
    """
    with metrics:
        record = ledger.begin(job, this_holder(), flow_run_id, this_place().node, is_done)
        tracker = JobTracker(ledger, metrics, record)
        try:
            yield tracker
            if tracker.record.state != JobState.PUBLISHED:
                raise LedgerError(f"job {record.job_id} ended without a result")
        except BaseException as error:
            tracker.end(error)
            raise
