"""Chunks: how long they are, and where they begin.

A chunk is the unit of planning, scheduling, retry, resume, progress and cost. It is a whole number of the encoder's
groups of pictures, so that where chunks begin leaves no trace in the result.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Final

from tasks.cores import assumed_flops, usable_cores

#: Seconds of upscaling one chunk should take: long beside the cost of its three tasks, short beside what a lost worker
#: costs.
_CHUNK_WORK_SECONDS: Final = 45.0

#: Largest upscaled chunk in bytes, and longest chunk in seconds of video.
_CHUNK_BYTES: Final = 4 << 30
_CHUNK_VIDEO_SECONDS: Final = 60.0

#: A short clip is still cut into about this many chunks, so that the stages overlap.
_FEWEST_CHUNKS: Final = 4


@dataclass(frozen=True)
class Capacity:
    """What the workers of a job can do at one time; by default, those of a machine without a GPU.

    Attributes:
        gpu_slots: Chunks that can be upscaled at one time.
        cpu_slots: Chunks that can be decoded or encoded at one time.
        flops: FLOP/s that upscaling one chunk is assumed to sustain.
    """

    gpu_slots: int = 1
    cpu_slots: int = 2
    flops: float = field(default_factory=lambda: assumed_flops(usable_cores(), on_gpu=False))

    @property
    def window(self) -> int:
        """Chunks that may be between "submitted" and "encoded" at one time: bounds scratch and memory.

        Each chunk on a GPU has the next one ready behind it, and a light model would wait for encoders otherwise.
        """
        return 2 * self.gpu_slots + self.cpu_slots + 1


@dataclass(frozen=True)
class Chunk:
    """A run of consecutive frames."""

    index: int
    first: int
    """Number of its first frame in the source."""
    last: int
    """Number of its last frame, included."""

    @property
    def frames(self) -> int:
        return self.last - self.first + 1


def chunk_limit(
    *, rate: Fraction, group: int, frame_flop: float, target_frame_bytes: int, chunk_seconds: float | None, flops: float
) -> int:
    """Frames of the longest chunk: a multiple of a group of pictures, at least one.

    Args:
        rate: Frames per second.
        group: Frames of one group of pictures.
        frame_flop: Floating point operations the model needs for one frame.
        target_frame_bytes: Bytes of one upscaled frame.
        chunk_seconds: Length in seconds of video that the user asked for; `None` aims at a chunk of about a minute of
            work within the bounds on file size and length.
        flops: FLOP/s at which a chunk is upscaled.
    """
    if chunk_seconds is not None:
        return group * max(1, round(chunk_seconds * float(rate) / group))
    by_work = _CHUNK_WORK_SECONDS * flops / frame_flop
    by_bytes = _CHUNK_BYTES / target_frame_bytes
    return group * max(1, int(min(by_work, by_bytes, _CHUNK_VIDEO_SECONDS * rate) / group))


def lay_out(frames: int, limit: int, group: int, chunk_seconds: float | None) -> tuple[Chunk, ...]:
    """Cut `frames` frames into chunks of at most `limit`, fewer where that lets the stages of a short clip overlap."""
    if chunk_seconds is None:
        limit = min(limit, max(2 * group, group * (frames // (_FEWEST_CHUNKS * group))))
    return tuple(
        Chunk(index, first, min(first + limit, frames) - 1) for index, first in enumerate(range(0, frames, limit))
    )
