"""How far a run is: a progress artifact that says it in words too, and now and then a line in the log."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final, cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

from flows.artifacts import shown
from flows.stopping import LOOK_SECONDS
from tasks.ledger.record import JobState
from tasks.plan import Plan
from tasks.progress import Progress, ProgressMeter, tell
from tasks.track import JobTracker

if TYPE_CHECKING:
    from infra.pools import PooledCluster

#: Seconds between two updates of the artifact while the phase stays the same.
_ARTIFACT_SECONDS: Final = 10.0

#: A line is logged after this share of the frames, and after so many seconds without one.
_LOGGED_SHARE: Final = 0.1
_LOGGED_SECONDS: Final = 300.0


class ProgressShown:
    """The progress artifact of a run; there is none before there is something to show.

    Args:
        cluster: Gives the pools whose workers are counted; asked only when there is something to show.
    """

    def __init__(self, cluster: Callable[[], PooledCluster]) -> None:
        self._cluster = cluster
        self._artifact: UUID | None = None
        self._phase = ""
        self._has_speed = False
        self._updated = 0.0

    def show(self, progress: Progress) -> None:
        """Bring the artifact up to date, unless that was done a moment ago and there is no news since.

        News is another phase, and the first speed: from then on there is an answer to how long it will take.
        """
        has_speed = progress.frames_per_second is not None
        is_news = progress.phase != self._phase or (has_speed and not self._has_speed)
        if not is_news and time.monotonic() - self._updated < _ARTIFACT_SECONDS:
            return
        self._phase, self._has_speed, self._updated = progress.phase, has_speed, time.monotonic()
        with shown("progress"):
            text = describe(progress, self.workers())
            share = 100.0 if progress.phase == "done" else 100.0 * progress.share
            if self._artifact is None:
                # Typed as maybe a coroutine; in a flow that is not async it is the identifier.
                self._artifact = cast(UUID, create_progress_artifact(share, key="progress", description=text))
            else:
                update_progress_artifact(self._artifact, share, description=text)

    def workers(self) -> dict[str, int]:
        """Workers of each pool that are there now."""
        cluster = self._cluster()

        async def look() -> dict[str, int]:  # In the cluster's own loop, which changes these while others look.
            observed = cluster.observed
            return {name: sum(map(pool.owns, observed)) for name, pool in cluster.pools.items()}

        counted: dict[str, int] = cluster.sync(look)
        return counted


def describe(progress: Progress, workers: dict[str, int]) -> str:
    """One line about a run, such as `upscaling · 1 234 of 5 000 frames · 12.3 frames/s · 4 min left · cpu 2, gpu 1`.

    Args:
        progress: How far it is.
        workers: Workers of each pool.
    """
    parts = [progress.phase]
    if progress.bytes_total:
        parts.append(f"{progress.bytes_done / 1e6:.1f} of {progress.bytes_total / 1e6:.1f} MB")
    elif progress.frames_total:
        parts.append(f"{grouped(progress.frames_done)} of {grouped(progress.frames_total)} frames")
    if progress.phase == "upscaling":
        if progress.frames_per_second:
            parts.append(f"{progress.frames_per_second:.1f} frames/s")
        if progress.eta_seconds:
            parts.append(f"{duration(progress.eta_seconds)} left")
    if any(workers.values()):
        parts.append(", ".join(f"{name} {count}" for name, count in sorted(workers.items())) + " workers")
    else:
        parts.append("no workers")
    return " · ".join(parts)


def grouped(number: int) -> str:
    """A number in groups of three digits, as ISO 80000-1 has it: `1 234 567`."""
    return f"{number:,}".replace(",", "\N{NO-BREAK SPACE}")


def duration(seconds: float) -> str:
    """A time in the two largest units that matter: `3 h 05 min`, `4 min`, `12 s`."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"


class Meter:
    """Progress to whoever watches: the command line once a second, the UI and the log now and then, and the record.

    Args:
        job: The job.
        tracker: Of its record.
        progress: Its artifact.

    Attributes:
        seen: What was told last.
    """

    def __init__(self, job: Plan, tracker: JobTracker, progress: ProgressShown) -> None:
        self._tracker = tracker
        self._meter = ProgressMeter(job)
        self._progress = progress
        self._looked, self._phase = 0.0, ""
        self._logged = time.monotonic()
        self._logged_share: float | None = None
        self.report("upscaling")

    def report(self, phase: str) -> None:
        """Look, unless that was done a moment ago and the phase is the same, and tell.

        Raises:
            LostJobError: Another run has taken this job over.
        """
        if phase == self._phase and time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked, self._phase = time.monotonic(), phase
        self._tracker.check()
        self.seen = progress = self._meter.look(phase)
        self._tracker.note(frames_done=progress.frames_done)
        if phase == "upscaling" and progress.frames_done == progress.frames_total:
            self._tracker.reach(JobState.ENCODING)
        self.transferred(0, 0)

    def transferred(self, done: int, total: int) -> None:
        """Tell what was seen last, with bytes that are under way: done, and in all."""
        progress = replace(self.seen, bytes_done=done, bytes_total=total)
        tell(progress)
        self._progress.show(progress)
        if progress.phase == "upscaling":
            self._log(progress)

    def _log(self, progress: Progress) -> None:
        share = progress.share
        if self._logged_share is None:
            self._logged_share = share  # What an earlier run had done is no news of this one.
        late = time.monotonic() - self._logged >= _LOGGED_SECONDS
        if share < 1 and (share - self._logged_share >= _LOGGED_SHARE or late):
            self._logged, self._logged_share = time.monotonic(), share
            get_run_logger().info("%.0f %%: %s", 100 * share, describe(progress, self._progress.workers()))
