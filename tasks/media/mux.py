"""Joining encoded chunks with everything else of the source into the result.

One pass writes the file: the video packets of all chunks with the exact presentation times of the frame table, and the
packets of every other stream as they are, all shifted by the source's start time. No time is ever computed from a rate.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path, PurePath
from typing import Any, Final

import av
import numpy as np
import xxhash
from av.container import InputContainer, OutputContainer
from numpy.typing import NDArray

from tasks.errors import ChunkFileError, SettingsError
from tasks.media import ffmpeg
from tasks.media.carried import EXACT, Carried, add_copy, aside_input, open_aside, put_aside, stream_metadata
from tasks.media.encoders import packets_in_decoding_order
from tasks.media.probe import SourceFacts, open_source
from tasks.media.sound import KeptSound, SoundKeeper
from tasks.media.timestamps import FrameTable

#: File name ending of the result -> libavformat's muxer.
MUXERS: Final = {"mp4": "mp4", "m4v": "mp4", "mov": "mov", "mkv": "matroska"}

#: Entries of the container's metadata that describe the old file, not the work.
_OWN_TO_FILE: Final = frozenset({"major_brand", "minor_version", "compatible_brands", "encoder"})


@dataclass(frozen=True)
class MuxReport:
    """What was written."""

    video_packets: int
    video_digest: str
    """XXH3 (128 bits) over the video packets in decoding order."""
    other_packets: dict[int, int]
    """Source stream index -> packets copied; samples of PCM, which each container cuts into packets as it likes."""
    other_digests: dict[int, str]
    """Source stream index -> XXH3 (128 bits) over its packets."""
    other_spans: dict[int, tuple[float, float]]
    """Source stream index -> times of its first and last packet in the result, in seconds; of PCM, of its end."""
    kept: dict[int, KeptSound] = field(default_factory=dict)
    """Source stream index -> what was written of its sound, where that was decoded; it is in no other field."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What came up on the way that whoever asked should know."""
        return tuple(note for index, kept in self.kept.items() for note in kept.notes(index))


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


def _timecode(source: InputContainer) -> str | None:
    """Timecode of the first picture, from wherever the source keeps it."""
    said = [source.metadata, *(stream.metadata for stream in source.streams if stream.type in ("video", "data"))]
    found = [value for metadata in said for name, value in metadata.items() if name.lower() == "timecode"]
    return found[0] if found else None


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
    if sample_aspect_ratio in (None, 1) and not carried.by_program:
        return _write(facts, table, chunks, carried, target, muxer, {})
    # PyAV keeps the shape of samples to itself, and offers Matroska no sound that it knows by a number only; the ffmpeg
    # program copies the file once more and brings both.
    main = target.with_name(f"{target.name}.partial-main")
    aside = {index: target.with_name(f"{target.name}.partial-{index}") for index in carried.by_program}
    try:
        report = _write(facts, table, chunks, carried, main, muxer, aside)
        shape = None if sample_aspect_ratio in (None, 1) else sample_aspect_ratio
        _copy_on(facts, carried, main, aside, target, muxer, _muxer_options(muxer, table), shape)
    finally:
        for path in (main, *aside.values()):
            path.unlink(missing_ok=True)
    return report


def _write(
    facts: SourceFacts,
    table: FrameTable,
    chunks: Sequence[Path],
    carried: Carried,
    target: Path,
    muxer: str,
    aside: dict[int, Path],
) -> MuxReport:
    """Write the result, but for the streams that go into files `aside`."""
    with ExitStack() as stack:
        source = stack.enter_context(open_source(Path(facts.path)))
        start = Fraction(source.start_time or 0, av.time_base)
        options = _muxer_options(muxer, table)
        output = stack.enter_context(av.open(f"file:{target}", "w", format=muxer, options=options))
        video = _add_picture(output, chunks[0], source.streams[facts.video_index], table, muxer)
        copies: dict[int, Any] = {}
        others: dict[int, OutputContainer] = {}
        keepers: dict[int, SoundKeeper] = {}
        for index in carried.indexes:
            stream = source.streams[index]
            if index in carried.kept:
                name = f"{facts.path}: sound of stream {index}"
                last = float(table.pts[-1] * table.time_base + 1 / table.rate - start)
                keepers[index] = SoundKeeper(output, carried.kept[index], muxer, last, name)
                keepers[index].stream.metadata.update(stream_metadata(stream))
                keepers[index].stream.disposition = stream.disposition
            elif index in aside:
                others[index] = stack.enter_context(open_aside(aside[index]))
                copies[index] = add_copy(others[index], stream)
            else:
                copies[index] = add_copy(output, stream)
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
        video_packets = _timed_video_packets(chunks, table, start)
        for index, packet in _merged(video_packets, source, facts.video_index, carried.indexes, start):
            is_end = packet.size == 0 and packet.pts is None and packet.dts is None
            if index in keepers:
                # One by one: a gap may be an hour of silence.
                for encoded in keepers[index].end(packet) if is_end else keepers[index].take(packet):
                    output.mux(encoded)
                continue
            if is_end:
                continue
            digests[index].update(payload(packet))
            counts[index] += units(packet)
            if index != facts.video_index and (times := times_of(packet)):
                spans[index] = (spans.get(index, times)[0], times[1])
            if index in others:
                put_aside(others[index], packet, copies[index])
                continue
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
        kept={index: keeper.report() for index, keeper in keepers.items()},
    )


def _add_picture(output: OutputContainer, chunk: Path, original: Any, table: FrameTable, muxer: str) -> Any:
    """Add the stream of the upscaled picture: what an encoded chunk is, with what the original said about itself."""
    with av.open(f"file:{chunk}") as first:
        # Opaque: all that the stream says of itself, shape and colour included, and no encoder is looked for.
        encoded = first.streams.video[0]
        video = output.add_stream_from_template(encoded, opaque=True)
        if muxer in ("mp4", "mov") and encoded.codec_context.name in ("hevc", "prores"):
            # Players of Apple take HEVC by this name only; ProRes has one for each of its profiles.
            is_hevc = encoded.codec_context.name == "hevc"
            video.codec_context.codec_tag = "hvc1" if is_hevc else encoded.codec_context.codec_tag
    said = stream_metadata(original)
    video.metadata.update({key: said[key] for key in ("language", "title", "handler_name") if key in said})
    video.disposition = original.disposition
    video.time_base = table.time_base
    if table.constant:
        video.rate = table.rate
    return video


def _muxer_options(muxer: str, table: FrameTable) -> dict[str, str]:
    options = dict(EXACT)
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


def _copy_on(
    facts: SourceFacts,
    carried: Carried,
    main: Path,
    aside: dict[int, Path],
    target: Path,
    muxer: str,
    options: dict[str, str],
    sample_aspect_ratio: Fraction | None,
) -> None:
    """Copy a result by the ffmpeg program, with the sound that lies `aside`, saying of what shape its samples are."""
    arguments = ["-copyts", "-protocol_whitelist", ffmpeg.PROTOCOLS, "-i", ffmpeg.file_argument(main)]
    for path in aside.values():
        arguments += aside_input(path)
    if aside:
        arguments += _in_order(facts, carried, tuple(aside))
    else:
        # Timecode and titles of chapters are no streams here: the muxer makes them anew.
        arguments += ["-map", "0", "-map", "-0:d?"]
    arguments += ["-c", "copy"]
    if sample_aspect_ratio is not None:
        with av.open(f"file:{main}") as container:
            video = container.streams.video[0]
            arguments += ["-aspect:v:0", shape_argument(video.width, video.height, sample_aspect_ratio)]
    arguments += ["-f", muxer, *(word for name, value in options.items() for word in (f"-{name}", value))]
    ffmpeg.run([*arguments, ffmpeg.file_argument(target)])


def _in_order(facts: SourceFacts, carried: Carried, aside: tuple[int, ...]) -> list[str]:
    """Arguments that put the streams of the main file and those aside into the order of the source."""
    arguments, number = ["-map", "0:0"], 1
    with open_source(Path(facts.path)) as source:
        streams = [source.streams[facts.video_index], *(source.streams[index] for index in carried.indexes)]
        for place, stream in enumerate(streams):
            if stream.index in aside:
                arguments += ["-map", f"{aside.index(stream.index) + 1}:0"]
                said = [f"{key}={value}" for key, value in stream_metadata(stream).items()]
                arguments += [word for pair in said for word in (f"-metadata:s:{place}", pair)]
            elif place:
                arguments += ["-map", f"0:{number}"]
                number += 1
            # Of all, or the program chooses defaults of its own.
            arguments += [f"-disposition:{place}", str(int(stream.disposition))]
    return arguments


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


def units(packet: av.Packet) -> int:
    """What a packet counts for in `MuxReport.other_packets`."""
    return _pcm_samples(packet) or 1


def times_of(packet: av.Packet) -> tuple[float, float] | None:
    """What a packet says of `MuxReport.other_spans`: where it begins and, of PCM, where it ends; `None` if nothing."""
    if packet.pts is None or not packet.time_base:
        return None
    begin = float(packet.pts * packet.time_base)
    samples = _pcm_samples(packet)
    return begin, begin + samples / packet.stream.codec_context.sample_rate if samples else begin


def _pcm_samples(packet: av.Packet) -> int:
    """Samples per channel of a packet of plain PCM; 0 for anything else."""
    context = getattr(packet.stream, "codec_context", None)
    found = _PLAIN_PCM.fullmatch(context.name) if context is not None else None
    if context is None or found is None:
        return 0
    return int(packet.size // (int(found["bits"] or 8) // 8 * context.layout.nb_channels))


#: Codecs whose packets are samples side by side and nothing else.
_PLAIN_PCM: Final = re.compile(r"pcm_(?:[suf](?P<bits>8|16|24|32|64)(?:le|be)?|alaw|mulaw)")


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
    """Interleave the video packets with those of the source's other streams by decoding time.

    The empty packet at the end of each other stream is among them: it takes from a decoder what it holds back.
    """
    pending = next(video, None)

    def seconds(packet: av.Packet) -> float:
        return float((packet.dts if packet.dts is not None else packet.pts or 0) * (packet.time_base or 0))

    if indexes:
        for packet in source.demux([source.streams[index] for index in indexes]):
            index = packet.stream.index  # `stream_index` is 0 in the empty ones.
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
