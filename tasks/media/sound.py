"""Sound that a container cannot hold as it is: decoded once and kept without loss, each sample at its time.

What the decoder gives is kept to the bit: integers as FLAC, or as PCM where the container is edited rather than played
(MOV) or FLAC has no room; floating point as PCM. `SoundKeeper` decodes and encodes, `SoundReader` reads the result
back, and both put samples into one form, so that what they saw can be compared.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

import av
import av.error
import numpy as np
import xxhash
from numpy.typing import NDArray

from tasks.errors import SourceError
from tasks.media.ffmpeg import file_argument, said_by

#: Sample format of libavutil, packed -> the one that an encoder is given, its bits, and its dtype. Bytes become words.
KEPT_FORMATS: Final = {"u8": "s16", "s16": "s16", "s32": "s32", "flt": "flt", "dbl": "dbl"}
_DTYPES: Final = {"s16": np.dtype("<i2"), "s32": np.dtype("<i4"), "flt": np.dtype("<f4"), "dbl": np.dtype("<f8")}

#: Channels without places -> what they are taken for: MP4 stores no PCM without places.
_USUAL_LAYOUTS: Final = {"1 channels": "mono", "2 channels": "stereo"}

#: Most channels of a FLAC stream (RFC 9639), and most bits of a sample that every reader of it takes.
_FLAC_CHANNELS: Final = 8
_FLAC_BITS: Final = 24

#: Seconds by which a source's times may leave the count of its samples before the count begins anew: above what
#: containers that count milliseconds round, below the 45 ms at which early sound is noticed (ITU-R BT.1359).
_TOLERANCE: Final = Fraction(1, 50)

#: Samples of a packet of PCM.
_PCM_BLOCK: Final = 1024


@dataclass(frozen=True)
class Lossless:
    """How a sound is kept that cannot be copied."""

    encoder: str
    """`flac` or one of PCM, as libavcodec calls it."""
    sample_format: str
    """What the encoder takes: `s16`, `s32`, `flt` or `dbl`."""
    rate: int
    """Samples per second and channel."""
    layout: str
    """Channels, as libavutil names them."""
    why: str
    """Why it cannot be copied."""

    @property
    def name(self) -> str:
        """For people."""
        if self.encoder == "flac":
            return "FLAC"
        kind, bits = re.findall(r"pcm_([sf])(\d+)", self.encoder)[0]
        return f"PCM of {bits} bits" + (", floating point" if kind == "f" else "")


def lossless_of(frame: av.AudioFrame, bits: int, muxer: str, why: str) -> Lossless | None:
    """How sound like `frame` is kept in a container; `None` if there is no way.

    Args:
        frame: Decoded sound.
        bits: Of each of its samples that mean something.
        muxer: libavformat's name of the container.
        why: Why it cannot be copied.
    """
    sample_format = KEPT_FORMATS.get(frame.format.packed.name)
    if sample_format is None:
        return None
    is_integer = sample_format in ("s16", "s32")
    if is_integer and muxer != "mov" and bits <= _FLAC_BITS and frame.layout.nb_channels <= _FLAC_CHANNELS:
        encoder = "flac"
    elif is_integer:
        encoder = "pcm_s16le" if sample_format == "s16" else f"pcm_s{24 if bits <= 24 else 32}le"
    else:
        encoder = "pcm_f32le" if sample_format == "flt" else "pcm_f64le"
    return Lossless(encoder, sample_format, frame.sample_rate, usual_layout(frame.layout.name), why)


def usual_layout(name: str) -> str:
    """A layout of channels as libavutil names it, with places for one or two that have none."""
    return _USUAL_LAYOUTS.get(name, name)


def bits_of_sound(path: Path, index: int) -> int:
    """Bits of each sample of a stream of 32-bit integers that mean something: 32 unless its decoder says fewer."""
    # PyAV does not tell; ffmpeg says `s32 (24 bit)`.
    found = re.search(
        rf"Stream #0:{index}\b[^\n]*: Audio: [^\n]* s32p? \((\d+) bit\)", said_by(["-i", file_argument(path)])
    )
    return int(found.group(1)) if found else 32


def samples_of(frame: av.AudioFrame) -> NDArray[Any]:
    """Samples of a frame in the form in which they are kept and compared: [samples, channels], bytes made words."""
    values = frame.to_ndarray()
    values = values.T if frame.format.is_planar else values.reshape(-1, frame.layout.nb_channels)
    if values.dtype == np.uint8:
        values = (values.astype(np.int16) - 128) << 8
    return np.ascontiguousarray(values)


@dataclass(frozen=True)
class KeptSound:
    """What was written of a sound that was decoded."""

    digest: str
    """XXH3 (128 bits) over its samples, channels side by side."""
    samples: int
    """Per channel."""
    runs: tuple[tuple[int, float], ...]
    """Where the count of samples starts anew: number of a sample, and its time in the result in seconds."""
    damaged: int
    """Packets that could not be decoded: there is nothing at their times."""
    silence: float
    """Seconds of silence put into gaps, where the container counts samples instead of telling times."""
    dropped: float
    """Seconds of sound dropped that lay above earlier sound, where the container counts samples."""

    def notes(self, index: int) -> Iterator[str]:
        """What whoever asked should know about it."""
        if self.damaged:
            yield f"stream {index}: {self.damaged} packets of its sound are damaged; nothing is heard at their times"
        if self.silence:
            yield f"stream {index}: {self.silence:.2f} s of gaps in its sound are filled with silence"
        if self.dropped:
            yield f"stream {index}: {self.dropped:.2f} s of its sound lay above earlier sound and are left out"


class SoundKeeper:
    """Decodes the packets of one sound and encodes them without loss.

    A source's times round, jitter and drift, its samples do not: samples are counted from the first one's time, and
    the count starts anew where the source's times are more than `_TOLERANCE` beside it. MP4 and MOV tell no times of
    PCM; there, gaps are filled with silence, and what lies above earlier sound is dropped.

    Args:
        output: Where the stream is added.
        kept: How it is kept.
        muxer: libavformat's name of the container.
        last: End of the picture in seconds: a time that jumps beyond it is broken, and the sound goes on without a gap.
        name: Of the stream, for errors.
    """

    def __init__(
        self, output: av.container.OutputContainer, kept: Lossless, muxer: str, last: float, name: str
    ) -> None:
        self.stream: Any = output.add_stream(
            kept.encoder, rate=kept.rate, layout=kept.layout, format=kept.sample_format
        )
        self.stream.time_base = Fraction(1, kept.rate)
        self._kept, self._name = kept, name
        self._counts = muxer in ("mp4", "mov") and kept.encoder != "flac"
        self._tolerance, self._last = round(_TOLERANCE * kept.rate), round(last * kept.rate)
        self._digest = xxhash.xxh3_128()
        self._samples = self._damaged = self._silence = self._dropped = 0
        self._runs: list[tuple[int, float]] = []
        self._encoder: Any = None
        self._pending: NDArray[Any] | None = None
        self._next: int | None = None
        """Number of the sample after the last one taken, counted from time zero."""
        self._said: int | None = None
        """The last frame's time, as the source counts."""
        self._written: int | None = None
        """The last packet's time."""

    def take(self, packet: av.Packet) -> Iterator[av.Packet]:
        """Encoded packets that a packet of the source gives, for the muxer.

        Raises:
            SourceError: Its rate or its channels change.
        """
        try:
            frames: list[Any] = packet.decode()
        except av.error.FFmpegError:
            self._damaged += 1
            return
        for frame in frames:
            yield from self._place(frame)

    def end(self, packet: av.Packet) -> Iterator[av.Packet]:
        """What is left when the source has no more packets: `packet` is the empty one at its end."""
        yield from self.take(packet)
        yield from self._end_run()

    def report(self) -> KeptSound:
        """What was written so far."""
        rate = self._kept.rate
        return KeptSound(
            self._digest.hexdigest(), self._samples, tuple(self._runs), self._damaged,
            self._silence / rate, self._dropped / rate,
        )  # fmt: skip

    def _place(self, frame: av.AudioFrame) -> Iterator[av.Packet]:
        kept, samples = self._kept, samples_of(frame)
        found = (frame.sample_rate, usual_layout(frame.layout.name), samples.dtype)
        if found != (kept.rate, kept.layout, _DTYPES[kept.sample_format]):
            raise SourceError(
                f"{self._name} changes from {kept.rate} Hz {kept.layout} to {found[0]} Hz {found[1]} on its way",
                "Cut the file there, or convert its sound first",
            )
        at = self._next or 0
        # A time that repeats says nothing: RealMedia gives all packets of a block the time of its first.
        if frame.pts is not None and frame.pts != self._said and frame.time_base:
            self._said = frame.pts
            at = round(frame.pts * frame.time_base * kept.rate)
        if self._next is None:
            self._next = at
        late = at - self._next if at < max(self._last, self._next) else 0
        if abs(late) > self._tolerance and not self._counts:
            yield from self._end_run()
            # Packets never go back in time, which containers do not take, wherever the source's do.
            self._next = at if self._written is None else max(at, self._written + 1)
        elif late > self._tolerance:
            self._silence += late
            while late:
                piece = min(late, kept.rate)
                yield from self._encode(np.zeros((piece, samples.shape[1]), samples.dtype))
                late -= piece
        elif -late > self._tolerance:
            self._dropped += min(-late, len(samples))
            samples = samples[-late:]
        yield from self._encode(samples)

    def _encode(self, samples: NDArray[Any]) -> Iterator[av.Packet]:
        if not len(samples):
            return
        assert self._next is not None
        if self._encoder is None:
            self._encoder = av.CodecContext.create(self._kept.encoder, "w")
            self._encoder.sample_rate, self._encoder.layout = self._kept.rate, self._kept.layout
            self._encoder.format, self._encoder.time_base = self._kept.sample_format, Fraction(1, self._kept.rate)
            self._encoder.open()
            self._runs.append((self._samples, self._next / self._kept.rate))
        self._digest.update(samples.tobytes())
        self._samples += len(samples)
        self._next += len(samples)
        self._pending = samples if self._pending is None else np.concatenate([self._pending, samples])
        block = self._encoder.frame_size or _PCM_BLOCK
        while len(self._pending) >= block:
            yield from self._packets(self._pending[:block])
            self._pending = self._pending[block:]

    def _packets(self, samples: NDArray[Any] | None) -> Iterator[av.Packet]:
        frame = None
        if samples is not None:
            assert self._next is not None
            assert self._pending is not None
            flat = np.ascontiguousarray(samples).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(flat, format=self._kept.sample_format, layout=self._kept.layout)
            frame.sample_rate, frame.time_base = self._kept.rate, Fraction(1, self._kept.rate)
            frame.pts = self._next - len(self._pending)
        for packet in self._encoder.encode(frame):
            if packet.size:  # FLAC ends in an empty one with a digest of one run, where there may be several.
                packet.stream, packet.time_base = self.stream, Fraction(1, self._kept.rate)
                self._written = packet.pts
                yield packet

    def _end_run(self) -> Iterator[av.Packet]:
        if self._encoder is None:
            return
        if self._pending is not None and len(self._pending):
            yield from self._packets(self._pending)
        self._pending = None
        yield from self._packets(None)
        self._encoder = None


@dataclass
class SoundReader:
    """What is heard of one stream of a result, beside what was written."""

    wanted: KeptSound
    samples: int = 0
    """Per channel."""
    shift: float = 0.0
    """Largest distance in seconds of a frame from where it was written."""
    _digest: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)

    def take(self, packet: av.Packet) -> None:
        """Decode a packet of the result, or the empty one at its end.

        Raises:
            av.error.FFmpegError: It cannot be decoded.
        """
        frames: list[Any] = packet.decode()
        for frame in frames:
            values = samples_of(frame)
            if frame.time is not None and (runs := self.wanted.runs):
                start, seconds = runs[max(0, bisect_right(runs, self.samples, key=itemgetter(0)) - 1)]
                expected = seconds + (self.samples - start) / frame.sample_rate
                self.shift = max(self.shift, abs(frame.time - expected))
            self._digest.update(values.tobytes())
            self.samples += len(values)

    @property
    def digest(self) -> str:
        """XXH3 (128 bits) over the samples so far."""
        return self._digest.hexdigest()
