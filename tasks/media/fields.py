"""Interlaced pictures: how they are recognised, and how whole frames are made of their fields.

Flags in files are wrong often enough (progressive film in an interlaced stream, interlaced tape in a progressive one)
that pictures are looked at as well: some runs of consecutive ones, spread over the video. Two fields of one moment fit
together line by line; what moved between them shows as combs. So the combs of a picture are compared with those that
appear when each of its fields is woven with the other field of the next picture:

* of a progressive picture, both of these are two fields apart and worse than the picture itself;
* of an interlaced one, one of them is a single field apart, no worse than the picture, and the other three fields.

Frames are made by `bwdif`, which looks one picture back and one ahead: those are decoded too, so that a frame comes out
the same wherever a chunk begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Final

import av
import av.error
import numpy as np
from av.filter import Graph
from numpy.typing import NDArray

from tasks.errors import SettingsError, UnsupportedSourceError
from tasks.media.pixels import PictureFormat
from tasks.media.probe import SourceFacts, open_source, video_stream
from tasks.media.timestamps import Fields

#: What may be asked for: decide by flags and pictures; keep pictures as they are; a frame of each field.
DEINTERLACE: Final = ("auto", "off", "field-rate")

#: Runs of pictures that are looked at, and pictures of each: ten and more cadences of telecine altogether.
_RUNS: Final = 3
_RUN_PICTURES: Final = 20

#: Interlaced video has 480, 576 or 1080 rows (1088 with those that fill up a macroblock).
_MOST_ROWS: Final = 1088

#: Codecs without interlaced pictures; nobody has to look.
_PROGRESSIVE_CODECS: Final = ("vp8", "vp9", "av1", "theora", "gif", "apng")

#: Orders of `probe` whose top field is shown first.
_TOP_FIRST: Final = ("tt", "bt")


#: Columns that are looked at: every fourth.
_COLUMN_STEP: Final = 4

#: Code values by which a pixel changes that moves rather than being grain, and share of such pixels in a picture that
#: says something: what stands still looks the same in every weave.
_MOVED: Final = 4.0
_LEAST_MOVED: Final = 0.002

#: Combs of a weave count as more than those of another from this share on.
_MORE: Final = 1.1

#: Where the better one of two weaves lies between the picture itself (0) and the worse one (1).
_LIKE_ITSELF: Final = 0.35
_LIKE_THE_OTHER: Final = 0.6

#: Pictures that must look progressive before a flag that says otherwise is not believed.
_ENOUGH: Final = 5

#: A field is a repeated one if it changes by less than this share of what the other one changes by.
_REPEATED: Final = 0.25


@dataclass
class Seen:
    """What a sample of pictures looks like: how many were counted as what."""

    pictures: int = 0
    tff: int = 0
    bff: int = 0
    progressive: int = 0
    top_repeated: int = 0
    bottom_repeated: int = 0

    def add(self, luma: NDArray[np.float32], following: NDArray[np.float32]) -> None:
        """Count a picture, `[rows, columns]` with an even number of rows, by itself and the one that follows."""
        self.pictures += 1
        top, bottom = luma[0::2], luma[1::2]
        next_top, next_bottom = following[0::2], following[1::2]
        moved = np.abs(next_top - top), np.abs(next_bottom - bottom)
        where = np.maximum(*moved) > _MOVED
        own, tff, bff = (_combs(*pair, where) for pair in ((top, bottom), (next_top, bottom), (top, next_bottom)))
        least, most = sorted((tff, bff))
        if where.mean() > _LEAST_MOVED and most > _MORE * own:
            share = (least - own) / (most - own)
            if share > _LIKE_THE_OTHER:
                self.progressive += 1
            elif share < _LIKE_ITSELF and tff < bff:
                self.tff += 1
            elif share < _LIKE_ITSELF:
                self.bff += 1
        changes = [float(each.mean()) for each in moved]
        if where.mean() > _LEAST_MOVED:
            self.top_repeated += changes[0] < _REPEATED * changes[1]
            self.bottom_repeated += changes[1] < _REPEATED * changes[0]

    @property
    def interlaced(self) -> int:
        return self.tff + self.bff

    @property
    def is_telecined(self) -> bool:
        """Film at 24 frames/s in video of 30: of five pictures, one repeats a top field and one a bottom field."""
        least, most = 0.1 * self.pictures, 0.35 * self.pictures
        both = least <= self.top_repeated <= most and least <= self.bottom_repeated <= most
        return both and self.pictures >= 15 and self.progressive > 0 and self.interlaced > 0


def _combs(top: NDArray[np.float32], bottom: NDArray[np.float32], where: NDArray[np.bool_]) -> float:
    """How much lines stand out from those of the other field around them, in code values on average."""
    above = np.abs(bottom[:-1] - (top[:-1] + top[1:]) / 2)[where[:-1]]
    below = np.abs(top[1:] - (bottom[:-1] + bottom[1:]) / 2)[where[1:]]
    return float(above.sum() + below.sum()) / max(1, above.size + below.size)


@dataclass(frozen=True)
class FieldDecision:
    """What is done about fields, and why."""

    fields: Fields | None
    note: str
    """For people; empty where there is nothing to say."""


def decide_fields(facts: SourceFacts, wanted: str) -> FieldDecision:
    """Find out whether a source is interlaced and what to do about it.

    Args:
        facts: The probed source.
        wanted: A word of `DEINTERLACE`.

    Raises:
        SettingsError: `wanted` is none of them.
        UnsupportedSourceError: The source is telecined film, and nobody said what to do about it.
    """
    if wanted not in DEINTERLACE:
        raise SettingsError(f"unknown way to deinterlace {wanted!r}", f"Choose one of {', '.join(DEINTERLACE)}")
    flagged = facts.field_order not in ("progressive", "unknown")
    if not flagged and (facts.height > _MOST_ROWS or facts.codec in _PROGRESSIVE_CODECS):
        return FieldDecision(None, "")
    if wanted == "off":
        kept = f"its pictures are flagged as interlaced (field order {facts.field_order}) and are kept as they are"
        return FieldDecision(None, kept if flagged else "")
    seen = look(facts)
    if wanted == "auto" and seen.is_telecined:
        raise UnsupportedSourceError(
            f"{facts.path}: video stream {facts.video_index} is telecined film (3:2 pull-down: of {seen.pictures}"
            f" pictures, {seen.top_repeated} repeat a top field and {seen.bottom_repeated} a bottom field)",
            "Undo it first (ffmpeg -vf fieldmatch,decimate), or say --deinterlace field-rate or off",
        )
    order = _order(facts, seen, flagged)
    if order is None:
        was = f"flagged as interlaced (field order {facts.field_order}) but its pictures are progressive: kept"
        return FieldDecision(None, was if flagged else "")
    doubled = wanted == "field-rate"
    which = "a frame of each field" if doubled else "a frame of each picture"
    told = "" if flagged else ", although nothing in the file says so"
    first = "top" if order == "tff" else "bottom"
    return FieldDecision(
        Fields(order, doubled), f"interlaced, {first} field first{told}: deinterlaced with bwdif, {which}"
    )


def _order(facts: SourceFacts, seen: Seen, flagged: bool) -> str | None:
    """Which field comes first; `None` for pictures of one moment each."""
    said = "tff" if facts.field_order in _TOP_FIRST else "bff"
    counted = "tff" if seen.tff > seen.bff else "bff" if seen.bff > seen.tff else said
    if not flagged:
        return counted if 2 * seen.interlaced > seen.pictures else None
    if seen.interlaced > seen.progressive:
        return counted
    # Where next to nothing moves nobody can tell, and the flag stands.
    return None if seen.progressive >= max(_ENOUGH, 2 * seen.interlaced) else said


def look(facts: SourceFacts) -> Seen:
    """Look at some pictures; what does not decode is not looked at."""
    seen = Seen()
    with open_source(Path(facts.path)) as container:
        stream = video_stream(container, facts.video_index)
        stream.codec_context.thread_type = "AUTO"
        for run in range(_RUNS):
            if run:
                if not facts.duration_seconds or facts.duration_seconds < 4 * run:
                    break
                at = facts.start_seconds + facts.duration_seconds * run / _RUNS
                try:
                    container.seek(int(at * av.time_base), backward=True)
                except av.error.FFmpegError:
                    break
            _count(seen, _run(container, stream), facts)
    return seen


def _run(container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> Iterator[av.VideoFrame]:
    """Some consecutive pictures from where the container stands."""
    given = 0
    try:
        for frame in container.decode(stream):
            yield frame
            given += 1
            if given == _RUN_PICTURES:
                return
    except av.error.FFmpegError:
        return


def _count(seen: Seen, frames: Iterable[av.VideoFrame], facts: SourceFacts) -> None:
    before: NDArray[np.float32] | None = None
    for frame in frames:
        if (frame.width, frame.height) != (facts.width, facts.height):
            return
        # Grey of one byte is enough, and rows must not be resized: they are what is looked at.
        grey = frame.reformat(format="gray").to_ndarray()
        luma = grey[: 2 * (facts.height // 2), ::_COLUMN_STEP].astype(np.float32)
        if before is not None:
            seen.add(before, luma)
        before = luma


def deinterlaced(
    frames: Iterable[av.VideoFrame], picture: PictureFormat, time_base: Fraction, fields: Fields
) -> Iterator[av.VideoFrame]:
    """Frames made of consecutive interlaced pictures, with times in half of `time_base`."""
    mode = "send_field" if fields.doubled else "send_frame"
    yield from filtered(frames, picture, time_base, "bwdif", f"mode={mode}:parity={fields.order}:deint=all")


def filtered(
    frames: Iterable[av.VideoFrame], picture: PictureFormat, time_base: Fraction, name: str, arguments: str
) -> Iterator[av.VideoFrame]:
    """What one of ffmpeg's filters makes of frames, which are brought into the layout of `picture` before."""
    graph = Graph()
    layout = av.VideoFormat(picture.pix_fmt)
    source = graph.add_buffer(width=picture.width, height=picture.height, format=layout, time_base=time_base)
    chain = graph.add(name, arguments or None)
    sink = graph.add("buffersink")
    source.link_to(chain)
    chain.link_to(sink)
    graph.configure()
    for frame in frames:
        if (frame.width, frame.height) != (picture.width, picture.height):
            break
        pts = frame.pts
        if frame.format.name != picture.pix_fmt:
            frame = frame.reformat(format=picture.pix_fmt)
            frame.pts = pts
        frame.time_base = time_base
        source.push(frame)
        yield from _pulled(sink)
    source.push(None)
    yield from _pulled(sink)


def _pulled(sink: av.filter.FilterContext) -> Iterator[av.VideoFrame]:
    while True:
        try:
            frame = sink.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return
        assert isinstance(frame, av.VideoFrame)
        yield frame
