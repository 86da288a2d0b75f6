"""What a source is: its streams, size, rate, pixels, colour, aspect and field order, read from the container.

`probe` opens the file with PyAV, decodes one frame, and returns plain facts. `refuse_unsupported` turns the facts that
cannot be processed faithfully into an error that names them. Both take a fraction of a second whatever the length.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import av
import av.error
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.stream import VideoStream as AvVideoStream

from tasks.errors import SettingsError, SourceError, UnsupportedSourceError
from tasks.media.ffmpeg import PROTOCOLS, file_argument, said_by
from tasks.media.light import Light
from tasks.media.pixels import PIXEL_LAYOUTS, Colour, PictureFormat, planar

#: Matrices, primaries and transfers: ITU-T H.273 code points, which libavutil uses too, in ffmpeg's names.
MATRICES: Final = {1: "bt709", 4: "fcc", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 8: "ycgco", 9: "bt2020nc"}
MATRICES.update({0: "gbr", 10: "bt2020c", 11: "smpte2085", 12: "chroma-derived-nc", 13: "chroma-derived-c"})
MATRICES.update({14: "ictcp"})
PRIMARIES: Final = {1: "bt709", 4: "bt470m", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 8: "film", 9: "bt2020"}
PRIMARIES.update({10: "smpte428", 11: "smpte431", 12: "smpte432", 22: "jedec-p22"})
TRANSFERS: Final = {
    1: "bt709",
    4: "bt470m",
    5: "bt470bg",
    6: "smpte170m",
    7: "smpte240m",
    8: "linear",
    11: "iec61966-2-4",
}
TRANSFERS.update(
    {13: "iec61966-2-1", 14: "bt2020-10", 15: "bt2020-12", 16: "smpte2084", 17: "smpte428", 18: "arib-std-b67"}
)
_UNSPECIFIED: Final = 2
_FULL_RANGE: Final = 2

#: Matrices that are more than a product with three weights: luma is not a sum of R'G'B', or codes are not of R'G'B'.
_UNUSABLE_MATRICES: Final = ("bt2020c", "smpte2085", "chroma-derived-nc", "chroma-derived-c", "ictcp")

#: Codecs whose streams can say where chroma lies, and those whose pictures have it in the middle of each cell.
_SAY_SITES: Final = ("h264", "hevc", "av1", "vp9", "ffv1")
_CENTRED: Final = ("mpeg1video", "mjpeg", "mjpegb")

#: Codecs in which grey that says nothing is of limited range, as their standards have it; elsewhere it is full.
_LIMITED_GREY: Final = ("h264", "hevc", "av1", "vp9")

#: Field orders of libavcodec (AVFieldOrder): 0 unknown, 1 progressive, the others interlaced.
FIELD_ORDERS: Final = {0: "unknown", 1: "progressive", 2: "tt", 3: "bb", 4: "tb", 5: "bt"}

#: Demuxers that read a picture, a list of other files or plain text rather than a video.
_PICTURE_DEMUXERS: Final = ("image2", "_pipe", "gif", "apng", "ico")
_LIST_DEMUXERS: Final = ("concat", "hls", "dash", "imf", "ffmetadata", "tty", "webvtt", "srt", "ass", "lrc", "sdp")

#: Pictures larger than this are refused before anything is decoded (8K is 7680 x 4320).
LARGEST_SIDE: Final = 16384


@dataclass(frozen=True)
class StreamFacts:
    """One stream of the container, as far as it matters for carrying it over."""

    index: int
    kind: str
    """`video`, `audio`, `subtitle`, `data` or `attachment`."""
    codec: str
    language: str | None
    title: str | None
    cover_art: bool
    """A still picture that a container carries as a video stream."""


@dataclass(frozen=True)
class SourceFacts:
    """What a source is."""

    path: str
    container: str
    """Name of the demuxer, for example `mov,mp4,m4a,3gp,3g2,mj2`."""
    size_bytes: int
    duration_seconds: float | None
    """As the container declares it."""
    start_seconds: float
    """Smallest start time of its streams as the container declares it."""
    streams: tuple[StreamFacts, ...]
    video_index: int
    """Index of the stream that is upscaled."""
    codec: str
    width: int
    height: int
    pix_fmt: str
    colour: Colour
    colour_assumed: tuple[str, ...]
    """Names of the colour fields that the source leaves open and a rule decided."""
    frame_rate: Fraction | None
    """Average rate in frames per second, exact; `None` when the container does not say."""
    time_base: Fraction
    """Unit of the stream's timestamps in seconds."""
    declared_frames: int
    """Frame count of the container's header; 0 when it has none."""
    sample_aspect_ratio: Fraction
    """Width to height of one sample; 1 when the source does not say."""
    field_order: str
    """`progressive`, `unknown`, or one of `tt`, `bb`, `tb`, `bt` for interlaced pictures."""
    rotation: int
    """Degrees by which a player turns the picture, counter-clockwise."""
    display_matrix: tuple[int, ...] = ()
    """How a player turns and mirrors the picture, nine numbers as libavutil has them; empty for not at all."""
    light: Light = field(default_factory=Light)
    """What the stream says about its mastering display and its brightest pixels."""

    @property
    def picture(self) -> PictureFormat:
        """Format of one decoded frame, planes without padding: `yuvj420p` and `nv12` are `yuv420p` then."""
        return PictureFormat(self.width, self.height, planar(self.pix_fmt) or self.pix_fmt, self.colour)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; rationals as `numerator/denominator`."""

        def plain(value: Any) -> Any:
            if isinstance(value, Fraction):
                return f"{value.numerator}/{value.denominator}"
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return [plain(item) for item in value] if isinstance(value, list | tuple) else value

        return {key: plain(value) for key, value in asdict(self).items()}


def open_source(path: Path) -> InputContainer:
    """Open a container for reading, restricted to the file itself.

    Raises:
        SourceError: It is not there, empty, or no container that is known.
    """
    try:
        if not path.exists():
            raise SourceError(f"{path} does not exist", "Check the path")
    except OSError as error:
        raise SourceError(f"{path} cannot be reached ({error.strerror})", "Check the path") from error
    if path.is_dir():
        raise SourceError(f"{path} is a directory", "Name one video file")
    if not path.is_file():
        raise SourceError(f"{path} is not a regular file", "Name one video file")
    if path.stat().st_size == 0:
        raise SourceError(f"{path} is empty (0 bytes)", "Copy the file again from where it came from")
    try:
        return av.open(f"file:{path}", options={"protocol_whitelist": PROTOCOLS}, metadata_errors="replace")
    except PermissionError as error:
        # A concat script that names files elsewhere ends in the same error as a file that must not be read.
        if os.access(path, os.R_OK):
            raise SourceError(*_why_unreadable(path)) from error
        raise SourceError(f"{path} cannot be read", "Check its permissions") from error
    except av.error.FFmpegError as error:
        raise SourceError(*_why_unreadable(path)) from error


def video_stream(container: InputContainer, index: int) -> AvVideoStream:
    """The video stream with this index in the container."""
    return next(stream for stream in container.streams.video if stream.index == index)


def _why_unreadable(path: Path) -> tuple[str, str]:
    with path.open("rb") as file:
        head = file.read(4096)
    if head[4:8] in (b"ftyp", b"mdat", b"moov", b"wide", b"free", b"skip"):
        return (
            f"{path} is an MP4/MOV file without its index (the moov atom): it is truncated or was never finished",
            "Copy it again, or repair it with a tool that rebuilds the index",
        )
    try:
        text = head.decode("utf-8").isprintable() or b"\n" in head
    except UnicodeDecodeError:
        text = False
    if text and b"\0" not in head:
        return f"{path} is a text file, not a video", "Name a video file"
    return f"{path} is not a video that can be read", "Check that it plays elsewhere; it may be damaged or encrypted"


def probe(path: Path, stream_index: int | None = None) -> SourceFacts:
    """Read the facts of a source.

    Args:
        path: The file.
        stream_index: Which of its video streams is meant; by default the largest that is no cover.

    Raises:
        SettingsError: `stream_index` is not one of a video stream.
        SourceError: It cannot be opened, holds no video, or its first frame cannot be decoded.
    """
    with open_source(path) as container:
        demuxer = container.format.name
        if any(name in demuxer for name in _LIST_DEMUXERS):
            raise SourceError(f"{path} is a {demuxer} list or text, not a video", "Name the video file itself")
        if any(name in demuxer for name in _PICTURE_DEMUXERS):
            raise SourceError(
                f"{path} is a picture ({demuxer.removesuffix('_pipe')}), not a video",
                "Use `Engine.upscale_rgb` from a notebook for stills, or name a video file",
            )
        streams = tuple(_stream_facts(stream) for stream in container.streams)
        stream = _best_video(container, streams) if stream_index is None else _named(container, stream_index, path)
        if stream is None:
            kinds = sorted({facts.kind for facts in streams}) or ["no stream at all"]
            raise SourceError(
                f"{path} holds no video (it holds: {', '.join(kinds)})", "Name a file with a video stream"
            )
        context = stream.codec_context
        if context.width <= 0 or context.height <= 0:
            raise SourceError(f"{path}: video stream {stream.index} has no picture size", "The file is damaged")
        if max(context.width, context.height) > LARGEST_SIDE:
            raise SourceError(
                f"{path}: video stream {stream.index} is {context.width}x{context.height}",
                f"Sides of at most {LARGEST_SIDE} samples are accepted",
            )
        frame = _first_frame(container, stream, path)
        colour, assumed = _colour(frame, context.name)
        if _may_say_site(frame, context.name):
            colour = replace(colour, chroma_location=_stated_site(path, stream.index) or colour.chroma_location)
        order = FIELD_ORDERS.get(int(context.field_order or 0), "unknown")
        aspect = stream.sample_aspect_ratio
        return SourceFacts(
            path=str(path),
            container=demuxer,
            size_bytes=path.stat().st_size,
            duration_seconds=container.duration / av.time_base if container.duration is not None else None,
            start_seconds=container.start_time / av.time_base if container.start_time is not None else 0.0,
            streams=streams,
            video_index=stream.index,
            codec=context.name,
            width=frame.width,
            height=frame.height,
            pix_fmt=frame.format.name,
            colour=colour,
            colour_assumed=assumed,
            frame_rate=_exact_rate(stream.average_rate or stream.guessed_rate),
            time_base=stream.time_base or Fraction(1, av.time_base),
            declared_frames=stream.frames,
            sample_aspect_ratio=aspect if aspect else Fraction(1),
            field_order="tt" if frame.interlaced_frame and order in ("unknown", "progressive") else order,
            rotation=int(frame.rotation or 0),
            display_matrix=_display_matrix(frame),
            light=Light.of(frame),
        )


def _exact_rate(rate: Fraction | None) -> Fraction | None:
    """Undo libavformat's rounding: it reduces rates to numerators up to 30000, which makes 19001/317 of 60000/1001."""
    if rate is not None:
        exact = Fraction(round(rate * 1001 / 1000) * 1000, 1001)
        if rate != exact and abs(rate / exact - 1) < Fraction(1, 1_000_000):
            return exact
    return rate


def _stream_facts(stream: Any) -> StreamFacts:
    context = getattr(stream, "codec_context", None)
    return StreamFacts(
        index=stream.index,
        kind=stream.type or "unknown",
        codec=context.name if context is not None else "unknown",
        language=stream.metadata.get("language"),
        title=stream.metadata.get("title"),
        cover_art=bool(stream.disposition & (Disposition.attached_pic | Disposition.timed_thumbnails)),
    )


def _best_video(container: InputContainer, streams: tuple[StreamFacts, ...]) -> AvVideoStream | None:
    """The largest picture that moves; among equals the one marked as default, then the first."""
    candidates = [stream for stream in container.streams.video if not streams[stream.index].cover_art]
    return max(
        candidates,
        key=lambda stream: (
            stream.codec_context.width * stream.codec_context.height,
            bool(stream.disposition & Disposition.default),
            -stream.index,
        ),
        default=None,
    )


def _named(container: InputContainer, index: int, path: Path) -> AvVideoStream:
    found = {stream.index: stream for stream in container.streams.video}
    if index not in found:
        choices = ", ".join(map(str, found)) or "it has none"
        raise SettingsError(f"{path}: stream {index} is no video", f"Name one of its video streams ({choices})")
    return found[index]


def _display_matrix(frame: av.VideoFrame) -> tuple[int, ...]:
    found = Light.side_data(frame).get(SideData.DISPLAYMATRIX)
    matrix = struct.unpack_from("=9i", found) if found else ()
    return () if matrix == _UPRIGHT else matrix


#: Of a picture that is shown as it is: 16.16 and, in the last column, 2.30 fixed point.
_UPRIGHT: Final = (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)


def _may_say_site(frame: av.VideoFrame, codec: str) -> bool:
    layout = PIXEL_LAYOUTS.get(planar(frame.format.name) or "")
    return codec in _SAY_SITES and layout is not None and layout.shift_y > 0


def _stated_site(path: Path, index: int) -> str | None:
    """Where the first frame says that its chroma lies; PyAV does not tell."""
    arguments = ["-noautorotate", "-i", file_argument(path), "-map", f"0:{index}", "-frames:v", "1"]
    said = said_by([*arguments, "-vf", "showinfo", "-f", "null", "-"])
    found = re.search(r" cl:(left|center|topleft|top|bottomleft|bottom) ", said)
    return found.group(1) if found else None


def _first_frame(container: InputContainer, stream: AvVideoStream, path: Path) -> av.VideoFrame:
    try:
        for frame in container.decode(stream):
            return frame
    except av.error.FFmpegError as error:
        raise SourceError(
            f"{path}: the first frame of video stream {stream.index} cannot be decoded", "The file is damaged"
        ) from error
    raise SourceError(f"{path}: video stream {stream.index} holds no frame", "The file is damaged or was cut off")


def _colour(frame: av.VideoFrame, codec: str) -> tuple[Colour, tuple[str, ...]]:
    """Colour of a frame, with the rule for what it leaves open.

    Untagged material is taken for limited range, and for BT.709 from 720 rows or 1280 columns up, BT.601 below: what
    broadcast practice and most players assume. Red, green and blue are of full range.
    """
    layout = PIXEL_LAYOUTS.get(planar(frame.format.name) or "")
    model = layout.model if layout else "yuv"
    assumed = []
    matrix = MATRICES.get(int(frame.colorspace), f"number {int(frame.colorspace)}")
    if model == "rgb":
        matrix = "gbr"
    elif int(frame.colorspace) == _UNSPECIFIED or (matrix == "gbr" and model == "gray"):
        high_definition = frame.height >= 720 or frame.width >= 1280
        matrix = "bt709" if high_definition else "smpte170m"
        assumed.append("matrix")
    full_range = int(frame.color_range) == _FULL_RANGE or frame.format.name.startswith("yuvj")
    if int(frame.color_range) == 0 and not full_range:
        full_range = model == "rgb" or (model == "gray" and codec not in _LIMITED_GREY)
        assumed.append("range")
    return Colour(
        matrix=matrix,
        full_range=full_range,
        primaries=PRIMARIES.get(int(frame.color_primaries)),
        transfer=TRANSFERS.get(int(frame.color_trc)),
        chroma_location="center" if codec in _CENTRED else "left",
    ), tuple(assumed)


def refuse_unsupported(facts: SourceFacts) -> None:
    """Refuse what cannot be upscaled faithfully yet.

    Raises:
        UnsupportedSourceError: Naming each trait that is not handled.
    """
    traits = []
    if planar(facts.pix_fmt) is None:
        traits.append(f"pixel format {facts.pix_fmt} (handled: YUV, grey and RGB of 8 to 14 bits)")
    if facts.colour.matrix in _UNUSABLE_MATRICES or facts.colour.matrix.startswith("number"):
        traits.append(f"colour matrix {facts.colour.matrix}")
    if traits:
        raise UnsupportedSourceError(
            f"{facts.path}: video stream {facts.video_index} has {', '.join(traits)},"
            " which this version does not handle",
            "Convert it first (for example with ffmpeg to yuv422p10le with matrix bt709)",
        )
