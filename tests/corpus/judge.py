"""What must be true of a result beside its source, told by ffmpeg and PyAV alone: the project's readers take no part.

`complaints` compares two files trait by trait and gives one line for each that differs.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition

from tasks.media.ffmpeg import binary
from tests.corpus.samples import Sample
from tests.media.witness import decoding_complaints, heard_exactly, packets, start_time, without_adts

_KEPT_TAGS = ("language", "title", "timecode", "filename", "mimetype")


def _is_picture(stream: Any) -> bool:
    return stream.type == "video" and not stream.disposition & Disposition.attached_pic


def _video(path: Path, sample: Sample | None = None) -> int:
    """Index of the stream that is upscaled: the one asked for, else the largest."""
    if sample is not None and "stream" in sample.settings:
        return int(sample.settings["stream"])
    with av.open(str(path)) as container:
        sizes = [
            (-s.codec_context.width * s.codec_context.height, s.index) for s in container.streams if _is_picture(s)
        ]
    return min(sizes)[1]


def shown_times(path: Path, index: int) -> list[Fraction]:
    """Presentation times of a video stream in seconds from the start of the file, in order; nothing that is cut."""
    start = start_time(path)
    with av.open(str(path)) as container:
        stream = container.streams[index]
        # Decoded: packets that an edit list cuts away are no frames, and AVI has no times of presentation.
        return sorted(frame.pts * frame.time_base - start for frame in container.decode(stream))


def first_frame(path: Path, index: int) -> av.VideoFrame:
    """The first frame of a stream."""
    with av.open(str(path)) as container:
        return next(container.decode(container.streams[index]))


def light(frame: av.VideoFrame) -> dict[str, list[float]]:
    """Mastering display and content light level: every number of them, rounded to what AV1 can tell."""
    said = {}
    if (mastering := frame.side_data.get(SideData.MASTERING_DISPLAY_METADATA)) is not None:
        numbers = np.frombuffer(mastering, np.int32)
        said["mastering"] = [round(float(a / b), 3) for a, b in numbers[:20].reshape(10, 2)]
    if (content := frame.side_data.get(SideData.CONTENT_LIGHT_LEVEL)) is not None:
        said["content"] = np.frombuffer(content, np.uint32)[:2].tolist()
    return said


def site(path: Path, index: int) -> str:
    """Where ffmpeg says that chroma lies; empty where it says nothing."""
    command = [binary(), "-hide_banner", "-i", str(path), "-map", f"0:{index}", "-frames:v", "1"]
    text = subprocess.run([*command, "-vf", "showinfo", "-f", "null", "-"], capture_output=True, text=True, check=True)
    found = re.search(r"chroma_location:(\w+)|chroma_loc:(\w+)", text.stderr)
    return next((name for name in found.groups() if name), "") if found else ""


def psnr(result: Path, source: Path, indexes: tuple[int, int], sample: Sample) -> list[float]:
    """PSNR of luma of each frame of a result, shrunk to its source's size, against the source."""
    with av.open(str(source)) as container:
        context = container.streams[indexes[1]].codec_context
        width, height = context.width, context.height
    mode = "send_field" if sample.settings.get("deinterlace") == "field-rate" else "send_frame"
    frames = f"bwdif=mode={mode}:parity={sample.order}," if sample.order else ""
    graph = (
        f"[0:{indexes[0]}]settb=1/25,setpts=N,scale={width}:{height}:flags=area,format=gray,setsar=1[a];"
        f"[1:{indexes[1]}]{frames}settb=1/25,setpts=N,format=gray,setsar=1[b];[a][b]psnr=stats_file=-"
    )
    command = [binary(), "-v", "error", "-nostdin", "-noautorotate", "-i", str(result), "-noautorotate"]
    command += ["-i", str(source), "-lavfi", graph, "-fps_mode", "passthrough", "-f", "null", "-"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [float(value) for value in re.findall(r"psnr_avg:(\S+)", text)]


def _others(path: Path, index: int) -> list[int]:
    """Streams beside the picture that are carried."""
    with av.open(str(path)) as container:
        return [s.index for s in container.streams if s.index != index and not _is_picture(s)]


def complaints(sample: Sample, source: Path, result: Path, factor: int = 2) -> Iterator[str]:
    """One line for each trait of a result that is not as its source's."""
    before, after = _video(source, sample), _video(result)
    doubled = sample.settings.get("deinterlace") == "field-rate"
    yield from _times_differ(source, result, before, after, doubled)
    yield from _pictures_differ(sample, source, result, before, after, factor)
    yield from _streams_differ(source, result, before, after, sample)
    if words := decoding_complaints(result):
        yield f"decoding says: {words}"
    measured = psnr(result, source, (after, before), sample)
    if len(measured) != len(shown_times(result, after)) or min(measured) < sample.least_psnr:
        yield f"PSNR of {len(measured)} frames, worst {min(measured, default=0):.1f} dB"


def _times_differ(source: Path, result: Path, before: int, after: int, doubled: bool) -> Iterator[str]:
    wanted, written = shown_times(source, before), shown_times(result, after)
    if doubled:
        between = [(a + b) / 2 for a, b in pairwise(wanted)]
        between.append(wanted[-1] + (wanted[-1] - wanted[-2]) / 2)
        wanted = [time for pair in zip(wanted, between, strict=True) for time in pair]
    if len(wanted) != len(written):
        yield f"{len(written)} frames instead of {len(wanted)}"
        return
    with av.open(str(result)) as container:
        tick = container.streams[after].time_base
    assert tick is not None
    # Microseconds: what `start_time` of a container is rounded to, twice.
    room = tick / 2 + Fraction(2, av.time_base)
    worst = max(abs(a - b) for a, b in zip(wanted, written, strict=True))
    if worst > room:
        yield f"a frame is shown {float(worst):.6f} s early or late"


def _pictures_differ(sample: Sample, source: Path, result: Path, before: int, after: int, factor: int) -> Iterator[str]:
    old, new = first_frame(source, before), first_frame(result, after)
    if new.format.name.replace("yuvj", "yuv") != sample.pix_fmt:
        yield f"pixel format {new.format.name} instead of {sample.pix_fmt}"
    with av.open(str(source)) as a, av.open(str(result)) as b:
        shapes = [c.streams[i].sample_aspect_ratio or Fraction(1) for c, i in ((a, before), (b, after))]
    squared = sample.settings.get("square_pixels")
    width = 2 * round(old.width * factor * (shapes[0] if squared else 1) / 2)
    if (new.width, new.height) != (width, 2 * round(old.height * factor / 2)):
        yield f"{new.width}x{new.height} of {old.width}x{old.height}"
    if shapes[1] != (1 if squared else shapes[0]):
        yield f"sample aspect {shapes[1]} instead of {shapes[0]}"
    if _matrix(source, before) != _matrix(result, after):
        yield f"display matrix {_matrix(result, after)} instead of {_matrix(source, before)}"
    if new.interlaced_frame and sample.settings.get("deinterlace") != "off":
        yield "interlaced"
    is_rgb = old.format.name.startswith(("gbr", "rgb", "bgr"))
    for trait, unsaid in (("colorspace", 2), ("color_range", 0), ("color_primaries", 2), ("color_trc", 2)):
        wanted, written = int(getattr(old, trait)), int(getattr(new, trait))
        if wanted not in (unsaid, written) and not (is_rgb and new.format.name.startswith("yuv")):
            yield f"{trait} {written} instead of {wanted}"
    if sample.settings.get("encoder", "h264") not in ("ffv1", "prores") and light(old) != light(new):
        yield f"light {light(new)} instead of {light(old)}"
    if "420" in old.format.name and "420" in new.format.name:
        wanted_site, written_site = site(source, before), site(result, after)
        if wanted_site not in ("", "unspecified", "unknown", written_site):
            yield f"chroma at {written_site} instead of {wanted_site}"


def _matrix(path: Path, index: int) -> tuple[int, ...]:
    """The display matrix of a stream as ffmpeg shows it; empty for none."""
    command = [binary(), "-hide_banner", "-noautorotate", "-i", str(path), "-map", f"0:{index}", "-frames:v", "1"]
    command += ["-vf", "showinfo", "-f", "null", "-"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return tuple(int(number) for row in re.findall(r"0000000\d: +(-?\d+) +(-?\d+) +(-?\d+)", text) for number in row)


def _streams_differ(source: Path, result: Path, before: int, after: int, sample: Sample) -> Iterator[str]:
    pairs = list(zip(_others(source, before), _others(result, after), strict=False))
    with av.open(str(source)) as a, av.open(str(result)) as b:
        kinds = [[c.streams[i].type for i in _others(p, v)] for c, p, v in ((a, source, before), (b, result, after))]
        if sample.name == "laden-to-mp4.mkv":  # MP4 has no ASS and no fonts; that is said before work starts.
            kinds[0] = [kind for kind in kinds[0] if kind == "audio"]
            pairs = pairs[: len(kinds[0])]
            kinds[1] = [kind for kind in kinds[1] if kind != "data"]
        if kinds[0] != kinds[1]:
            yield f"streams {kinds[1]} instead of {kinds[0]}"
        # MP4 marks the first stream of a kind as default where none is, and titles of chapters are a stream there.
        default = int(Disposition.default) if result.suffix in (".mp4", ".mov") else 0
        said = [
            [_said(c.streams[i], default) for i, c in zip(pair, (a, b), strict=True)]
            for pair in [(before, after), *pairs]
        ]
        yield from (f"stream says {new} instead of {old}" for old, new in said if not old.items() <= new.items())
        chapters = [
            [(c["metadata"], round(c["start"] * float(c["time_base"]), 3)) for c in x.chapters()] for x in (a, b)
        ]
        if chapters[0] != chapters[1]:
            yield f"chapters {chapters[1]} instead of {chapters[0]}"
        titles = [{k.lower(): v for k, v in c.metadata.items() if k.lower() in ("title", "artist")} for c in (a, b)]
        if titles[0] != titles[1]:
            yield f"titles {titles[1]} instead of {titles[0]}"
    shift = start_time(source) - start_time(result)
    for original, copy in pairs:
        if sample.sound:
            yield from _sound_differs(sample, source, result, original, copy)
            continue
        first, second = packets(source, original), packets(result, copy)
        if second and second[-1].data == b"\0\0" and len(second) > len(first):
            second.pop()  # In MP4 an empty line ends the last one.
        if [without_adts(p.data) for p in first] != [without_adts(p.data) for p in second]:
            yield f"packets of stream {original} differ ({len(second)} of {len(first)})"
            continue
        moved = [(p.time, q.time or Fraction(0)) for p, q in zip(first, second, strict=True) if p.time is not None]
        if any(abs(old - new - shift) > Fraction(1, 500) for old, new in moved):
            yield f"stream {original} is shifted"


def _sound_differs(sample: Sample, source: Path, result: Path, original: int, copy: int) -> Iterator[str]:
    with av.open(str(result)) as container:
        codec = container.streams[copy].codec_context.name
    if codec != sample.sound:
        yield f"sound is kept as {codec} instead of {sample.sound}"
    if heard_exactly(source, f"0:{original}") != heard_exactly(result, f"0:{copy}"):
        yield f"samples of stream {original} differ"
    times = []
    for path, index in ((source, original), (result, copy)):
        with av.open(str(path)) as container:
            times.append(next(container.decode(container.streams[index])).time - float(start_time(path)))
    if abs(times[0] - times[1]) > 0.002:
        yield f"sound of stream {original} begins at {times[1]:.3f} s instead of {times[0]:.3f} s"


def _said(stream: Any, ignored: int) -> dict[str, Any]:
    # MP4 calls the title of a stream its name.
    said = {"title" if key.lower() == "name" else key.lower(): value for key, value in stream.metadata.items()}
    tags = {key: value for key, value in said.items() if key in _KEPT_TAGS}
    if tags.get("language") == "und":
        del tags["language"]
    return {**tags, **({"disposition": int(stream.disposition) & ~ignored} if stream.type != "data" else {})}
