"""What of a source goes into the result besides the upscaled picture, and how: found out by asking the muxers.

A stream is copied, packet by packet, where the container takes it. PyAV offers Matroska no sound that it knows only by
its number in WAV files (WMA, ADPCM, G.711 …), though its muxer can write it and readers know it: the ffmpeg program
copies that. Sound that cannot be copied is kept without loss; everything else is left out by name.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, Final

import av
import av.error
from av.container import OutputContainer
from av.stream import Discard

from tasks.errors import SourceError
from tasks.media import ffmpeg
from tasks.media.probe import SourceFacts, open_source
from tasks.media.sound import KEPT_FORMATS, Lossless, bits_of_sound, lossless_of, samples_of, usual_layout

#: The container that holds the most kinds of streams.
ROOMIEST: Final = "matroska"

#: Muxer -> what its files are called, for people.
_ENDINGS: Final = {"matroska": ".mkv", "mp4": ".mp4", "mov": ".mov"}

#: Packets of a sound that are written and read back to find out whether it can be copied, and most that are looked at
#: where the first ones give no sound, because an edit list cuts them away.
_TRIAL_PACKETS: Final = 8
_MOST_TRIAL_PACKETS: Final = 10_000

#: What PyAV raises where a muxer does not take a stream or a packet of it.
_REFUSALS: Final = (av.error.FFmpegError, ValueError, TypeError, RuntimeError)

#: Options of every muxer. Nothing is shifted behind our back: negative times of audio priming stay negative.
EXACT: Final = {"fflags": "+bitexact", "avoid_negative_ts": "disabled"}

#: Seconds by which sound is late in the files between PyAV and the ffmpeg program: ASF has no negative times.
ASIDE_DELAY: Final = 60


@dataclass(frozen=True)
class Carried:
    """Which streams of the source go into the result besides the upscaled one."""

    indexes: tuple[int, ...]
    """All of them, in the order of the source."""
    left_out: dict[int, str]
    """Stream index -> why it cannot be carried."""
    by_program: tuple[int, ...] = ()
    """Those of `indexes` whose packets the ffmpeg program copies."""
    kept: dict[int, Lossless] = field(default_factory=dict)
    """Those of `indexes` that cannot be copied, and how they are kept."""

    def notes(self) -> Iterator[str]:
        """What whoever asked should know about streams that come out otherwise than they went in."""
        for index, kept in self.kept.items():
            yield f"stream {index} is kept as {kept.name}, sample by sample: {kept.why}"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Carried:
        """From what `dataclasses.asdict` and JSON made of it."""
        return cls(
            tuple(data["indexes"]),
            {int(index): why for index, why in data["left_out"].items()},
            tuple(data["by_program"]),
            {int(index): Lossless(**kept) for index, kept in data["kept"].items()},
        )


def plan_carried(facts: SourceFacts, muxer: str) -> Carried:
    """Find out, by asking the muxer itself, which other streams the result can hold, and how."""
    path = Path(facts.path)
    indexes: list[int] = []
    left_out: dict[int, str] = {}
    by_program: list[int] = []
    kept: dict[int, Lossless] = {}
    with open_source(path) as source:
        for stream in source.streams:
            if stream.index == facts.video_index:
                continue
            kind = facts.streams[stream.index].kind
            if kind == "data" and _is_written_anew(stream):
                continue
            if kind == "video" and not facts.streams[stream.index].cover_art:
                left_out[stream.index] = "another video stream; one is upscaled per job"
                continue
            reason = _refusal(path, stream, muxer)
            if reason is None:
                indexes.append(stream.index)
                continue
            sound = _opening(path, stream.index) if kind == "audio" else None
            is_known_by_number = sound is not None and _is_copied_by_program(sound)
            if muxer == ROOMIEST and is_known_by_number:
                indexes.append(stream.index)
                by_program.append(stream.index)
                continue
            # A result of another name, or `--container` where results go into a folder.
            way_out = muxer != ROOMIEST and (is_known_by_number or _refusal(path, stream, ROOMIEST) is None)
            hint = "; a .mkv result can hold it" if way_out else ""
            if sound is not None and (way := _lossless(sound, muxer, hint)) is not None:
                indexes.append(stream.index)
                kept[stream.index] = way
            else:
                left_out[stream.index] = reason + hint
    return Carried(tuple(indexes), left_out, tuple(by_program), kept)


def _is_written_anew(stream: Any) -> bool:
    """Whether the muxer itself makes this stream: timecode, or the titles of chapters, of MP4 and MOV."""
    return "timecode" in stream.metadata or stream.discard == Discard.all


def _refusal(path: Path, stream: Any, muxer: str) -> str | None:
    """Why a container cannot hold a stream; `None` if it can.

    Writes the first packets of sound, and of all else a header, into memory to find out: MP4 tells at its end only that
    it does not know the channels.
    """
    try:
        with av.open(io.BytesIO(), "w", format=muxer, options=EXACT) as trial:
            copy = add_copy(trial, stream)
            trial.start_encoding()
            if stream.type == "audio":
                for packet in _first_packets(path, stream.index, _TRIAL_PACKETS):
                    packet.stream = copy
                    trial.mux(packet)
    except _REFUSALS as error:
        codec = getattr(getattr(stream, "codec_context", None), "name", None) or stream.type
        return f"{codec} cannot be stored in {muxer} ({str(error).splitlines()[0]})"
    return None


def _first_packets(path: Path, index: int, count: int) -> Iterator[av.Packet]:
    """The first packets of a stream, from a reader of their own."""
    with open_source(path) as source:
        yield from islice((packet for packet in source.demux(source.streams[index]) if packet.size), count)


def stream_metadata(stream: Any) -> dict[str, str]:
    """What a stream says about itself, not about the file it was in; MP4 calls a title a name."""
    said = {key: value for key, value in stream.metadata.items() if key not in ("encoder", "vendor_id")}
    if "name" in said:
        said.setdefault("title", said["name"])
    return said


def add_copy(output: OutputContainer, stream: Any) -> Any:
    """Add a stream that takes the packets of `stream`."""
    copy = output.add_stream_from_template(stream)
    copy.metadata.update(stream_metadata(stream))
    copy.disposition = stream.disposition
    copy.time_base = stream.time_base
    if stream.type == "audio" and (layout := usual_layout(stream.layout.name)) != stream.layout.name:
        copy.codec_context.layout = layout
    return copy


def open_aside(path: Path) -> OutputContainer:
    """A file that takes nearly every kind of sound from PyAV, for the ffmpeg program to copy it on."""
    # ASF: it holds what is in the header of a WAV file, which is what Matroska holds of such sound, and whole packets.
    return av.open(f"file:{path}", "w", format="asf", options=EXACT)


def put_aside(output: OutputContainer, packet: av.Packet, stream: Any) -> None:
    """Write a packet into a file of `open_aside`, as one of `stream` of that file, `ASIDE_DELAY` later."""
    assert packet.time_base is not None
    pts, dts = (None if time is None else time * packet.time_base + ASIDE_DELAY for time in (packet.pts, packet.dts))
    # Counted finely: a tick of the source may be long, and the delay no whole number of them.
    packet.time_base = Fraction(1, av.time_base)
    packet.pts = None if pts is None else round(pts * av.time_base)
    packet.dts = None if dts is None else round(dts * av.time_base)
    packet.stream = stream
    output.mux(packet)


def aside_input(path: Path) -> list[str]:
    """Arguments by which the ffmpeg program reads a file of `open_aside`, its times as they were."""
    return ["-protocol_whitelist", ffmpeg.PROTOCOLS, "-itsoffset", str(-ASIDE_DELAY), "-i", ffmpeg.file_argument(path)]


@dataclass(frozen=True)
class _Opening:
    """The first packets of a sound and what they decode to."""

    path: Path
    index: int
    codec: str
    packets: tuple[bytes, ...]
    frames: tuple[av.AudioFrame, ...]

    @property
    def heard(self) -> tuple[Any, ...]:
        """What must be the same of a copy, but for what an edit list cuts from the beginning."""
        last = self.frames[-1]
        return self.codec, self.packets, last.sample_rate, last.layout.nb_channels

    @property
    def samples(self) -> bytes:
        """All of them, channels side by side."""
        return b"".join(samples_of(frame).tobytes() for frame in self.frames)


def _opening(path: Path, index: int, count: int | None = None) -> _Opening | None:
    """How a sound begins: `count` packets, or enough to hear something; `None` if nothing of it can be decoded."""
    packets: list[bytes] = []
    frames: list[Any] = []
    codec = ""
    for packet in _first_packets(path, index, count or _MOST_TRIAL_PACKETS):
        if packet.stream.codec_context is None:
            return None
        packets.append(bytes(packet))
        codec = packet.stream.codec_context.name
        with suppress(av.error.FFmpegError):
            frames += packet.decode()
        if count is None and frames and len(packets) >= _TRIAL_PACKETS:
            break
    return _Opening(path, index, codec, tuple(packets), tuple(frames)) if frames else None


def _is_copied_by_program(sound: _Opening) -> bool:
    """Whether Matroska takes the packets from the ffmpeg program and gives back the very packets and samples."""
    if sound.frames[0].format.packed.name not in KEPT_FORMATS:
        return False
    with tempfile.TemporaryDirectory(prefix="superres-") as folder:
        aside, copy = Path(folder) / "aside.asf", Path(folder) / "copy.mkv"
        try:
            with open_aside(aside) as output:
                taken = None
                for packet in _first_packets(sound.path, sound.index, len(sound.packets)):
                    taken = taken or add_copy(output, packet.stream)
                    put_aside(output, packet, taken)
            ffmpeg.run(["-copyts", *aside_input(aside), "-c", "copy", "-f", ROOMIEST, ffmpeg.file_argument(copy)])
            found = _opening(copy, 0, len(sound.packets))
        except (*_REFUSALS, ffmpeg.FfmpegError, SourceError):
            return False
    # What an edit list cuts from the beginning, such as priming, is in the copy: before time zero, as it is of AAC.
    return found is not None and found.heard == sound.heard and found.samples.endswith(sound.samples)


def _lossless(sound: _Opening, muxer: str, hint: str) -> Lossless | None:
    """How a sound is kept that cannot be copied; `None` if the container cannot hold that either."""
    first = sound.frames[0]
    why = f"{sound.codec} cannot be copied into {_ENDINGS[muxer]}{hint}"
    wide = first.format.packed.name == "s32"
    way = lossless_of(first, bits_of_sound(sound.path, sound.index) if wide else 16, muxer, why)
    if way is None:
        return None
    try:
        with av.open(io.BytesIO(), "w", format=muxer) as trial:
            trial.add_stream(way.encoder, rate=way.rate, layout=way.layout, format=way.sample_format)
            trial.start_encoding()
    except _REFUSALS:
        return None
    return way
