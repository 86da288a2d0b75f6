"""The corpus of the media tests: tiny clips that ffmpeg generates on first use, one per trait.

`Clips.path("cut.mp4")` makes the clip once per session and gives its path. Pictures are 128x72 of ffmpeg's moving test
pattern (72 is no multiple of 16, so decoders must crop); sound is a tone that wavers, so that no two packets are equal.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Final

import av
import pytest

from tasks.media.ffmpeg import binary

WIDTH: Final = 128
HEIGHT: Final = 72

#: Rates of film and television.
RATES: Final = tuple(map(Fraction, ("24000/1001", "30000/1001", "25", "24", "50", "60000/1001")))

#: Seconds of most clips: three groups of pictures and a bit.
SECONDS: Final = 3.2

_TAGS: Final = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
_X264: Final = ("-c:v", "libx264", "-preset", "veryfast", "-threads", "1", "-pix_fmt", "yuv420p")
_B_FRAMES: Final = (*_X264, "-bf", "3", "-x264-params", "keyint=24:b-adapt=0:scenecut=0")


def run_ffmpeg(*arguments: str | Path) -> None:
    """Run ffmpeg and show what it said if it failed."""
    command = [binary(), "-hide_banner", "-nostdin", "-loglevel", "error", "-y", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"


def picture(rate: Fraction | str = "25", seconds: float = SECONDS, size: str = f"{WIDTH}x{HEIGHT}") -> tuple[str, ...]:
    """Input arguments of a moving test pattern."""
    return ("-f", "lavfi", "-i", f"testsrc2=s={size}:r={rate}:d={seconds}")


def tone(frequency: int = 440, seconds: float = SECONDS) -> tuple[str, ...]:
    """Input arguments of a wavering tone."""
    wave = f"0.3*sin(2*PI*({frequency}+9*sin(3*t))*t)"
    return ("-f", "lavfi", "-i", f"aevalsrc={wave}:s=48000:d={seconds}")


def rate_name(rate: Fraction, ending: str) -> str:
    """Name of the clip with B-frames at a rate."""
    return f"rate-{rate.numerator}-{rate.denominator}.{ending}"


class Clips:
    """Makes clips on demand.

    Args:
        folder: Where to put them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """Path of the clip called `name`, made if it is not there."""
        path = self.folder / name
        if not path.exists():
            making = self.folder / "making" / name
            making.parent.mkdir(exist_ok=True)
            if name.startswith("rate-"):
                _rate_clip(making)
            else:
                RECIPES[name](self, making)
            making.rename(path)
        return path


def _rate_clip(path: Path) -> None:
    _, numerator, denominator = path.stem.split("-")
    rate = f"{numerator}/{denominator}"
    run_ffmpeg(*picture(rate), *tone(), "-vf", _TAGS, *_B_FRAMES, "-c:a", "aac", path)


def _simple(*options: str, rate: str = "25", filters: str = _TAGS, sound: bool = False, size: str | None = None):
    def make(_: Clips, path: Path) -> None:
        source = picture(rate, size=size or f"{WIDTH}x{HEIGHT}")
        audio = (*tone(), "-c:a", "aac", "-shortest") if sound else ()
        run_ffmpeg(*source, *audio[:4], "-vf", filters, *options, *audio[4:], path)

    return make


def _one_object(_: Clips, path: Path) -> None:
    """A soft disc that crosses a dark picture, two seconds long: each frame differs from its neighbours."""
    disc = "geq=lum='30+200*exp(-((X-4-1.1*N)^2+(Y-24)^2)/90)':cb=128:cr=128"
    run_ffmpeg("-f", "lavfi", "-i", "color=s=64x48:r=25:d=2", "-vf", f"format=yuv420p,{disc},{_TAGS}", *_X264, path)


def _audio_offset(_: Clips, path: Path) -> None:
    late = ("-itsoffset", "0.4", *tone())
    run_ffmpeg(*picture("30000/1001"), *late, "-map", "0:v", "-map", "1:a", *_B_FRAMES, "-c:a", "aac", path)


def _copy_cut(clips: Clips, path: Path) -> None:
    source = clips.path(rate_name(Fraction("24000/1001"), "mp4"))
    run_ffmpeg("-ss", "1.37", "-i", source, "-c", "copy", path)


def _subtitles(folder: Path) -> Path:
    path = folder / "lines.srt"
    path.write_text("1\n00:00:00,500 --> 00:00:01,250\nfirst\n\n2\n00:00:02,000 --> 00:00:02,750\nsecond\n")
    return path


def _rich(subtitle_codec: str, *extra: str | Path):
    def make(clips: Clips, path: Path) -> None:
        chapters = clips.folder / "making" / "chapters.txt"
        chapters.write_text(
            ";FFMETADATA1\ntitle=The Film\nartist=The Maker\n"
            "[CHAPTER]\nTIMEBASE=1/1000\nSTART=0\nEND=1500\ntitle=Opening\n"
            "[CHAPTER]\nTIMEBASE=1/1000\nSTART=1500\nEND=3100\ntitle=Ending\n"
        )
        tags = ["language=eng", "language=deu", "language=fra"]
        maps = [item for index in range(4) for item in ("-map", str(index))]
        attached = [str(item).replace("FONT", str(_font(clips.folder / "making"))) for item in extra]
        run_ffmpeg(
            *picture("24000/1001"), *tone(), *tone(660), "-i", _subtitles(clips.folder / "making"), "-i", chapters,
            *maps, "-map_metadata", "4", "-map_chapters", "4", "-vf", _TAGS, *_B_FRAMES,
            "-c:a", "aac", "-c:s", subtitle_codec, "-metadata:s:v:0", "language=jpn",
            "-metadata:s:a:0", tags[0], "-metadata:s:a:1", tags[1], "-metadata:s:s:0", tags[2],
            "-metadata:s:a:1", "title=Commentary", "-disposition:a:0", "0", "-disposition:a:1", "default",
            "-disposition:s:0", "forced", *attached, path,
        )  # fmt: skip

    return make


def _font(folder: Path) -> Path:
    path = folder / "letters.ttf"
    path.write_bytes(b"\0\1\0\0" + bytes(range(256)) * 8)
    return path


def _cover_art(clips: Clips, path: Path) -> None:
    cover = ("-f", "lavfi", "-i", "testsrc=s=320x240:d=0.04")
    run_ffmpeg(
        *picture(), *tone(), *cover, "-map", "0", "-map", "1", "-map", "2", *_B_FRAMES,
        "-c:v:1", "png", "-pix_fmt:v:1", "rgb24", "-c:a", "aac", "-disposition:v:1", "attached_pic", path,
    )  # fmt: skip


def _dvd_sound(_: Clips, path: Path) -> None:
    """Sound that no container of a result holds as it is."""
    mpeg2 = ("-c:v", "mpeg2video", "-qscale:v", "3", "-c:a", "pcm_dvd", "-f", "vob")
    run_ffmpeg(*picture(seconds=1.2), *tone(seconds=1.2), *mpeg2, path)


def _wma(_: Clips, path: Path) -> None:
    """Sound that Matroska knows by its number in WAV files only."""
    run_ffmpeg(*picture(seconds=1.2), *tone(seconds=1.2), "-c:v", "wmv2", "-c:a", "wmav2", path)


def _variable_rate(_: Clips, path: Path) -> None:
    run_ffmpeg(*picture("30"), "-vf", "select='not(eq(mod(n,7),3))'", "-fps_mode", "passthrough", *_X264, path)


def _dropped(_: Clips, path: Path) -> None:
    """AVI as capturing leaves it: an empty chunk stands for each frame that was dropped."""
    dropping = ("-vf", "select='not(eq(mod(n,7),3))'", "-fps_mode", "passthrough")
    run_ffmpeg(*picture("25"), *dropping, "-c:v", "mpeg4", "-qscale:v", "4", path)


def _rotated(clips: Clips, path: Path) -> None:
    run_ffmpeg("-display_rotation", "90", "-i", clips.path("rate-25-1.mp4"), "-c", "copy", path)


def _audio_only(_: Clips, path: Path) -> None:
    run_ffmpeg(*tone(), "-c:a", "aac", path)


def _still(_: Clips, path: Path) -> None:
    run_ffmpeg(*picture(), "-frames:v", "1", "-update", "1", path)


def _text(content: str):
    def make(clips: Clips, path: Path) -> None:
        path.write_text(content.replace("CLIP", str(clips.path("plain.ts"))))

    return make


def _faststart(clips: Clips, path: Path) -> None:
    source = clips.path(rate_name(Fraction("25"), "mp4"))
    run_ffmpeg("-i", source, "-c", "copy", "-movflags", "+faststart", path)


def _head_of(name: str, share: float):
    def make(clips: Clips, path: Path) -> None:
        content = clips.path(name).read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return make


def _untimed(clips: Clips, path: Path) -> None:
    source = clips.path(rate_name(Fraction("25"), "mp4"))
    run_ffmpeg("-i", source, "-an", "-c", "copy", "-bsf:v", "h264_mp4toannexb", "-f", "h264", path)


def _remuxed(change: Callable[[list[av.Packet]], list[av.Packet]], source_name: str):
    """A copy of the video stream with its packets (in decoding order) passed through `change`."""

    def make(clips: Clips, path: Path) -> None:
        with av.open(str(clips.path(source_name))) as source, av.open(str(path), "w") as output:
            stream = output.add_stream_from_template(source.streams.video[0])
            packets = [packet for packet in source.demux(source.streams.video[0]) if packet.size]
            for packet in change(packets):
                packet.stream = stream
                output.mux(packet)

    return make


def _without_one(packets: list[av.Packet]) -> list[av.Packet]:
    return [packet for number, packet in enumerate(packets) if number != len(packets) // 2]


def _with_twins(packets: list[av.Packet]) -> list[av.Packet]:
    packets[40].pts = packets[40].dts = packets[39].pts
    return packets


def _before_zero(clips: Clips, path: Path) -> None:
    """Matroska whose first pictures and sound lie before time zero, where its readers see no times."""
    original = str(clips.path(rate_name(Fraction("25"), "mp4")))
    with av.open(original) as source, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as output:
        streams = [output.add_stream_from_template(stream) for stream in source.streams]
        for packet in source.demux():
            if packet.size:
                early = round(Fraction(9, 100) / packet.time_base)
                packet.pts, packet.dts = packet.pts - early, packet.dts - early
                packet.stream = streams[packet.stream_index]
                output.mux(packet)


def _bomb(_: Clips, path: Path) -> None:
    path.write_bytes(b"YUV4MPEG2 W60000 H60000 F25:1 Ip A1:1 C420jpeg\nFRAME\n" + bytes(1000))


RECIPES: Final[dict[str, Callable[[Clips, Path], None]]] = {
    # Kinds of streams that a cut at a chunk boundary can go wrong in.
    "open-gop-h264.mkv": _simple(*_X264, "-x264-params", "open-gop=1:keyint=24:bframes=3:b-adapt=0:scenecut=0"),
    "open-gop-hevc.mkv": _simple(
        *("-c:v", "libx265", "-preset", "ultrafast"),
        *("-x265-params", "log-level=error:open-gop=1:keyint=24:bframes=3:scenecut=0:pools=1:frame-threads=1"),
    ),
    "closed-gop-hevc.mp4": _simple(
        *("-c:v", "libx265", "-preset", "ultrafast"),
        *("-x265-params", "log-level=error:open-gop=0:keyint=24:bframes=3:scenecut=0:pools=1:frame-threads=1"),
    ),
    "intra-refresh.mkv": _simple(*_X264, "-x264-params", "intra-refresh=1:keyint=24:bframes=0"),
    "mpeg2.ts": _simple("-c:v", "mpeg2video", "-b:v", "1M", "-bf", "2", "-g", "12"),
    "plain.ts": _simple(*_B_FRAMES, sound=True),
    "offset.ts": _simple(*_B_FRAMES, "-output_ts_offset", "37.5", rate="30000/1001", sound=True),
    "audio-offset.mp4": _audio_offset,
    "copy-cut.mp4": _copy_cut,
    "full-range.mp4": _simple(*_X264[:-1], "yuvj420p", filters="scale=out_range=pc:out_color_matrix=bt470bg"),
    "lossless.mkv": _simple("-c:v", "ffv1", "-level", "3", "-slicecrc", "1", "-g", "1", "-pix_fmt", "yuv420p"),
    "vp9.webm": _simple("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-b:v", "300k", "-g", "24"),
    "intra-only.mov": _simple(*_X264, "-x264-params", "keyint=1"),
    "wide-pixels.mp4": _simple(*_B_FRAMES, filters=f"{_TAGS},setsar=64/45"),
    "one-frame.mp4": _simple(*_X264, "-frames:v", "1"),
    "one-object.mkv": _one_object,
    # What goes along with the picture.
    "rich.mkv": _rich("srt", "-attach", "FONT", "-metadata:s:t:0", "mimetype=application/x-truetype-font"),
    "rich.mp4": _rich("mov_text"),
    "cover-art.mp4": _cover_art,
    "dvd-sound.vob": _dvd_sound,
    "wma.wmv": _wma,
    # Valid videos that are refused.
    "sixteen-bit.mkv": _simple("-c:v", "ffv1", "-pix_fmt", "yuv420p16le"),
    "ictcp.mkv": _simple(*_X264, filters="setparams=colorspace=ictcp"),
    "telecined.ts": _simple(
        *("-c:v", "mpeg2video", "-qscale:v", "2", "-flags", "+ildct+ilme"), filters="telecine", rate="24000/1001"
    ),
    # Traits of valid videos that are not in `GOOD`, because their frames are not those of one plain decode.
    "variable-rate.mkv": _variable_rate,
    "ten-bit.mkv": _simple("-c:v", "ffv1", "-pix_fmt", "yuv420p10le"),
    "full-chroma.mkv": _simple("-c:v", "ffv1", "-pix_fmt", "yuv444p"),
    "interlaced.ts": _simple(
        "-c:v", "mpeg2video", "-b:v", "1M", "-flags", "+ildct+ilme", filters="setfield=tff,interlace", rate="50"
    ),
    "rotated.mp4": _rotated,
    "odd-size.mkv": _simple("-c:v", "ffv1", filters="format=yuv420p,scale=127:71"),
    "dropped.avi": _dropped,
    "cut-dropped.avi": _head_of("dropped.avi", 0.6),
    "missing-frame.mkv": _remuxed(_without_one, "intra-only.mov"),
    "twin-frames.mkv": _remuxed(_with_twins, "intra-only.mov"),
    "untimed.h264": _untimed,
    "before-zero.mkv": _before_zero,
    # No videos.
    "sound.m4a": _audio_only,
    "still.png": _still,
    "still.jpg": _still,
    "notes.txt": _text("These are notes about a film.\nThey move nobody.\n"),
    "notes.mp4": _text("These are notes about a film.\nThey move nobody.\n"),
    "playlist.m3u8": _text("#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:3.2,\nfile://CLIP\n#EXT-X-ENDLIST\n"),
    "playlist.mp4": _text("#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:3.2,\nfile://CLIP\n#EXT-X-ENDLIST\n"),
    "script.ffconcat": _text("ffconcat version 1.0\nfile 'CLIP'\n"),
    "script.mkv": _text("ffconcat version 1.0\nfile 'CLIP'\n"),
    "relative.ffconcat": _text("ffconcat version 1.0\nfile 'plain.ts'\n"),
    "bomb.y4m": _bomb,
    # Damaged files.
    "no-index.mp4": _head_of(rate_name(Fraction("25"), "mp4"), 0.6),
    "faststart.mp4": _faststart,
    "cut.mp4": _head_of("faststart.mp4", 0.6),
    "cut.mkv": _head_of(rate_name(Fraction("25"), "mkv"), 0.6),
    "cut.ts": _head_of("plain.ts", 0.6),
}

#: Clips every frame of which must come through, at its own time.
GOOD: Final[Sequence[str]] = (
    *(rate_name(rate, ending) for rate in RATES for ending in ("mp4", "mkv")),
    *("open-gop-h264.mkv", "open-gop-hevc.mkv", "closed-gop-hevc.mp4", "intra-refresh.mkv", "mpeg2.ts"),
    *("plain.ts", "offset.ts"),
    *("audio-offset.mp4", "copy-cut.mp4", "full-range.mp4", "lossless.mkv", "vp9.webm", "intra-only.mov"),
    *("wide-pixels.mp4", "one-frame.mp4", "rich.mkv", "rich.mp4", "cover-art.mp4"),
)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Clips:
    """The corpus; wherever this fixture is imported, it is one folder per session."""
    folder = tmp_path_factory.getbasetemp() / "clips"
    folder.mkdir(exist_ok=True)
    return Clips(folder)
