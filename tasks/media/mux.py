"""Joining encoded chunks with everything else of the source into the result.

One pass writes the file: the video packets of all chunks with the exact presentation times of the frame table, and the
packets of every other stream as they are, all shifted by the source's start time. No time is ever computed from a rate.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePath
from typing import Any, Final

import av
import av.error
import numpy as np
import xxhash
from av.container import InputContainer, OutputContainer
from av.stream import Discard
from numpy.typing import NDArray

from tasks.errors import ChunkFileError, SettingsError
from tasks.media import ffmpeg
from tasks.media.encoders import packets_in_decoding_order
from tasks.media.probe import SourceFacts, open_source
from tasks.media.timestamps import FrameTable

#: File name ending of the result -> libavformat's muxer.
MUXERS: Final = {"mp4": "mp4", "m4v": "mp4", "mov": "mov", "mkv": "matroska"}

#: The container that holds the most kinds of streams.
_ROOMIEST: Final = "matroska"

#: Entries of the container's metadata that describe the old file, not the work.
_OWN_TO_FILE: Final = frozenset({"major_brand", "minor_version", "compatible_brands", "encoder"})


@dataclass(frozen=True)
class Carried:
    """Which streams of the source go into the result besides the upscaled one."""

    indexes: tuple[int, ...]
    left_out: dict[int, str]
    """Stream index -> why it cannot be carried."""


@dataclass(frozen=True)
class MuxReport:
    """What was written."""

    video_packets: int
    video_digest: str
    """XXH3 (128 bits) over the video packets in decoding order."""
    other_packets: dict[int, int]
    """Source stream index -> packets copied."""
    other_digests: dict[int, str]
    """Source stream index -> XXH3 (128 bits) over its packets."""
    other_spans: dict[int, tuple[float, float]]
    """Source stream index -> times of its first and last packet in the result, in seconds."""


def muxer_of(path: PurePath) -> str:
    """The muxer for a file name.

    Raises:
        SettingsError: The ending names no container that is handled.
    """
    ending = path.suffix.lower().removeprefix(".")
    if ending not in MUXERS:
        raise SettingsError(
            f"cannot tell the container from the destination name {path.name!r}",
            f"End it with one of {', '.join('.' + name for name in MUXERS)}",
        )
    return MUXERS[ending]


def plan_carried(facts: SourceFacts, muxer: str) -> Carried:
    """Find out, by asking the muxer itself, which other streams the result can hold."""
    indexes, left_out = [], {}
    with open_source(Path(facts.path)) as source:
        for stream in source.streams:
            if stream.index == facts.video_index:
                continue
            kind = facts.streams[stream.index].kind
            if kind == "data" and _is_written_anew(stream):
                continue
            if kind == "video" and not facts.streams[stream.index].cover_art:
                left_out[stream.index] = "another video stream; one is upscaled per job"
                continue
            reason = _refusal(stream, muxer)
            if reason is None:
                indexes.append(stream.index)
            else:
                # A result of another name, or `--container` where results go into a folder.
                way_out = muxer != _ROOMIEST and _refusal(stream, _ROOMIEST) is None
                left_out[stream.index] = f"{reason}; a .mkv result can hold it" if way_out else reason
    return Carried(tuple(indexes), left_out)


def _is_written_anew(stream: Any) -> bool:
    """Whether the muxer itself makes this stream: timecode, or the titles of chapters, of MP4 and MOV."""
    return "timecode" in stream.metadata or stream.discard == Discard.all


def _timecode(source: InputContainer) -> str | None:
    """Timecode of the first picture, from wherever the source keeps it."""
    said = [source.metadata, *(stream.metadata for stream in source.streams if stream.type in ("video", "data"))]
    found = [value for metadata in said for name, value in metadata.items() if name.lower() == "timecode"]
    return found[0] if found else None


def _refusal(stream: Any, muxer: str) -> str | None:
    """Why a container cannot hold a stream; `None` if it can. Writes a header into memory to find out."""
    try:
        with av.open(io.BytesIO(), "w", format=muxer) as trial:
            _add_copy(trial, stream)
            trial.start_encoding()
    except (av.error.FFmpegError, ValueError, TypeError, RuntimeError) as error:
        codec = getattr(getattr(stream, "codec_context", None), "name", None) or stream.type
        return f"{codec} cannot be stored in {muxer} ({str(error).splitlines()[0]})"
    return None


def _stream_metadata(stream: Any) -> dict[str, str]:
    """What a stream says about itself, not about the file it was in; MP4 calls a title a name."""
    said = {key: value for key, value in stream.metadata.items() if key not in ("encoder", "vendor_id")}
    if "name" in said:
        said.setdefault("title", said["name"])
    return said


def _add_copy(output: OutputContainer, stream: Any) -> Any:
    copy = output.add_stream_from_template(stream)
    copy.metadata.update(_stream_metadata(stream))
    copy.disposition = stream.disposition
    copy.time_base = stream.time_base
    return copy


def mux(
    facts: SourceFacts,
    table: FrameTable,
    chunks: Sequence[Path],
    carried: Carried,
    target: Path,
    muxer: str,
    sample_aspect_ratio: Fraction | None = None,
) -> MuxReport:
    """Write the result.

    Args:
        facts: The probed source.
        table: Presentation times; as many as the chunks hold frames.
        chunks: Encoded chunks in order.
        carried: Other streams to copy.
        target: File to write.
        muxer: libavformat's name of the container.
        sample_aspect_ratio: Width to height of one sample, where the stream cannot say it.

    Raises:
        FfmpegError: ffmpeg was killed or failed.
        ChunkFileError: The chunks hold another number of frames than the table.
    """
    options = _muxer_options(muxer, table)
    if sample_aspect_ratio not in (None, 1):
        # PyAV keeps the shape of samples to itself; ffmpeg copies the file once more and says it.
        unshaped = target.with_name(f"{target.name}.partial-unshaped")
        try:
            report = mux(facts, table, chunks, carried, unshaped, muxer)
            _say_shape(unshaped, target, muxer, options, sample_aspect_ratio)
        finally:
            unshaped.unlink(missing_ok=True)
        return report
    with (
        open_source(Path(facts.path)) as source,
        av.open(f"file:{target}", "w", format=muxer, options=options) as output,
    ):
        with av.open(f"file:{chunks[0]}") as first:
            # Opaque: all that the stream says of itself, shape and colour included, and no encoder is looked for.
            encoded = first.streams.video[0]
            video = output.add_stream_from_template(encoded, opaque=True)
            if muxer in ("mp4", "mov") and encoded.codec_context.name in ("hevc", "prores"):
                # Players of Apple take HEVC by this name only; ProRes has one for each of its profiles.
                is_hevc = encoded.codec_context.name == "hevc"
                video.codec_context.codec_tag = "hvc1" if is_hevc else encoded.codec_context.codec_tag
        original = source.streams[facts.video_index]
        said = _stream_metadata(original)
        video.metadata.update({key: said[key] for key in ("language", "title", "handler_name") if key in said})
        video.disposition = original.disposition
        video.time_base = table.time_base
        if table.constant:
            video.rate = table.rate
        copies = {index: _add_copy(output, source.streams[index]) for index in carried.indexes}
        output.metadata.update({key: value for key, value in source.metadata.items() if key not in _OWN_TO_FILE})
        if facts.display_matrix:
            video.set_display_matrix(facts.display_matrix)
        if timecode := _timecode(source):
            video.metadata["timecode"] = timecode
        if source.chapters():
            output.set_chapters(source.chapters())
        digests = {index: xxhash.xxh3_128() for index in (facts.video_index, *copies)}
        counts = dict.fromkeys(digests, 0)
        spans: dict[int, tuple[float, float]] = {}
        start = Fraction(source.start_time or 0, av.time_base)
        video_packets = _timed_video_packets(chunks, table, start)
        for index, packet in _merged(video_packets, source, facts.video_index, tuple(copies), start):
            digests[index].update(payload(packet))
            counts[index] += 1
            if index != facts.video_index and packet.pts is not None and packet.time_base:
                seconds = float(packet.pts * packet.time_base)
                spans[index] = (spans.get(index, (seconds, seconds))[0], seconds)
            packet.stream = video if index == facts.video_index else copies[index]
            output.mux(packet)
    if counts[facts.video_index] != len(table):
        raise ChunkFileError(
            f"the encoded chunks hold {counts[facts.video_index]} frames, the source has {len(table)}",
            "Run the same command again with --fresh",
        )
    return MuxReport(
        video_packets=counts.pop(facts.video_index),
        video_digest=digests.pop(facts.video_index).hexdigest(),
        other_packets=counts,
        other_digests={index: digest.hexdigest() for index, digest in digests.items()},
        other_spans=spans,
    )


def _muxer_options(muxer: str, table: FrameTable) -> dict[str, str]:
    # Nothing is shifted behind our back: negative times of audio priming stay negative.
    options = {"fflags": "+bitexact", "avoid_negative_ts": "disabled"}
    if muxer == "matroska":
        options |= {"default_mode": "passthrough"}  # No stream becomes a default one that was none.
    if muxer in ("mp4", "mov"):
        # Both clocks are the source's own: the track's holds every time, the movie's holds where the track starts.
        scale = str(_timescale(table.time_base))
        options |= {"movflags": "+faststart", "video_track_timescale": scale, "movie_timescale": scale}
    return options


def shape_argument(width: int, height: int, sample_aspect_ratio: Fraction, profile: str = "the container") -> str:
    """The shape of a picture as ffmpeg must be told it for a copy: it keeps ratios of numbers up to 255.

    Raises:
        SettingsError: The shape is no such ratio.
    """
    shape = Fraction(width, height) * sample_aspect_ratio
    if sample_aspect_ratio != 1 and max(shape.numerator, shape.denominator) > _LARGEST_IN_RATIO:
        raise SettingsError(
            f"{profile} cannot store that samples of {width}x{height} are of shape {sample_aspect_ratio}",
            "Add --square-pixels, or choose --encoder h264 or h265",
        )
    return f"{shape.numerator}:{shape.denominator}"


_LARGEST_IN_RATIO: Final = 255


def _say_shape(
    source: Path, target: Path, muxer: str, options: dict[str, str], sample_aspect_ratio: Fraction | None
) -> None:
    """Copy a result, saying of what shape its samples are."""
    with av.open(f"file:{source}") as container:
        video = container.streams.video[0]
        shape = shape_argument(video.width, video.height, sample_aspect_ratio or Fraction(1))
    arguments = ["-protocol_whitelist", ffmpeg.PROTOCOLS, "-copyts", "-i", ffmpeg.file_argument(source)]
    # Timecode and titles of chapters are no streams here: the muxer makes them anew.
    arguments += ["-map", "0", "-map", "-0:d?", "-c", "copy", "-aspect:v:0", shape, "-f", muxer]
    arguments += [word for name, value in options.items() for word in (f"-{name}", value)]
    ffmpeg.run([*arguments, ffmpeg.file_argument(target)])


def is_blank(packet: av.Packet) -> bool:
    """Whether it is an empty line of MP4's subtitles, which its muxer adds to end the line before."""
    context = getattr(packet.stream, "codec_context", None)
    return packet.size == 2 and context is not None and context.name == "mov_text" and bytes(packet) == b"\0\0"


def payload(packet: av.Packet) -> memoryview:
    """The content of a packet, without the ADTS header that only transport streams put before AAC."""
    data = memoryview(packet)
    adts = len(data) > 7 and data[0] == 0xFF and data[1] & 0xF6 == 0xF0
    if not adts or packet.stream.codec_context.name != "aac":
        return data
    return data[7:] if data[1] & 1 else data[9:]


def _timescale(time_base: Fraction) -> int:
    """Ticks per second of the track: the time base's denominator, multiplied up until it is at least 1000."""
    scale = time_base.denominator
    while scale < 1000:
        scale *= 2
    return scale


def _ticks(start: Fraction, time_base: Fraction) -> int:
    return round(start / time_base)


def _timed_video_packets(chunks: Sequence[Path], table: FrameTable, start: Fraction) -> Iterator[av.Packet]:
    """Packets of all chunks in decoding order with times from the table, shifted by `-start` seconds."""
    pts: NDArray[np.int64] = table.pts - _ticks(start, table.time_base)
    gap = int(pts[1] - pts[0]) if len(pts) > 1 else max(1, round(1 / (table.rate * table.time_base)))
    first = 0
    for chunk in chunks:
        packets = list(packets_in_decoding_order(chunk))
        if first + len(packets) > len(pts):
            raise ChunkFileError(f"{chunk} holds more frames than planned", "Run the same command again with --fresh")
        for position, (packet, rank) in enumerate(packets):
            number = first + rank
            packet.time_base = table.time_base
            packet.pts = int(pts[number])
            packet.duration = int(pts[number + 1] - pts[number]) if number + 1 < len(pts) else gap
            # Decoding times run ahead of presentation times by the deepest reordering that H.264 and HEVC profiles here
            # use (two frames), and before frame 0 they continue the grid backwards.
            behind = first + position - _REORDER
            decoded = int(pts[behind]) if behind >= 0 else int(pts[0]) + behind * gap
            packet.dts = min(decoded, packet.pts)
            yield packet
        first += len(packets)


_REORDER: Final = 2


def _merged(
    video: Iterator[av.Packet], source: Any, video_index: int, indexes: tuple[int, ...], start: Fraction
) -> Iterator[tuple[int, av.Packet]]:
    """Interleave the video packets with those of the source's other streams by decoding time."""
    pending = next(video, None)

    def seconds(packet: av.Packet) -> float:
        return float((packet.dts if packet.dts is not None else packet.pts or 0) * (packet.time_base or 0))

    if indexes:
        for packet in source.demux([source.streams[index] for index in indexes]):
            if packet.size == 0 and packet.pts is None and packet.dts is None:
                continue
            index = packet.stream_index
            if packet.time_base:
                shift = _ticks(start, packet.time_base)
                packet.pts = None if packet.pts is None else packet.pts - shift
                packet.dts = None if packet.dts is None else packet.dts - shift
            while pending is not None and seconds(pending) <= seconds(packet):
                yield video_index, pending
                pending = next(video, None)
            yield index, packet
    while pending is not None:
        yield video_index, pending
        pending = next(video, None)
