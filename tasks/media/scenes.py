"""Which parts of a video to look at: short excerpts, each inside one scene, as different from one another as they come.

    excerpts = choose_excerpts(facts, table, count=3, frames=48)

Some hundred pictures from all over the video are looked at, key frames where it has enough of them, so that a feature
film costs a seek and one decoded picture each. What is flat or black is left out. Then, one after another, the picture
that differs most from those chosen so far is taken, and the frames around it are decoded to find the cuts there.
Nothing is left to chance: the same video gives the same excerpts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import av.error
import numpy as np
from numpy.typing import NDArray

from tasks.errors import FrameError
from tasks.media.changes import planes as planes_of
from tasks.media.decode import decode_frames, packed_planes
from tasks.media.keyframes import packets_from
from tasks.media.pixels import PictureFormat
from tasks.media.probe import SourceFacts, open_source, video_stream
from tasks.media.timestamps import FrameTable

#: Pictures that are looked at, at most.
MOST_LOOKS: Final = 200

#: Videos with fewer key frames than this are decoded from the start up to as many frames, and looked at now and then.
_FEWEST_KEYFRAMES: Final = 40
_FRAMES_DECODED: Final = 3000

#: Rows and columns of a thumbnail, and steps of the histogram of its brightness.
_GRID: Final = (9, 16)
_STEPS: Final = 16

#: A picture counts as flat or black where the brightness of its thumbnail varies by less, as share of the whole range.
_FLAT: Final = 0.03

#: Frames lie on both sides of a cut where their looks are at least so far apart, and several times as far as
#: neighbours around them usually are: a fast camera makes all frames differ.
_CUT: Final = 0.08
_CUT_TO_USUAL: Final = 4.0

#: Shorter pieces of a scene, as a share of what was asked for, are taken only where there is nothing else.
_SHORTEST: Final = 0.5

#: Too short scenes after which the search ends: a video of nothing but short ones has no better excerpts.
_MOST_SHORT: Final = 20


@dataclass(frozen=True)
class Excerpt:
    """A run of consecutive frames inside one scene."""

    first: int
    """Number of its first frame in the source."""
    last: int
    """Number of its last frame, included."""

    @property
    def frames(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True)
class Look:
    """What a frame looks like, small enough to compare hundreds."""

    frame: int
    """Its number in the source."""
    thumbnail: NDArray[np.float32]
    """Mean Y, U and V of the cells of a grid, in 0..1: `[3, rows, columns]`."""
    histogram: NDArray[np.float32]
    """Share of the pixels in each step of brightness."""

    @classmethod
    def at(cls, frame: int, planes: NDArray[np.uint8], picture: PictureFormat) -> Look:
        """Look at a frame given as packed planes, `uint8[picture.frame_bytes]`."""
        peak = float((1 << picture.layout.bits) - 1)
        views = planes_of(planes, picture)[:3]
        cells = [_cell_means(plane) / peak for plane in views]
        cells += [np.full_like(cells[0], 0.5)] * (3 - len(cells))  # Grey is neutral in both other planes.
        luma = views[0][::3, ::3]  # Every third sample in both directions tells as much.
        counts, _ = np.histogram(luma, bins=_STEPS, range=(0, peak))
        return cls(frame, np.stack(cells).astype(np.float32), (counts / luma.size).astype(np.float32))

    @property
    def is_flat(self) -> bool:
        """Whether there is nothing to see: black, one colour, or next to it."""
        return float(self.thumbnail[0].std()) < _FLAT and float(np.max(self.histogram)) > 0.6

    def apart(self, other: Look) -> float:
        """How different two looks are: 0 for the same, about 1 for black and white."""
        place = float(np.abs(self.thumbnail - other.thumbnail).mean(axis=(1, 2)) @ np.array([0.5, 1.0, 1.0]))
        tones = float(np.abs(self.histogram - other.histogram).sum()) / 2
        return 0.75 * place + 0.25 * tones


def choose_excerpts(facts: SourceFacts, table: FrameTable, count: int, frames: int) -> tuple[Excerpt, ...]:
    """Choose excerpts that show what a video is like.

    Args:
        facts: The probed source.
        table: Its frame table.
        count: Excerpts wanted; fewer come where the video is too short for them.
        frames: Frames of each; fewer where a scene is shorter.

    Returns:
        At least one excerpt, in the order of the video; none overlaps another.

    Raises:
        FrameError: Frames around a chosen picture cannot be decoded.
    """
    frames = max(1, min(frames, len(table)))
    seen = list(_looks(facts, table))
    looks = [look for look in seen if not look.is_flat] or seen
    if not looks:
        raise FrameError(f"{facts.path}: none of the frames that were looked at decodes", "Copy the file again")
    chosen: list[Excerpt] = []
    short: list[int] = []
    for look in _most_different(looks):
        if len(chosen) == count:
            break
        excerpt = _around(facts, table, look.frame, frames, chosen)
        if excerpt is None:
            continue
        if excerpt.frames >= _SHORTEST * frames:
            chosen.append(excerpt)
        else:
            short.append(look.frame)
        if len(short) == _MOST_SHORT:
            break
    for frame in short[: count - len(chosen)]:
        excerpt = _around(facts, table, frame, frames, chosen)
        chosen += [excerpt] if excerpt is not None else []
    return tuple(sorted(chosen, key=lambda excerpt: excerpt.first))


def find_cuts(looks: list[Look]) -> list[int]:
    """Numbers of the frames with which a new scene begins, among looks at consecutive frames."""
    steps = np.array([before.apart(after) for before, after in pairwise(looks)])
    if not len(steps):
        return []
    usual = float(np.median(steps))
    return [looks[index + 1].frame for index in np.flatnonzero(steps > max(_CUT, _CUT_TO_USUAL * usual))]


def _looks(facts: SourceFacts, table: FrameTable) -> Iterator[Look]:
    keys = np.intersect1d(table.pts, table.keyframes)
    if len(keys) >= _FEWEST_KEYFRAMES or len(table) > _FRAMES_DECODED:
        wanted = keys[_spread(len(keys))]
        for pts, planes in _key_frames(facts, table, wanted):
            yield Look.at(int(np.searchsorted(table.pts, pts)), planes, facts.picture)
        return
    wanted_numbers = set(_spread(len(table)).tolist())
    for number, planes in enumerate(decode_frames(facts, table, 0, len(table) - 1)):
        if number in wanted_numbers:
            yield Look.at(number, planes, facts.picture)


def _spread(count: int) -> NDArray[np.int64]:
    """At most `MOST_LOOKS` of so many numbers, evenly, the middles of equal parts."""
    parts = min(count, MOST_LOOKS)
    return (2 * np.arange(parts) + 1) * count // (2 * parts)


def _key_frames(
    facts: SourceFacts, table: FrameTable, wanted: NDArray[np.int64]
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Times and packed planes of key frames, each decoded by itself; those that do not decode are left out."""
    with open_source(Path(facts.path)) as container:
        stream = video_stream(container, facts.video_index)
        # Decoders of several frames at a time hold a single one back.
        stream.codec_context.thread_type = "SLICE"
        for pts in wanted.tolist():
            try:
                packet = next(packets_from(container, stream.index, table, pts), None)
                if packet is None:
                    continue
                shown = [*packet.decode(), *stream.codec_context.decode(None)]
                stream.codec_context.flush_buffers()
            except av.error.FFmpegError:
                continue
            for frame in shown:
                is_usual = (frame.width, frame.height, frame.format.name) == (facts.width, facts.height, facts.pix_fmt)
                if frame.pts == pts and is_usual and not frame.is_corrupt:
                    yield pts, packed_planes(frame, facts.picture)


def _most_different(looks: list[Look]) -> Iterator[Look]:
    """Looks in the order in which each differs most from all before; the first is the most usual one."""
    apart = np.array([[a.apart(b) for b in looks] for a in looks])
    index = int(np.argmin(apart.mean(axis=1)))
    nearest = apart[index]
    for _ in looks:
        yield looks[index]
        nearest = np.minimum(nearest, apart[index])
        nearest[index] = -1.0
        index = int(np.argmax(nearest))


def _around(facts: SourceFacts, table: FrameTable, frame: int, frames: int, taken: Sequence[Excerpt]) -> Excerpt | None:
    """At most so many frames around one, within its scene, with it in the middle where the scene allows.

    `None` where the frame itself is taken already.
    """
    begin, end = max(0, frame - frames), min(len(table) - 1, frame + frames)
    for excerpt in taken:
        if excerpt.first <= frame <= excerpt.last:
            return None
        if excerpt.last < frame:
            begin = max(begin, excerpt.last + 1)
        else:
            end = min(end, excerpt.first - 1)
    looks = [
        Look.at(begin + index, planes, facts.picture)
        for index, planes in enumerate(decode_frames(facts, table, begin, end))
    ]
    cuts = find_cuts(looks)
    begin = max([begin, *(cut for cut in cuts if cut <= frame)])
    end = min([end, *(cut - 1 for cut in cuts if cut > frame)])
    first = max(begin, min(frame - frames // 2, end - frames + 1))
    return Excerpt(first, min(end, first + frames - 1))


def _cell_means(plane: NDArray[Any]) -> NDArray[np.float64]:
    """Means of a plane over the cells of `_GRID`, or of a smaller grid where it has fewer samples."""
    rows, columns = (min(cells, size) for cells, size in zip(_GRID, plane.shape, strict=True))
    tops, lefts = np.arange(rows) * plane.shape[0] // rows, np.arange(columns) * plane.shape[1] // columns
    sums = np.add.reduceat(np.add.reduceat(plane, tops, axis=0, dtype=np.uint32), lefts, axis=1)
    heights, widths = np.diff([*tops, plane.shape[0]]), np.diff([*lefts, plane.shape[1]])
    means = sums / np.outer(heights, widths)
    if means.shape != _GRID:  # Planes of one frame are stacked: all get the same grid.
        means = means[np.ix_(np.arange(_GRID[0]) * rows // _GRID[0], np.arange(_GRID[1]) * columns // _GRID[1])]
    return means
