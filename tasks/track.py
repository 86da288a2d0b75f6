"""How far a job is: counted from the files in its folder, so it is true whatever ran where.

An upscaled chunk file grows by one frame's bytes per finished frame, so its size tells progress within a chunk without
a message from any worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from tasks.plan import Plan

#: Seconds over which the speed is averaged: short enough to follow a change, long enough to be steady.
_SPEED_WINDOW: Final = 60.0


@dataclass(frozen=True)
class Progress:
    """One look at a running job."""

    frames_done: int
    """Frames upscaled, those of earlier attempts included."""
    frames_total: int
    chunks_encoded: int
    chunks_total: int
    frames_per_second: float | None
    """Measured over the last minute; `None` until something was measured."""
    eta_seconds: float | None
    """Time to the last upscaled frame at the measured speed."""
    phase: str
    """`upscaling`, `assembling`, `verifying`, `publishing` or `done`."""


class ProgressMeter:
    """Measures one job.

    Args:
        plan: The job.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._finished: set[int] = set()
        self._idle_at: int | None = None
        self._samples: list[tuple[float, int]] = []

    def look(self, phase: str = "upscaling") -> Progress:
        """Count what is there now."""
        plan, now = self._plan, time.monotonic()
        encoded = done = 0
        writing = self._being_written()
        for chunk in plan.chunks:
            if chunk.index in self._finished or plan.encoded(chunk).exists():
                self._finished.add(chunk.index)
                encoded += 1
                done += chunk.frames
            elif plan.upscaled(chunk).exists():
                done += chunk.frames
            else:
                done += writing.get(plan.upscaled(chunk).name, 0)
        done = min(done, plan.frames)
        if self._idle_at is None:
            self._idle_at = done
        # Nothing is measured before the first frame: workers starting and models loading are not speed.
        if done > self._idle_at and (not self._samples or done != self._samples[-1][1]):
            self._samples.append((now, done))
        while len(self._samples) > 2 and self._samples[1][0] < now - _SPEED_WINDOW:
            self._samples.pop(0)
        speed = None
        if len(self._samples) > 1:
            (first_at, first), (last_at, last) = self._samples[0], self._samples[-1]
            speed = (last - first) / (last_at - first_at)
        eta = (plan.frames - done) / speed if speed else None
        return Progress(done, plan.frames, encoded, len(plan.chunks), speed, eta, phase)

    def _being_written(self) -> dict[str, int]:
        """Frames in the unfinished file of each chunk; the longest one where a lost worker left another behind."""
        frames: dict[str, int] = {}
        for path in self._plan.folder.glob("upscale-*.partial-*"):
            name = path.name.partition(".partial-")[0]
            try:
                frames[name] = max(frames.get(name, 0), path.stat().st_size // self._plan.target.frame_bytes)
            except FileNotFoundError:
                # Renamed between listing and looking: its chunk counts as a whole by now.
                continue
        return frames


Observer = Callable[[Progress], None]
_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Have `observer` called with the progress of the jobs run inside the block, about once a second."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def report(progress: Progress) -> None:
    """Tell the observer, if there is one."""
    if observer := _observer.get():
        observer(progress)
