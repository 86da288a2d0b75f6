"""How far a job is: counted from the files in its folder, so it is true whatever ran where.

An upscaled chunk file grows by one frame's bytes per finished frame, so its size tells progress within a chunk without
a message from any worker.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:  # It brings Prefect along, and commands show that they have begun before that is loaded.
    from tasks.plan import Plan

#: Seconds over which the speed is averaged: short enough to follow a change, long enough to be steady.
_SPEED_WINDOW: Final = 60.0

#: Seconds between two notes about a transfer.
_NOTE_SECONDS: Final = 0.5


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
    """`staging`, `upscaling`, `assembling`, `verifying`, `publishing` or `done`."""
    bytes_done: int = 0
    """Of the source while it is staged, of the result while it is published."""
    bytes_total: int = 0

    @property
    def share(self) -> float:
        """0 to 1: of the bytes while some are under way, else of the frames."""
        if self.bytes_total:
            return self.bytes_done / self.bytes_total
        return self.frames_done / self.frames_total if self.frames_total else 0.0


#: Of a job whose source is still under way.
STAGING: Final = Progress(0, 0, 0, 0, None, None, "staging")


class ProgressMeter:
    """Measures one job.

    Args:
        plan: The job.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._unfinished = [(chunk, plan.upscaled(chunk).name, plan.encoded(chunk).name) for chunk in plan.chunks]
        self._frames_finished = 0
        self._idle_at: int | None = None
        self._samples: list[tuple[float, int]] = []

    def look(self, phase: str = "upscaling") -> Progress:
        """Count what is there now."""
        plan, now = self._plan, time.monotonic()
        complete, writing = self._files()
        unfinished, upscaled_frames = [], 0
        for chunk, upscaled, encoded in self._unfinished:
            if encoded in complete:
                self._frames_finished += chunk.frames
            else:
                unfinished.append((chunk, upscaled, encoded))
                upscaled_frames += chunk.frames if upscaled in complete else writing.get(upscaled, 0)
        self._unfinished = unfinished
        done = min(self._frames_finished + upscaled_frames, plan.frames)
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
        encoded_chunks = len(plan.chunks) - len(unfinished)
        return Progress(done, plan.frames, encoded_chunks, len(plan.chunks), speed, eta, phase)

    def _files(self) -> tuple[set[str], dict[str, int]]:
        """Names of the complete files, and the frames in the unfinished file of each chunk being upscaled.

        One listing, because a job may have thousands of chunks on a network file system. Of two unfinished files of a
        chunk, one of them a lost worker's, the longer one counts.
        """
        complete: set[str] = set()
        writing: dict[str, int] = {}
        with os.scandir(self._plan.folder) as entries:
            for entry in entries:
                name, is_partial, _ = entry.name.partition(".partial-")
                if not is_partial:
                    complete.add(name)
                elif name.startswith("upscale-"):
                    try:
                        frames = entry.stat().st_size // self._plan.target.frame_bytes
                        writing[name] = max(writing.get(name, 0), frames)
                    except FileNotFoundError:
                        complete.add(name)  # Renamed since it was listed.
        return complete, writing


class TransferNote:
    """Progress of a transfer, left in a file by the worker that does it for whoever watches the job.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = 0.0

    def write(self, done: int, total: int) -> None:
        """Note bytes done and bytes in all, at most twice a second."""
        if done == total or time.monotonic() - self._written > _NOTE_SECONDS:
            self._written = time.monotonic()
            with suppress(OSError):  # The transfer itself is what matters.
                self._path.write_text(f"{done} {total}")

    def read(self) -> tuple[int, int]:
        """Bytes done and bytes in all; zeros where nothing is known."""
        try:
            done, total = self._path.read_text().split()
            return int(done), int(total)
        except (OSError, ValueError):
            return 0, 0


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


def tell(progress: Progress) -> None:
    """Tell the observer, if there is one."""
    if observer := _observer.get():
        observer(progress)
