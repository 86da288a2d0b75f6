"""The corpus: what an archive holds, one tiny file per trait and for likely pairs of traits, made by ffmpeg on demand.

Pictures are 64x48 of a moving, softened test pattern, two groups of pictures and a bit long; sound is a wavering tone.
`SAMPLES` names each file, how it is made, and what is asked for when it is upscaled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import av

from tests.media.clips import run_ffmpeg, tone

RATE: Final = "8"
SIZE: Final = "64x48"
SECONDS: Final = 2.25

Make = Callable[[Path, Path], None]
"""Makes a file: takes a folder for what it needs on the way, and the path of the file."""


@dataclass(frozen=True)
class Sample:
    """One file of the corpus."""

    name: str
    make: Make
    ending: str
    """Container of the result."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What is asked for beside the scale."""
    pix_fmt: str = "yuv420p"
    """Expected of the result."""
    least_psnr: float = 24.0
    """Of each frame of the result, shrunk back, against the source, in dB."""
    order: str = ""
    """`tff` or `bff` where frames of the result are expected to be made of fields in this order."""
    sound: str = ""
    """Codec in which sound is expected that the container of the result cannot hold as it is."""

    def path(self, folder: Path) -> Path:
        """The file, made if it is not there."""
        path = folder / self.name
        if not path.exists():
            making = folder / "making" / self.name
            making.parent.mkdir(exist_ok=True)
            self.make(making.parent, making)
            making.rename(path)
        return path


def source(rate: str = RATE, size: str = SIZE, seconds: float = SECONDS, more: str = "") -> tuple[str, ...]:
    """Input arguments of the picture."""
    soft = f"testsrc2=s={size}:r={rate}:d={seconds},gblur=sigma=1.2{',' + more if more else ''}"
    return ("-f", "lavfi", "-i", soft)


def tags(
    matrix: str = "bt709", span: str = "tv", primaries: str = "bt709", transfer: str = "bt709", site: str = ""
) -> str:
    """Filters that convert to a matrix, a range and the pixel format `PIXELS`, and say so."""
    said = f"setparams=colorspace={matrix}:color_primaries={primaries}:color_trc={transfer}:range={span}"
    converted = {"bt470bg": "bt470", "bt2020nc": "bt2020"}.get(matrix, matrix)
    located = f":chroma_location={site}" if site else ""
    return f"scale=out_color_matrix={converted}:out_range={span},format=PIXELS,{said}{located}"


_PLAIN: Final = tags().replace("PIXELS", "yuv420p")

X264: Final = ("-c:v", "libx264", "-preset", "veryfast", "-threads", "1", "-crf", "12")
X265: Final = ("-c:v", "libx265", "-preset", "ultrafast", "-crf", "12")
_QUIET: Final = "log-level=error:pools=1:frame-threads=1"
FFV1: Final = ("-c:v", "ffv1", "-level", "3", "-slicecrc", "1")


def clip(
    *options: str,
    pix_fmt: str = "yuv420p",
    filters: str | None = None,
    rate: str = RATE,
    size: str = SIZE,
    seconds: float = SECONDS,
    sound: tuple[str, ...] = (),
) -> Make:
    """A file of one picture and, with the options of an encoder, one sound."""

    def make(_: Path, path: Path) -> None:
        heard = tone(seconds=seconds) if sound else ()
        chain = (tags() if filters is None else filters or "format=PIXELS").replace("PIXELS", pix_fmt)
        run_ffmpeg(*source(rate, size, seconds), *heard, "-vf", chain, *options, *sound, path)

    return make


def copied(make: Make, ending: str, *options: str, before: tuple[str, ...] = ()) -> Make:
    """The file that `make` makes in a container, its packets copied with further options."""

    def remake(folder: Path, path: Path) -> None:
        original = folder / f"{path.name}.original.{ending}"
        make(folder, original)
        run_ffmpeg(*before, "-i", original, "-map", "0", "-c", "copy", *options, path)

    return remake


def _times(rule: Callable[[int], int], ending: str = "mkv", base: Fraction = Fraction(1, 1000)) -> Make:
    """A file whose frame n is shown at `rule(n)` ticks of `base`."""

    def make(folder: Path, path: Path) -> None:
        original = folder / f"{path.name}.original.{ending}"
        clip(*X264, "-bf", "0", filters=tags())(folder, original)
        options = {"video_track_timescale": str(base.denominator)} if ending != "mkv" else {}
        with av.open(str(original)) as given, av.open(str(path), "w", options=options) as written:
            stream = written.add_stream_from_template(given.streams.video[0])
            stream.time_base = base
            packets = [packet for packet in given.demux(given.streams.video[0]) if packet.size]
            for number, packet in enumerate(packets):
                packet.stream, packet.time_base = stream, base
                packet.pts = packet.dts = rule(number)
                packet.duration = rule(number + 1) - rule(number)
                written.mux(packet)

    return make


def _late_picture(folder: Path, path: Path) -> None:
    """Sound from the start, the picture 0.4 s later; in MP4 that is an empty edit."""
    late = ("-itsoffset", "0.4", *source())
    run_ffmpeg(
        *late, *tone(seconds=SECONDS + 0.4), "-vf", _PLAIN, *X264, "-fps_mode", "passthrough", "-c:a", "aac", path
    )


def _two_videos(folder: Path, path: Path) -> None:
    small = ("-f", "lavfi", "-i", f"testsrc=s=32x32:r={RATE}:d={SECONDS}")
    run_ffmpeg(
        *small, *source(), *tone(seconds=SECONDS), "-map", "0", "-map", "1", "-map", "2", "-filter:v:1", _PLAIN, *X264,
        "-pix_fmt", "yuv420p", "-c:a", "aac", path,
    )  # fmt: skip


def _cover(folder: Path, path: Path) -> None:
    art = ("-f", "lavfi", "-i", "testsrc=s=320x240:d=0.04")
    run_ffmpeg(
        *art, *source(), "-map", "0", "-map", "1", "-c:v:0", "mjpeg", "-pix_fmt:v:0", "yuvj444p",
        "-disposition:v:0", "attached_pic", "-filter:v:1", _PLAIN, "-c:v:1", "libx264", path,
    )  # fmt: skip


def _bitmap_subtitles(folder: Path, path: Path) -> None:
    lines = folder / "bitmap.srt"
    lines.write_text("1\n00:00:00,200 --> 00:00:00,900\nA\n\n2\n00:00:01,000 --> 00:00:01,800\nB\n")
    run_ffmpeg(*source(), "-f", "lavfi", "-i", "color=black@0:s=64x48:d=1,format=rgba", "-map", "0", *X264,
               "-pix_fmt", "yuv420p", folder / "plain.mkv")  # fmt: skip
    with av.open(str(path), "w", format="matroska") as output, av.open(str(folder / "plain.mkv")) as given:
        video = output.add_stream_from_template(given.streams.video[0])
        subtitle = output.add_mux_stream("hdmv_pgs_subtitle")
        subtitle.time_base = Fraction(1, 1000)
        for packet in given.demux(given.streams.video[0]):
            if packet.size:
                packet.stream = video
                output.mux(packet)
        for number, at in enumerate((200, 900, 1000, 1800)):
            # An end of a display set (0x80): the least a PGS decoder takes; what matters is that bytes are copied.
            packet = av.Packet(bytes([0x80, 0, 0]) if number % 2 else _presentation(number))
            packet.stream, packet.time_base, packet.pts, packet.dts = subtitle, Fraction(1, 1000), at, at
            output.mux(packet)


def _presentation(number: int) -> bytes:
    """A PGS presentation segment without objects, and its end."""
    body = (64).to_bytes(2) + (48).to_bytes(2) + b"\x10" + number.to_bytes(2) + b"\x80\0\0\0"
    return b"\x16" + len(body).to_bytes(2) + body + b"\x80\0\0"


def _laden(folder: Path, path: Path) -> None:
    """Two sounds, subtitles, chapters, an attached font, titles, languages and dispositions."""
    lines, chapters, font = folder / "lines.srt", folder / "chapters.txt", folder / "letters.ttf"
    lines.write_text("1\n00:00:00,200 --> 00:00:00,900\nfirst\n\n2\n00:00:01,000 --> 00:00:01,800\nsecond\n")
    chapters.write_text(
        ";FFMETADATA1\ntitle=The Film\nartist=The Maker\n[CHAPTER]\nTIMEBASE=1/1000\nSTART=0\nEND=1000\ntitle=Opening\n"
        "[CHAPTER]\nTIMEBASE=1/1000\nSTART=1000\nEND=2200\ntitle=Ending\n"
    )
    font.write_bytes(b"\0\1\0\0" + bytes(range(256)) * 4)
    in_mkv = path.suffix == ".mkv"
    attached = ("-attach", font, "-metadata:s:t:0", "mimetype=application/x-truetype-font") if in_mkv else ()
    run_ffmpeg(
        *source(), *tone(seconds=SECONDS), *tone(660, SECONDS), "-i", lines, "-i", chapters,
        *("-map", "0", "-map", "1", "-map", "2", "-map", "3"), "-map_metadata", "4", "-map_chapters", "4",
        "-vf", _PLAIN, *X264, "-pix_fmt", "yuv420p", "-c:a:0", "ac3", "-c:a:1", "aac",
        "-c:s", "ass" if in_mkv else "mov_text", "-metadata:s:v:0", "language=jpn", "-metadata:s:v:0", "title=Picture",
        "-metadata:s:a:0", "language=eng", "-metadata:s:a:1", "language=deu", "-metadata:s:a:1", "title=Commentary",
        "-metadata:s:s:0", "language=fra", "-disposition:a:0", "0", "-disposition:a:1", "default",
        "-disposition:s:0", "forced", *attached, path,
    )  # fmt: skip


def _raw_rgb(pix_fmt: str) -> Make:
    """An uncompressed AVI or MOV of packed pixels."""
    return clip("-c:v", "rawvideo", pix_fmt=pix_fmt, filters="")


def _interlaced(*options: str, order: str = "tff", pix_fmt: str = "yuv420p", filters: str = "", flag: str = "") -> Make:
    """Frames of two moments each."""
    woven = f"interlace=scan={order}:lowpass=0,setfield={flag or order}{filters}"

    def make(_: Path, path: Path) -> None:
        said = tags("smpte170m", primaries="smpte170m", transfer="smpte170m").replace("PIXELS", pix_fmt)
        run_ffmpeg(*source("16", "96x64", more=f"{said},{woven}"), *options, path)

    return make


_FADING: Final = "format=PIXELS,geq=lum='lum(X,Y)':cb='cb(X,Y)':cr='cr(X,Y)':a='{}*X'"
_ODD: Final = "crop=63:47:exact=1"
_MPEG2: Final = ("-c:v", "mpeg2video", "-qscale:v", "2")
_MASTERING: Final = (
    "hdr10=1:repeat-headers=1:max-cll=1000,400:master-display=G(13250,34500)B(7500,3000)R(34000,16000)"
    "WP(15635,16450)L(10000000,50)"
)

_RATES: Final = ("24000/1001", "30000/1001", "60000/1001", "1199/50", "25", "12.5")


def _rates() -> list[Sample]:
    """One file per rate, long enough for two groups of pictures."""
    found = []
    for rate in _RATES:
        for ending in ("mp4", "mkv"):
            name = f"rate-{rate.replace('/', '-')}.{ending}"
            make = clip(*X264, "-bf", "2", rate=rate, size="32x32", seconds=1.2)
            found.append(Sample(name, make, ending, least_psnr=20.0))
    return found


SAMPLES: Final[tuple[Sample, ...]] = (
    *_rates(),
    # Times.
    Sample("vfr.mkv", _times(lambda n: 100 * n + 37 * (n % 3)), "mkv"),
    Sample("vfr.mp4", _times(lambda n: 20 * n * n + 900 * n, "mp4", Fraction(1, 12800)), "mp4"),
    Sample("vfr-hole.mkv", _times(lambda n: 125 * n + (3000 if n > 9 else 0)), "mkv"),
    Sample("late-start.mkv", _times(lambda n: 125 * n + 5000), "mkv"),
    Sample("late-picture.mp4", _late_picture, "mp4"),
    Sample("late-picture.mkv", _late_picture, "mkv"),
    Sample("late-start.ts", clip(*X264, "-output_ts_offset", "37.5", sound=("-c:a", "mp2")), "mkv"),
    Sample("edit-list.mp4", copied(clip(*X264, "-bf", "2", "-g", "8", sound=("-c:a", "aac")), "mp4",
                                   before=("-ss", "0.6")), "mp4"),
    Sample("wrong-count.mkv", copied(clip(*X264), "mkv", "-metadata:s:v:0", "NUMBER_OF_FRAMES=999"), "mkv"),
    Sample("headless.ts", clip(*X264, "-bf", "2"), "mp4"),
    # Groups of pictures.
    Sample("b-pyramid.mp4", clip(*X264, "-bf", "4", "-x264-params", "b-pyramid=normal:b-adapt=0"), "mp4"),
    Sample("open-gop.mkv", clip(*X264, "-x264-params", "open-gop=1:keyint=6:bframes=3:b-adapt=0:scenecut=0"), "mkv"),
    Sample("open-gop-hevc.mkv", clip(*X265, "-x265-params", f"{_QUIET}:open-gop=1:keyint=6:bframes=3"), "mkv"),
    Sample("long-gop.mp4", clip(*X264, "-g", "1000", "-bf", "3"), "mp4"),
    Sample("intra.mov", clip("-c:v", "mjpeg", "-q:v", "2", pix_fmt="yuvj420p", filters=tags("bt470bg", "pc")), "mov"),
    # Streams.
    Sample("two-videos.mkv", _two_videos, "mkv"),
    Sample("second-video.mkv", _two_videos, "mkv", {"stream": 0}, least_psnr=14.0),
    Sample("cover.mp4", _cover, "mp4"),
    Sample("laden.mkv", _laden, "mkv"),
    Sample("laden.mp4", _laden, "mp4"),
    Sample("laden-to-mp4.mkv", _laden, "mp4"),
    Sample("bitmap-subtitles.mkv", _bitmap_subtitles, "mkv"),
    Sample("pcm.mov", clip(*X264, sound=("-c:a", "pcm_s16le")), "mov"),
    Sample("pcm.mkv", clip(*X264, sound=("-c:a", "pcm_s24le")), "mkv"),
    Sample("mp3-full-chroma.mp4", clip(*X264, pix_fmt="yuv444p", sound=("-c:a", "libmp3lame")), "mp4",
           pix_fmt="yuv444p"),
    Sample("opus.mkv", clip(*X264, sound=("-c:a", "libopus")), "mp4"),
    Sample("flac-vorbis.mkv", clip(*X264, sound=("-c:a", "flac")), "mkv"),
    Sample("wma.wmv", clip("-c:v", "wmv2", "-qscale:v", "2", sound=("-c:a", "wmav2")), "mkv"),
    Sample("dvd-sound.vob", clip(*_MPEG2, "-f", "vob", rate="25", size="32x32", seconds=1.3, sound=("-c:a", "pcm_dvd")),
           "mkv", least_psnr=20.0, sound="flac"),
    Sample("timecode.mov", clip(*X264, "-timecode", "10:00:00:00", sound=("-c:a", "aac")), "mov"),
    Sample("short-sound.mp4", copied(clip(*X264, sound=("-c:a", "aac", "-filter:a", "atrim=end=0.8")), "mp4"), "mp4"),
    # Codecs.
    Sample("vp9.webm", clip("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-crf", "12"), "mkv"),
    Sample("av1.mkv", clip("-c:v", "libsvtav1", "-preset", "12", "-crf", "12", "-svtav1-params", "lp=1",
                           sound=("-c:a", "libopus")), "mkv"),
    Sample("mpeg1.mpg", clip("-c:v", "mpeg1video", "-qscale:v", "2", rate="25", size="32x32", seconds=1.3), "mkv",
           least_psnr=20.0),
    Sample("mpeg4.avi", clip("-c:v", "mpeg4", "-qscale:v", "2"), "mkv"),
    # Depth and chroma.
    Sample("ten-bit.mp4", clip(*X264, pix_fmt="yuv420p10le"), "mp4", pix_fmt="yuv420p10le"),
    Sample("ten-bit-hevc.mkv", clip(*X265, "-x265-params", _QUIET, pix_fmt="yuv420p10le"), "mkv", {"encoder": "h265"},
           pix_fmt="yuv420p10le"),
    Sample("ten-bit-422.mov", clip("-c:v", "prores_ks", "-profile:v", "3", pix_fmt="yuv422p10le"), "mov",
           {"encoder": "prores"}, pix_fmt="yuv422p10le"),
    Sample("twelve-bit.mkv", clip(*X265, "-x265-params", _QUIET, pix_fmt="yuv420p12le"), "mkv", {"encoder": "h265"},
           pix_fmt="yuv420p12le"),
    Sample("half-chroma.mkv", clip(*X264, pix_fmt="yuv422p"), "mkv", pix_fmt="yuv422p"),
    Sample("full-chroma.mkv", clip(*X264, pix_fmt="yuv444p"), "mkv", pix_fmt="yuv444p"),
    Sample("full-chroma-ten-bit.mkv", clip(*FFV1, pix_fmt="yuv444p10le"), "mkv", {"encoder": "ffv1"},
           pix_fmt="yuv444p10le"),
    Sample("quarter-chroma.avi", clip("-c:v", "rawvideo", pix_fmt="yuv411p"), "mkv", pix_fmt="yuv422p"),
    Sample("packed.mov", clip("-c:v", "rawvideo", pix_fmt="uyvy422"), "mkv", pix_fmt="yuv422p"),
    Sample("gray.mkv", clip(*FFV1, pix_fmt="gray"), "mkv"),
    Sample("gray-to-h265.mkv", clip(*FFV1, pix_fmt="gray10le"), "mkv", {"encoder": "h265"}, pix_fmt="gray10le"),
    Sample("gray-ten-bit.mkv", clip(*FFV1, pix_fmt="gray10le"), "mkv", {"encoder": "ffv1"}, pix_fmt="gray10le"),
    Sample("rgb.mkv", clip(*FFV1, pix_fmt="gbrp10le", filters=""), "mkv", {"encoder": "ffv1"}, pix_fmt="gbrp10le"),
    Sample("rgb.avi", _raw_rgb("bgr24"), "mkv", pix_fmt="yuv444p"),
    Sample("rgb-to-ffv1.avi", _raw_rgb("bgr24"), "mkv", {"encoder": "ffv1"}, pix_fmt="bgr0"),
    Sample("rgb-to-h265.mov", _raw_rgb("rgb24"), "mkv", {"encoder": "h265"}, pix_fmt="gbrp"),
    Sample("alpha.mov", clip("-c:v", "prores_ks", "-profile:v", "4", pix_fmt="yuva444p10le",
                             filters=_FADING.format(16)),
           "mkv", {"encoder": "ffv1"}, pix_fmt="yuva444p12le"),
    Sample("alpha-to-prores.mkv", clip(*FFV1, pix_fmt="yuva444p10le",
                                       filters=_FADING.format(16)),
           "mov", {"encoder": "prores"}, pix_fmt="yuva444p12le"),
    Sample("alpha.mkv", clip(*FFV1, pix_fmt="yuva420p", filters=_FADING.format(4)), "mkv",
           {"encoder": "ffv1"}, pix_fmt="yuva420p"),
    Sample("h264-to-ten-bit.mkv", clip(*X264), "mkv", {"encoder": "h265-10"}, pix_fmt="yuv420p10le"),
    Sample("to-av1.mp4", clip(*X264), "mp4", {"encoder": "av1"}),
    Sample("to-ffv1.mkv", clip(*X264), "mkv", {"encoder": "ffv1"}),
    # Colour.
    Sample("full-range-709.mp4", clip(*X264, filters=tags(span="pc"), pix_fmt="yuvj420p"), "mp4"),
    Sample("full-range-ffv1.mkv", clip(*FFV1, filters=tags(span="pc"), pix_fmt="yuv420p"), "mkv",
           {"encoder": "ffv1"}),
    Sample("pal.mkv", clip(*X264, filters=tags("bt470bg", primaries="bt470bg", transfer="bt470bg")), "mkv"),
    Sample("ntsc.mkv", clip(*X264, filters=tags("smpte170m", primaries="smpte170m", transfer="smpte170m")), "mkv"),
    Sample("untagged.mkv", clip(*X264, filters=""), "mkv"),
    Sample("hdr10.mkv", clip(*X265, "-x265-params", f"{_QUIET}:{_MASTERING}", pix_fmt="yuv420p10le",
                             filters=tags("bt2020nc", primaries="bt2020", transfer="smpte2084", site="topleft")),
           "mkv", {"encoder": "h265"}, pix_fmt="yuv420p10le"),
    Sample("hdr10-to-av1.mkv", clip(*X265, "-x265-params", f"{_QUIET}:{_MASTERING}", pix_fmt="yuv420p10le",
                                    filters=tags("bt2020nc", primaries="bt2020", transfer="smpte2084")),
           "mp4", {"encoder": "av1"}, pix_fmt="yuv420p10le"),
    Sample("hlg.mp4", clip(*X265, "-x265-params", _QUIET, "-tag:v", "hvc1", pix_fmt="yuv420p10le",
                           filters=tags("bt2020nc", primaries="bt2020", transfer="arib-std-b67")),
           "mp4", {"encoder": "h265"}, pix_fmt="yuv420p10le"),
    Sample("centred-chroma.mkv", clip(*X264, filters=tags(site="center")), "mkv"),
    # Shape.
    Sample("odd.mkv", clip(*FFV1, filters=f"{tags()},{_ODD}"), "mkv"),
    Sample("odd-full-chroma.mp4", clip(*X264, filters=f"{tags()},{_ODD}", pix_fmt="yuv444p"), "mp4", pix_fmt="yuv444p"),
    Sample("odd-height-422.mkv", clip(*FFV1, filters=f"{tags()},crop=62:47:exact=1", pix_fmt="yuv422p"), "mkv",
           {"encoder": "ffv1"}, pix_fmt="yuv422p"),
    Sample("rotated.mp4", copied(clip(*X264, sound=("-c:a", "aac")), "mp4", before=("-display_rotation", "90")), "mp4"),
    Sample("rotated-to-mkv.mov", copied(clip(*X264), "mov", before=("-display_rotation", "180")), "mkv"),
    Sample("mirrored.mp4", copied(clip(*X264), "mp4", before=("-display_rotation", "90", "-display_hflip")), "mp4"),
    Sample("anamorphic.mp4", clip(*X264, filters=f"{tags('bt470bg')},setsar=64/45"), "mp4"),
    Sample("anamorphic-ffv1.mkv", clip(*FFV1, filters=f"{tags('bt470bg')},setsar=16/15"), "mkv", {"encoder": "ffv1"}),
    Sample("anamorphic-to-prores.mp4", clip(*X264, filters=f"{tags('bt470bg')},setsar=4/3", sound=("-c:a", "aac")),
           "mov", {"encoder": "prores"}, pix_fmt="yuv422p10le"),
    Sample("anamorphic-to-av1.mkv", clip(*X264, filters=f"{tags('bt470bg')},setsar=16/15", sound=("-c:a", "libopus")),
           "mp4", {"encoder": "av1"}),
    Sample("anamorphic-squared.mp4", clip(*X264, filters=f"{tags('bt470bg')},setsar=64/45"), "mp4",
           {"square_pixels": True}),
    Sample("rotated-anamorphic.mp4", copied(clip(*X264, filters=f"{tags()},setsar=4/3"), "mp4",
                                            before=("-display_rotation", "270")), "mp4"),
    # Fields.
    Sample("fields-top.ts", _interlaced(*_MPEG2, "-flags", "+ildct+ilme"), "mkv", order="tff"),
    Sample("fields-bottom.avi", _interlaced("-c:v", "ffv1", order="bff"), "mkv", order="bff"),
    Sample("fields-h264.mkv", _interlaced(*X264, "-x264-params", "tff=1"), "mkv", order="tff"),
    Sample("fields-doubled.mkv", _interlaced(*X264, "-x264-params", "tff=1"), "mp4", {"deinterlace": "field-rate"},
           order="tff"),
    Sample("fields-kept.mkv", _interlaced(*X264, "-x264-params", "tff=1"), "mkv", {"deinterlace": "off"},
           least_psnr=15.0),
    Sample("fields-unsaid.mkv", _interlaced(*X264, flag="prog"), "mkv", order="tff"),
    Sample("fields-only-said.mkv", clip(*X264, "-x264-params", "tff=1:fake-interlaced=1"), "mkv"),
)  # fmt: skip
