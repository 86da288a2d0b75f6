"""Decoding exactly the frames `[first, last]` of a source, each recognised by its presentation time.

Decoding starts at the keyframe before the first wanted frame if nothing after it can refer to what was before it, and
else at the one before that: a group of pictures may be open. On the way, frames that none refers to are left out. A
wanted frame counts only if the decoder delivered it without an error and at exactly the time the frame table gives. If
one is missing, the range is decoded once more from the start of the file, which is slow and always right, before it is
given up by its number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import av.error
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType
from numpy.typing import NDArray

from tasks.errors import FrameError, UnsupportedSourceError
from tasks.media.fields import deinterlaced
from tasks.media.keyframes import packets_from, resets_decoder
from tasks.media.pixels import PictureFormat
from tasks.media.probe import SourceFacts, open_source, video_stream
from tasks.media.timestamps import FrameTable

#: Damage becomes an error of its packet instead of an invented picture.
_STRICT = {"err_detect": "explode+crccheck+bitstream+buffer"}


def decode_frames(
    facts: SourceFacts, table: FrameTable, first: int, last: int, *, threads: int = 0
) -> Iterator[NDArray[np.uint8]]:
    """Yield frames `first..last` in order.

    Args:
        facts: The probed source.
        table: Its frame table.
        first: Number of the first frame.
        last: Number of the last frame, included.
        threads: Decoder threads; 0 leaves the choice to the decoder.

    Yields:
        One frame, `uint8[frame_bytes]`, the planes of `facts.picture` without padding.

    Raises:
        FrameError: A frame cannot be decoded; carries its number.
        UnsupportedSourceError: A frame turns out to be of another size or pixel format.
    """
    if table.fields is None:
        for frame in _pictures(facts, table, first, last, threads):
            yield packed_planes(frame, facts.picture)
        return
    rate = 2 if table.fields.doubled else 1
    pictures = replace(table, pts=table.stream_pts, time_base=facts.time_base, fields=None)
    # One more on each side: the filter makes lines up from the pictures before and after.
    begin, end = max(0, first // rate - 1), min(len(pictures) - 1, last // rate + 1)
    wanted = table.pts[first : last + 1] * (2 // rate)  # The filter counts in halves of the stream's ticks.
    done = 0
    given = _pictures(facts, pictures, begin, end, threads)
    for frame in deinterlaced(given, facts.picture, facts.time_base, table.fields):
        if done < len(wanted) and frame.pts == wanted[done]:
            yield packed_planes(frame, facts.picture)
            done += 1
    if done < len(wanted):
        number = first + done
        raise FrameError(f"{facts.path}: frame {number} cannot be made of its fields", "Report this", frame=number)


def _pictures(facts: SourceFacts, table: FrameTable, first: int, last: int, threads: int) -> Iterator[av.VideoFrame]:
    """Pictures `first..last` of the stream, whose times `table` holds."""
    wanted = table.pts[first : last + 1]
    done = 0
    for start in dict.fromkeys((_start(facts, table, first), None)):
        for frame in _decode_from(facts, table, start, int(wanted[0]), int(wanted[-1]), threads):
            if done < len(wanted) and frame.pts == wanted[done]:
                _check(facts, frame, first + done)
                yield frame
                done += 1
            elif frame.pts is not None and done < len(wanted) and frame.pts > wanted[done]:
                break
        if done == len(wanted):
            return
    raise FrameError(
        f"{facts.path}: frame {first + done} at {table.seconds(first + done):.3f} s cannot be decoded",
        "The file is damaged there: copy it again, or use --salvage to keep what decodes",
        frame=first + done,
    )


def decodable_times(facts: SourceFacts, table: FrameTable) -> NDArray[np.int64]:
    """Presentation times, out of `table`, of the frames that decode: one full decode of the stream."""
    known = set(table.pts.tolist())
    found = [
        frame.pts
        for frame in _decode_from(facts, table, None, int(table.pts[0]), int(table.pts[-1]), 0, salvage=True)
        if frame.pts in known and frame.width == facts.width and frame.height == facts.height
    ]
    return np.unique(np.asarray(found, dtype=np.int64))


def _start(facts: SourceFacts, table: FrameTable, first: int) -> int | None:
    """Time of the keyframe to start at for a frame; `None` for the start of the file."""
    before = int(np.searchsorted(table.keyframes, table.pts[first], side="right"))
    if before < 2:
        return None
    # What cannot seek, or is damaged there, is decoded from the start in the end.
    with suppress(av.error.FFmpegError), open_source(Path(facts.path)) as container:
        last = int(table.keyframes[before - 1])
        packet = next(packets_from(container, facts.video_index, table, last), None)
        if packet is not None and resets_decoder(packet):
            return last
    return int(table.keyframes[before - 2]) if before > 2 else None


def _decode_from(
    facts: SourceFacts,
    table: FrameTable,
    start: int | None,
    first_pts: int,
    last_pts: int,
    threads: int,
    *,
    salvage: bool = False,
) -> Iterator[av.VideoFrame]:
    """Decode from a keyframe and yield the whole, undamaged frames with times in `[first_pts, last_pts]`.

    With `salvage` nothing between damage and the next intra picture is yielded: what refers to a lost picture decodes
    to something, but to nothing that was ever filmed. Without, the lost picture itself ends the job.
    """
    with open_source(Path(facts.path)) as container:
        stream = video_stream(container, facts.video_index)
        context = stream.codec_context
        # Not frame threads: with strict error detection one refused packet makes them refuse all that follow.
        context.thread_type = "SLICE"
        context.thread_count = threads
        context.options = _STRICT
        damaged = False
        packets = container.demux(stream) if start is None else packets_from(container, stream.index, table, start)
        for frame in _tolerant_decode(packets, context, first_pts):
            if frame is None:
                damaged = salvage
                continue
            damaged = damaged and frame.pict_type != PictureType.I
            if frame.pts == start and frame.pict_type == PictureType.I:
                start = None
            if frame.pts is None or frame.pts < first_pts or frame.is_corrupt or damaged:
                continue
            # A stream of intra refresh has "key frames" that are no whole pictures: nothing after one can be trusted.
            if frame.pts > last_pts or start is not None:
                return
            yield frame


def _tolerant_decode(
    packets: Iterator[av.Packet], context: VideoCodecContext, first_pts: int
) -> Iterator[av.VideoFrame | None]:
    """Frames a decoder gives, and `None` where it refused a packet; without those before a time that none refers to."""
    try:
        for packet in packets:
            # Of H.264 alone: what HEVC calls so, pictures of a higher temporal layer may refer to.
            is_early = context.name == "h264" and packet.pts is not None and packet.pts < first_pts
            context.skip_frame = "NONREF" if is_early else "DEFAULT"
            try:
                yield from context.decode(packet)
            except av.error.FFmpegError:
                yield None
    except av.error.FFmpegError:
        # The container itself ends in the middle: flush what the decoder still holds.
        try:
            yield from context.decode(None)
        except av.error.FFmpegError:
            return


def _check(facts: SourceFacts, frame: av.VideoFrame, number: int) -> None:
    if (frame.width, frame.height, frame.format.name) != (facts.width, facts.height, facts.pix_fmt):
        raise UnsupportedSourceError(
            f"{facts.path}: frame {number} changes to {frame.width}x{frame.height} {frame.format.name}"
            f" (before: {facts.width}x{facts.height} {facts.pix_fmt})",
            "Split the file where its format changes",
        )


def packed_planes(frame: av.VideoFrame, picture: PictureFormat) -> NDArray[np.uint8]:
    """The planes of a decoded frame without row padding, `uint8[frame_bytes]`.

    Pixels that a decoder gives in packs are unpacked; no sample changes by that.
    """
    if frame.format.name.replace("yuvj", "yuv") != picture.pix_fmt:
        frame = frame.reformat(format=picture.pix_fmt)
    packed = np.empty(picture.frame_bytes, dtype=np.uint8)
    offset = 0
    for plane, (rows, columns) in zip(frame.planes, picture.plane_shapes, strict=True):
        padded = np.frombuffer(memoryview(plane), dtype=np.uint8, count=rows * plane.line_size)
        row_bytes = columns * picture.bytes_per_sample
        target = packed[offset : offset + rows * row_bytes].reshape(rows, row_bytes)
        target[:] = padded.reshape(rows, plane.line_size)[:, :row_bytes]
        offset += target.size
    return packed
