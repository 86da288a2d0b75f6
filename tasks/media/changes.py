"""Which parts of a frame differ from the one before, and how to take parts of raw frames out and put them back.

What a filter with a limited reach makes of a picture can be kept where nothing within reach has changed. Encoders copy
blocks that stand still bit for bit, so in drawn animation, screen recordings and slides much of most frames is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tasks.media.pixels import PictureFormat

Frame = NDArray[np.uint8]

#: Changes are looked for in squares of this many luma pixels: the macroblock of H.264, and whole chroma cells.
BLOCK: Final = 16

#: Pixels that another box costs on top of its own, for what a pass takes however small it is.
_BOX_COST: Final = 4096

#: More boxes than this to begin with are one box: finding out how to group them would take longer than it saves.
_MOST_BOXES: Final = 24

#: A frame is kept in part only if less than this share of it has to be computed.
_WORTHWHILE: Final = 0.85


@dataclass(frozen=True)
class Box:
    """A rectangle of luma pixels, the last row and column not included."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        return self.right - self.left, self.bottom - self.top

    def grown(self, margin: int, width: int, height: int) -> Box:
        """With `margin` more pixels on each side, as far as a picture of that size goes."""
        return Box(
            max(0, self.top - margin),
            max(0, self.left - margin),
            min(height, self.bottom + margin),
            min(width, self.right + margin),
        )

    def with_(self, other: Box) -> Box:
        """The least box around both."""
        return Box(
            min(self.top, other.top),
            min(self.left, other.left),
            max(self.bottom, other.bottom),
            max(self.right, other.right),
        )

    def scaled(self, factor: int) -> Box:
        return Box(*(factor * side for side in (self.top, self.left, self.bottom, self.right)))

    def within(self, other: Box) -> Box:
        """The same box seen from the corner of one around it."""
        return Box(self.top - other.top, self.left - other.left, self.bottom - other.top, self.right - other.left)


@dataclass(frozen=True)
class Change:
    """A part of a frame that has to be computed."""

    changed: Box
    """All samples that differ lie in here."""
    affected: Box
    """All pixels that may come out differently."""
    needed: Box
    """All that these depend on."""


class ChangeFinder:
    """Finds what of a frame has to be computed when another one has been.

    Args:
        picture: Format of the frames.
        reach: How far a filter carries a change, in pixels; even.
        tolerance: Code values by which a sample may differ and still count as unchanged.
    """

    def __init__(self, picture: PictureFormat, reach: int, tolerance: int = 0) -> None:
        self._picture = picture
        self._reach = reach
        self._tolerance = tolerance

    def changes(self, frame: Frame, known: Frame) -> list[Change] | None:
        """What has to be computed of `frame` where what came out for `known` is at hand.

        Args:
            frame: uint8 `[frame_bytes]`.
            known: Another one.

        Returns:
            Nothing if no sample differs; `None` if computing all of the frame is no more work.
        """
        size = self._picture.width, self._picture.height
        most = _WORTHWHILE * size[0] * size[1]
        changed = self._changed_blocks(frame, known)
        if not changed.any():
            return []
        # Whatever the boxes, together they are no smaller than this: whole blocks within reach. It is found at once.
        within = _grown(changed, 2 * self._reach // BLOCK)[: size[1] // BLOCK, : size[0] // BLOCK]
        if np.count_nonzero(within) * BLOCK**2 > most:
            return None
        boxes = self._grouped(list(_runs(changed, self._picture)))
        if sum(map(self._cost, boxes)) > most:
            return None
        return [Change(box, box.grown(self._reach, *size), box.grown(2 * self._reach, *size)) for box in boxes]

    def _changed_blocks(self, frame: Frame, known: Frame) -> NDArray[np.bool_]:
        rows, columns = -(-self._picture.height // BLOCK), -(-self._picture.width // BLOCK)
        changed = np.zeros((rows, columns), bool)
        for plane, other, (cell_y, cell_x) in zip(
            planes(frame, self._picture), planes(known, self._picture), _cells(self._picture), strict=True
        ):
            if self._tolerance == 0:
                differs = plane != other
            else:
                differs = np.maximum(plane, other) - np.minimum(plane, other) > self._tolerance
            if differs.any():
                by_rows = np.logical_or.reduceat(differs, np.arange(0, len(plane), BLOCK // cell_y), axis=0)
                changed |= np.logical_or.reduceat(by_rows, np.arange(0, plane.shape[1], BLOCK // cell_x), axis=1)
        return changed

    def _cost(self, box: Box) -> int:
        return box.grown(2 * self._reach, self._picture.width, self._picture.height).area + _BOX_COST

    def _grouped(self, boxes: list[Box]) -> list[Box]:
        """Fewer boxes around them wherever that is less work."""
        if len(boxes) > _MOST_BOXES:
            around = boxes[0]
            for box in boxes:
                around = around.with_(box)
            return [around]
        while True:
            gains = [(self._cost(a) + self._cost(b) - self._cost(a.with_(b)), a, b) for a, b in combinations(boxes, 2)]
            gain, a, b = max(gains, key=lambda gain: gain[0], default=(-1, None, None))
            if a is None or b is None or gain < 0:
                return boxes
            boxes = [box for box in boxes if box is not a and box is not b] + [a.with_(b)]


def _grown(blocks: NDArray[np.bool_], margin: int) -> NDArray[np.bool_]:
    """With all blocks no more than `margin` blocks away, diagonally too."""
    for axis in (0, 1):
        count, places = blocks.shape[axis], np.arange(blocks.shape[axis])
        before = np.cumsum(np.insert(blocks, 0, False, axis), axis, dtype=np.int32)
        ends = np.take(before, np.minimum(places + margin + 1, count), axis)
        blocks = ends > np.take(before, np.maximum(places - margin, 0), axis)
    return blocks


def _runs(changed: NDArray[np.bool_], picture: PictureFormat) -> Iterator[Box]:
    """Boxes around neighbouring blocks of a row; equal ones of rows below one another are one box."""
    starts: dict[tuple[int, int], int] = {}  # First row of each run of columns that the last row had.
    for row, blocks in enumerate([*changed, np.zeros(changed.shape[1], bool)]):
        edges = np.flatnonzero(np.diff(blocks, prepend=False, append=False)).tolist()
        runs = set(zip(edges[0::2], edges[1::2], strict=True))
        for left, right in starts.keys() - runs:
            bottom = min(picture.height, row * BLOCK)
            yield Box(starts[left, right] * BLOCK, left * BLOCK, bottom, min(picture.width, right * BLOCK))
        starts = {run: starts.get(run, row) for run in runs}


def planes(frame: Frame, picture: PictureFormat) -> list[NDArray[Any]]:
    """Views `[rows, columns]` of the planes of a frame, of as many bytes per element as a sample has."""
    samples = frame if picture.bytes_per_sample == 1 else frame.view(np.uint16)
    views, start = [], 0
    for rows, columns in picture.plane_shapes:
        views.append(samples[start : start + rows * columns].reshape(rows, columns))
        start += rows * columns
    return views


def _cells(picture: PictureFormat) -> list[tuple[int, int]]:
    """Luma rows and columns that a sample of each plane stands for."""
    return [(1 << down, 1 << across) for down, across in picture.layout.shifts]


def _parts(frame: Frame, picture: PictureFormat, box: Box) -> Iterator[NDArray[Any]]:
    for plane, (cell_y, cell_x) in zip(planes(frame, picture), _cells(picture), strict=True):
        yield plane[box.top // cell_y : -(-box.bottom // cell_y), box.left // cell_x : -(-box.right // cell_x)]


def cut_out(frame: Frame, picture: PictureFormat, box: Box) -> Frame:
    """What `frame` shows in `box`, with corners on whole chroma cells, as a frame of its own: uint8 `[frame_bytes]`."""
    return np.concatenate([part.reshape(-1) for part in _parts(frame, picture, box)]).view(np.uint8)


def paste(frame: Frame, picture: PictureFormat, box: Box, part: Frame, part_picture: PictureFormat, at: Box) -> None:
    """Let `frame` show in `box` what `part` shows in `at`."""
    for target, source in zip(_parts(frame, picture, box), _parts(part, part_picture, at), strict=True):
        target[:] = source
