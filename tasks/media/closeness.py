"""How close encoded frames are to the frames they were made of: what tells a wrong frame from a right one.

A decoded frame of the result is shrunk to the size of its source and compared with it, and with the frames before and
after: one that belongs beside its place is closer to its neighbour. How far it is from its source is measured between
means of blocks. Models change how sharp a picture is and how much noise it has, up to all of it, and the means stay; a
frame that shows something else has others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from tasks.media.changes import planes
from tasks.media.pixels import PictureFormat

Luma = NDArray[np.float32]

#: A neighbour is closer if its mean squared error, in squares of 8-bit code values, is below this share of the own one.
_CLOSER = 0.7

#: Errors below this are those of encoding: nobody can tell which of two still frames one was made of.
_NOTHING = 4.0

#: Side of the blocks in pixels of the source.
_BLOCK = 8

_PEAK = 255.0


@dataclass
class Closeness:
    """What was found of a chunk."""

    worst: float = math.inf
    """PSNR between the block means of the frame farthest from its source and those of the source, in dB."""
    worst_frame: int = 0
    """Its number within the chunk."""
    misplaced: int = 0
    """Frames that are closer to the frame before or after their source than to their source."""
    _given: Iterator[Luma] = field(default_factory=lambda: iter(()), repr=False)
    _near: list[Luma | None] = field(default_factory=list, repr=False)
    _count: int = 0
    _reformatter: VideoReformatter = field(default_factory=VideoReformatter, repr=False)  # Knows its filters by now.

    @classmethod
    def to(cls, frames: Iterable[NDArray[np.uint8]], picture: PictureFormat) -> Closeness:
        """Of a chunk whose source frames are these, `uint8[picture.frame_bytes]` each."""
        given = (_luma(frame, picture) for frame in frames)
        return cls(_given=given, _near=[None, None, next(given, None)])

    def add(self, frame: av.VideoFrame, target: PictureFormat) -> None:
        """Compare the next decoded frame, which has the layout `target`."""
        self._near = [*self._near[1:], next(self._given, None)]
        before, own, after = self._near
        if own is None:
            return
        shown = _shrunk(frame, target, own.shape, self._reformatter)
        difference = shown - own
        psnr = 10 * math.log10(_PEAK**2 / max(_mean_square(_block_means(difference)), 1e-3))
        if psnr < self.worst:
            self.worst, self.worst_frame = psnr, self._count
        if (error := _mean_square(difference)) > _NOTHING:
            beside = (_mean_square(shown - each) for each in (before, after) if each is not None)
            self.misplaced += min(beside, default=error) < _CLOSER * error
        self._count += 1


def _mean_square(luma: Luma) -> float:
    rows = np.einsum("ij,ij->i", luma, luma)  # Without a copy of all squares; a row is short enough for fp32.
    return float(rows.sum(dtype=np.float64)) / luma.size


def _block_means(luma: Luma) -> Luma:
    """Means of square blocks; of rows and columns that fill no block, of what there is."""
    rows, columns = (range(0, side, _BLOCK) for side in luma.shape)
    sums: Luma = np.add.reduceat(np.add.reduceat(luma, rows, axis=0), columns, axis=1)
    heights, widths = (np.minimum(_BLOCK, side - np.arange(0, side, _BLOCK)) for side in luma.shape)
    return (sums / np.outer(heights, widths)).astype(np.float32)


def _luma(frame: NDArray[np.uint8], picture: PictureFormat) -> Luma:
    """Brightness in 8-bit code values of full range, `[rows, columns]`."""
    given = planes(frame, picture)[: 3 if picture.layout.model == "rgb" else 1]
    return _brightness([plane.astype(np.float32) for plane in given], picture, picture.layout.bits)


def _brightness(given: list[Luma], picture: PictureFormat, bits: int) -> Luma:
    if picture.layout.model == "rgb":
        green, blue, red = given
        return (0.2126 * red + 0.7152 * green + 0.0722 * blue) * (_PEAK / ((1 << bits) - 1))
    if picture.colour.full_range:
        return given[0] * (_PEAK / ((1 << bits) - 1))
    unit = 1 << (bits - 8)
    luma = given[0]
    luma -= 16 * unit
    luma *= _PEAK / (219 * unit)
    return luma


def _shrunk(frame: av.VideoFrame, target: PictureFormat, shape: tuple[int, ...], reformatter: VideoReformatter) -> Luma:
    """Brightness of a decoded frame at the size of its source."""
    # Eight bits are enough to tell pictures apart, and libswscale shrinks grey ten times as fast as numpy would.
    bits = frame.format.components[0].bits
    count = 3 if target.layout.model == "rgb" else 1
    if len(frame.planes) < count:
        frame = frame.reformat(format=target.pix_fmt)  # Packs of samples.
    small = []
    for plane in frame.planes[:count]:
        rows, columns = plane.height, plane.width
        samples: NDArray[Any] = np.frombuffer(memoryview(plane), "u1" if bits == 8 else "<u2").reshape(rows, -1)[
            :, :columns
        ]
        grey = samples if bits == 8 else (samples >> (bits - 8)).astype(np.uint8)
        whole = av.VideoFrame.from_numpy_buffer(grey, format="gray")
        shrunk = reformatter.reformat(whole, shape[1], shape[0], interpolation=Interpolation.AREA, threads=1)
        small.append(shrunk.to_ndarray().astype(np.float32))
    return _brightness(small, target, 8)
