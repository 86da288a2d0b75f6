"""When each frame is shown: the table of presentation times of a stream, exact, in the stream's own time base.

The table is read from the packets (the file is read once, nothing is decoded). It is the only source of frame counts
and times in the project: `nb_frames`, `duration * rate` and `avg_frame_rate` of real files are often wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Final

import av.error
import numpy as np
import xxhash
from numpy.typing import NDArray

from tasks.errors import FrameError, SourceError, UnsupportedSourceError
from tasks.media.probe import SourceFacts, open_source

#: A declared duration may exceed the last packet by this much before the file counts as cut off, in seconds. Containers
#: round durations and add the last packet's own length; half a second is far above that and far below a real cut.
_DURATION_TOLERANCE = 0.5

#: Most frames by which decoding order and presentation order differ (H.264 and HEVC allow 16).
REORDER_DEPTH: Final = 16


@dataclass(frozen=True)
class Fields:
    """That pictures are two fields of different moments, and what is made of them."""

    order: str
    """`tff` or `bff`: which field is earlier, the top or the bottom one."""
    doubled: bool = False
    """A frame of each field instead of one of each picture."""


@dataclass(frozen=True)
class FrameTable:
    """Presentation times of all frames of a stream."""

    pts: NDArray[np.int64]
    """Strictly increasing presentation times in units of `time_base`, one per frame; index = frame number."""
    keyframes: NDArray[np.int64]
    """Presentation times of the packets a decoder can start at, increasing."""
    time_base: Fraction
    """Unit of the times in seconds."""
    rate: Fraction
    """Frames per second; exact for a constant rate, the average of a variable one."""
    constant: bool = True
    """Whether every time lies within one tick of `start + n / rate`."""
    fields: Fields | None = None
    """How each frame is made of the two fields of a picture of the stream; `None` if it is that picture."""

    def __len__(self) -> int:
        return len(self.pts)

    def seconds(self, frame: int) -> float:
        """Presentation time of a frame in seconds."""
        return float(self.pts[frame] * self.time_base)

    @property
    def stream_pts(self) -> NDArray[np.int64]:
        """Presentation times of the pictures that frames are made of, in the time base of the stream."""
        if self.fields is None or not self.fields.doubled:
            return self.pts
        return self.pts[::2] // 2

    def of_fields(self, fields: Fields) -> FrameTable:
        """The table of what comes out when the pictures of this one, of two fields each, are deinterlaced.

        At twice the rate, the second field is shown half-way to the next picture; after the last one, as long after the
        first field as it is in the picture before.
        """
        if not fields.doubled:
            return replace(self, fields=fields)
        last = 2 * self.pts[-1] - self.pts[-2] if len(self) > 1 else self.pts[-1] + _ticks_of(self)
        pts = np.empty(2 * len(self), np.int64)
        pts[0::2] = 2 * self.pts
        pts[1::2] = self.pts + np.append(self.pts[1:], last)
        return replace(self, pts=pts, time_base=self.time_base / 2, rate=2 * self.rate, fields=fields)

    @property
    def duration(self) -> Fraction:
        """Seconds from the first frame's start to the last frame's end."""
        return int(self.pts[-1] - self.pts[0]) * self.time_base + 1 / self.rate


def _ticks_of(table: FrameTable) -> int:
    return max(1, round(1 / (table.rate * table.time_base)))


@dataclass(frozen=True)
class PacketScan:
    """What one pass over a container's packets gives."""

    table: FrameTable
    digest: str
    """Hash (XXH3, 128 bits) of the packets of the stream: the content that everything downstream depends on."""
    cut_off_at: int | None
    """Number of whole frames before the file ends too early; `None` for a complete file."""


def scan_packets(facts: SourceFacts) -> PacketScan:
    """Read the frame table and the digest of the video stream: the whole file, unless it was the last one read.

    Args:
        facts: The probed source.

    Raises:
        SourceError: Two frames at one time.
        UnsupportedSourceError: Packets without timestamps.
    """
    return _scan(facts, Path(facts.path).stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _scan(facts: SourceFacts, modified: int) -> PacketScan:
    """`scan_packets` of a file last modified at `modified`, so that a request's check and its plan read it once."""
    path = Path(facts.path)
    pts: list[int] = []
    keyframes: list[int] = []
    untimed = packets = 0
    digest = xxhash.xxh3_128()
    last_end = 0.0
    with open_source(path) as container:
        try:
            for packet in container.demux():
                if packet.size == 0:
                    continue
                if packet.dts is not None and packet.time_base:
                    shown = packet.dts if packet.pts is None else packet.pts
                    last_end = max(last_end, float((shown + (packet.duration or 0)) * packet.time_base))
                if packet.stream_index != facts.video_index:
                    continue
                packets += 1
                if packet.is_discard:
                    continue
                digest.update(memoryview(packet))
                if packet.pts is None:
                    untimed += 1
                    continue
                digest.update(packet.pts.to_bytes(8, "little", signed=True))
                pts.append(packet.pts)
                if packet.is_keyframe:
                    keyframes.append(packet.pts)
        except av.error.FFmpegError as error:
            raise FrameError(
                f"{path}: reading stops after frame {len(pts)} ({error})", _CUT_REMEDY, frame=len(pts)
            ) from error
    if not pts and not untimed:
        raise SourceError(
            f"{path}: video stream {facts.video_index} holds no frame", "The file is damaged or was cut off"
        )
    if untimed:
        raise UnsupportedSourceError(
            f"{path}: {untimed} of {untimed + len(pts)} frames have no timestamp",
            # No copy helps: Matroska takes no packet without a time, and reads none of those before zero.
            "Decode it once into Matroska, without loss, which gives each frame a time"
            " (ffmpeg -i in -map 0 -dn -c copy -c:v ffv1 -enc_time_base demux out.mkv)",
        )
    times = np.sort(np.asarray(pts, dtype=np.int64))
    if np.any(np.diff(times) <= 0):
        at = int(np.argmax(np.diff(times) <= 0))
        raise SourceError(f"{path}: frames {at} and {at + 1} have the same timestamp", "The file is damaged")
    missing_seconds = 0.0
    if facts.duration_seconds is not None:
        missing_seconds = _end_seconds(facts) - last_end
    ends_in_packet = facts.container == "mpegts" and all(facts.size_bytes % size for size in (188, 192, 204))
    # Where packets lie in the order in which they are shown, a cut leaves no gap: a picture is shown longer there.
    is_reordered = bool(np.any(np.diff(pts[-REORDER_DEPTH:]) < 0))
    is_whole = facts.container == _MOV and 0 < facts.declared_frames <= packets
    if facts.container == "avi":
        # Its header counts the empty chunks too, which show the picture before for longer; its clock ticks in both.
        packets = max(packets, int(times[-1]) + 1)
    cut_off_at = _first_gap_at_end(times) if is_reordered and not is_whole else None
    if cut_off_at is None and (
        packets < facts.declared_frames or missing_seconds > _DURATION_TOLERANCE or ends_in_packet
    ):
        cut_off_at = len(times)
    rate = _constant_rate(facts, times) if cut_off_at is None else _declared_rate(facts, times)
    table = FrameTable(
        times,
        np.sort(np.asarray(keyframes, dtype=np.int64)),
        facts.time_base,
        rate or _average_rate(facts, times),
        constant=rate is not None,
    )
    return PacketScan(table, digest.hexdigest(), cut_off_at)


#: The demuxer of MP4 and MOV, whose index lists every packet.
_MOV = "mov,mp4,m4a,3gp,3g2,mj2"

_CUT_REMEDY = "Copy the file again, or use --salvage to keep what decodes"


def _end_seconds(facts: SourceFacts) -> float:
    """When the container says that it ends. What Matroska says counts from zero, wherever its first packet is."""
    assert facts.duration_seconds is not None
    return facts.duration_seconds + (0.0 if facts.container == "matroska,webm" else facts.start_seconds)


def refuse_cut_off(facts: SourceFacts, scan: PacketScan) -> None:
    """Refuse a file that ends before its declared length.

    Raises:
        FrameError: Naming the first frame that is not there.
    """
    if scan.cut_off_at is None:
        return
    declared = f"{facts.declared_frames} frames" if facts.declared_frames else f"{facts.duration_seconds or 0:.2f} s"
    raise FrameError(
        f"{facts.path} is cut off: frame {scan.cut_off_at} is the first one missing (the header declares {declared})",
        _CUT_REMEDY,
        frame=scan.cut_off_at,
    )


def _first_gap_at_end(times: NDArray[np.int64]) -> int | None:
    """Number of the first missing frame of a file whose end is gone in the middle of reordered pictures.

    Packets lie in decoding order, so a cut loses frames that are shown before the last ones that survive: a regular
    stream whose only gaps lie within the last few frames was cut.
    """
    gaps = np.diff(times)
    if len(gaps) <= REORDER_DEPTH:
        return None
    wide = np.flatnonzero(gaps > 1.5 * np.median(gaps))
    return int(wide[0]) + 1 if len(wide) and wide[0] >= len(gaps) - REORDER_DEPTH else None


def _declared_rate(facts: SourceFacts, times: NDArray[np.int64]) -> Fraction:
    measured = 1 / (Fraction(int(np.median(np.diff(times)))) * facts.time_base) if len(times) > 1 else None
    return facts.frame_rate or (nearest_standard_rate(measured) if measured else None) or measured or Fraction(25)


def _constant_rate(facts: SourceFacts, times: NDArray[np.int64]) -> Fraction | None:
    """The constant rate of a table, `None` if it varies.

    A stream has a constant rate when every time lies within one tick of `start + n / rate`: containers such as
    Matroska round each time to their tick, so exact equality cannot be asked for.
    """
    if len(times) == 1:
        return facts.frame_rate or Fraction(25)
    measured = Fraction(len(times) - 1) / (int(times[-1] - times[0]) * facts.time_base)
    candidates = [rate for rate in (facts.frame_rate, nearest_standard_rate(measured), measured) if rate]
    numbers = np.arange(len(times), dtype=np.float64)
    for rate in candidates:
        ideal = numbers * float(1 / (rate * facts.time_base))
        deviation = (times - times[0]) - ideal
        # The first time is rounded too, so the grid may sit anywhere within one tick: look at the spread.
        if deviation.max() - deviation.min() <= 1.01:
            return rate
    return None


def _average_rate(facts: SourceFacts, times: NDArray[np.int64]) -> Fraction:
    """Frames per second of a table whose rate varies: what lengths of groups and rate control go by, never times."""
    measured = Fraction(len(times) - 1) / (int(times[-1] - times[0]) * facts.time_base)
    return max(measured.limit_denominator(1000), Fraction(1, 1000))


def nearest_standard_rate(measured: Fraction) -> Fraction | None:
    """The rate of film or television within 0.02 % of a measured one, exact, or `None`."""
    for nominal in (12, 15, 24, 25, 30, 48, 50, 60, 90, 100, 120):
        for rate in (Fraction(nominal), Fraction(nominal * 1000, 1001)):
            if abs(measured / rate - 1) < Fraction(1, 5000):
                return rate
    return None
