"""Sound that PyAV does not offer Matroska, or that no container holds as it is: every sample comes out, at its time.

Codecs that the bundled ffmpeg can encode. A witness hears each stream of both files as ffmpeg decodes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Final

import av
import numpy as np
import pytest

from tasks.errors import SourceError
from tests.media.clips import picture, run_ffmpeg
from tests.media.jobs import Joined, join
from tests.media.witness import decoding_complaints, heard_exactly, packets, start_time

_SECONDS: Final = 1.2
_VIDEO: Final = ("-c:v", "mpeg4", "-qscale:v", "4")
_MPEG2: Final = ("-c:v", "mpeg2video", "-qscale:v", "4")

#: File -> the options that make its sound, two channels of 48 kHz unless they say otherwise.
FILES: Final = {
    "ima.avi": (*_VIDEO, "-c:a", "adpcm_ima_wav"),
    "ms.avi": (*_VIDEO, "-c:a", "adpcm_ms"),
    "yamaha.avi": (*_VIDEO, "-c:a", "adpcm_yamaha"),
    "swf.flv": ("-c:v", "flv", "-ar", "44100", "-c:a", "adpcm_swf"),
    "wma1.wmv": ("-c:v", "wmv2", "-c:a", "wmav1"),
    "wma2.wmv": ("-c:v", "wmv2", "-c:a", "wmav2"),
    "alaw.mov": ("-c:v", "mjpeg", "-c:a", "pcm_alaw"),
    "mulaw.avi": (*_VIDEO, "-ar", "8000", "-ac", "1", "-c:a", "pcm_mulaw"),
    "g723.avi": (*_VIDEO, "-ar", "8000", "-ac", "1", "-b:a", "6.3k", "-c:a", "g723_1"),
    "amr.3gp": ("-c:v", "h263", "-s", "176x144", "-ar", "8000", "-ac", "1", "-c:a", "libopencore_amrnb"),
    "ima4.mov": ("-c:v", "mjpeg", "-c:a", "adpcm_ima_qt"),
    "bytes.mov": ("-c:v", "mjpeg", "-c:a", "pcm_s8"),
    "float.mov": ("-c:v", "mjpeg", "-c:a", "pcm_f32be"),
    "dvd.vob": (*_MPEG2, "-c:a", "pcm_dvd", "-sample_fmt", "s32"),
    "bluray.m2ts": (*_MPEG2, "-c:a", "pcm_bluray", "-sample_fmt", "s32"),
    "bluray-surround.m2ts": (*_MPEG2, "-ac", "6", "-c:a", "pcm_bluray", "-sample_fmt", "s16"),
    "late-bluray.m2ts": (*_MPEG2, "-filter:a", "asetpts=PTS+0.4/TB", "-c:a", "pcm_bluray", "-sample_fmt", "s16"),
    "early-bluray.m2ts": (*_MPEG2, "-vf", "setpts=PTS+0.4/TB", "-c:a", "pcm_bluray", "-sample_fmt", "s16"),
    "broadcast.ts": (*_MPEG2, "-c:a", "s302m", "-strict", "-2"),
    "voice.flv": ("-c:v", "flv", "-ar", "22050", "-ac", "1", "-c:a", "nellymoser"),
    "opus.webm": ("-c:v", "libvpx", "-deadline", "realtime", "-c:a", "libopus"),
    "flac.mkv": (*_VIDEO, "-c:a", "flac", "-sample_fmt", "s32"),
    "truehd.mkv": (*_VIDEO, "-c:a", "truehd", "-strict", "-2"),
    "phone.rm": ("-c:v", "rv20", "-s", "176x144", "-ar", "8000", "-ac", "1", "-c:a", "real_144"),
    "wide.nut": (*_VIDEO, "-c:a", "pcm_s64le"),
    "pcm.mxf": (*_MPEG2, "-c:a", "pcm_s24le"),
}

#: Files whose packets come into Matroska as they are, by the ffmpeg program.
BY_PROGRAM: Final = (
    *("ima.avi", "ms.avi", "yamaha.avi", "swf.flv", "wma1.wmv", "wma2.wmv", "alaw.mov", "mulaw.avi", "g723.avi"),
    "amr.3gp",
)

#: File, container of the result -> the codec in which its sound is kept.
KEPT: Final = {
    ("ima4.mov", "mkv"): "flac",
    ("bytes.mov", "mkv"): "flac",
    ("float.mov", "mkv"): "pcm_f32le",
    ("dvd.vob", "mkv"): "flac",
    ("bluray.m2ts", "mkv"): "flac",
    ("bluray-surround.m2ts", "mkv"): "flac",
    ("late-bluray.m2ts", "mkv"): "flac",
    ("early-bluray.m2ts", "mkv"): "flac",
    ("broadcast.ts", "mkv"): "flac",
    ("voice.flv", "mkv"): "pcm_f32le",
    ("ima.avi", "mp4"): "flac",
    ("wma2.wmv", "mp4"): "pcm_f32le",
    ("alaw.mov", "mp4"): "flac",
    ("late-bluray.m2ts", "mp4"): "flac",
    ("truehd.mkv", "mp4"): "flac",
    ("flac.mkv", "mov"): "pcm_s24le",
    ("opus.webm", "mov"): "pcm_f32le",
    ("phone.rm", "mov"): "pcm_s16le",
    ("late-bluray.m2ts", "mov"): "pcm_s16le",
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives a file of `FILES`, made once."""
    folder = tmp_path_factory.mktemp("sound")
    wave = "0.4*sin(2*PI*(440+9*sin(3*t))*t)+0.1*random(0)|0.3*sin(2*PI*(660+9*sin(2*t))*t)"
    heard = ("-f", "lavfi", "-i", f"aevalsrc='{wave}':s=48000:d={_SECONDS}")

    def made(name: str) -> Path:
        path = folder / name
        if not path.exists():
            kind = ("-f", "mpegts") if path.suffix == ".m2ts" else ("-f", "vob") if path.suffix == ".vob" else ()
            run_ffmpeg(*picture("25", _SECONDS, "64x48"), *heard, *FILES[name], *kind, path)
        return path

    return made


@pytest.fixture(scope="module")
def joined(make: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Joined]:
    """Gives the result of a file in a container, made once."""
    folder, done = tmp_path_factory.mktemp("joined"), {}

    def get(name: str, ending: str) -> Joined:
        if (name, ending) not in done:
            done[name, ending] = join(make(name), folder / f"{name}.{ending}", groups_per_chunk=100)
        return done[name, ending]

    return get


def _sound(path: Path) -> int:
    with av.open(str(path)) as container:
        return container.streams.audio[0].index


def _times(path: Path) -> list[tuple[int, float]]:
    """Number of the first sample of each decoded frame, and its time in seconds from the start of the file."""
    start, found, number = float(start_time(path)), [], 0
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            if frame.time is not None:
                found.append((number, frame.time - start))
            number += frame.samples
    return found


def _offset(path: Path) -> float:
    """Seconds from the first picture to the first sound."""
    with av.open(str(path)) as container:
        first = next(container.decode(video=0)).time
    with av.open(str(path)) as container:
        return next(container.decode(audio=0)).time - first


@pytest.mark.parametrize("name", BY_PROGRAM)
def test_matroska_holds_the_very_packets_of_sound_that_it_knows_by_number(
    joined: Callable[..., Joined], make: Callable[[str], Path], name: str
) -> None:
    source, result = make(name), joined(name, "mkv")
    index = _sound(source)
    assert (result.carried.by_program, result.carried.kept, result.carried.left_out) == ((index,), {}, {})
    with av.open(str(source)) as before, av.open(str(result.path)) as after:
        contexts = [container.streams.audio[0].codec_context for container in (before, after)]
        assert len({(context.name, context.sample_rate, context.channels) for context in contexts}) == 1
        assert after.streams.audio[0].index == 1
    sent, found = packets(source, index), packets(result.path, 1)
    assert [packet.data for packet in found] == [packet.data for packet in sent]
    start = start_time(source)
    assert max(abs(new.time - old.time + start) for new, old in zip(found, sent, strict=True)) <= Fraction(1, 1000)
    if name != "amr.3gp":  # Its edit list cuts 50 samples, before time zero in the copy.
        assert heard_exactly(result.path) == heard_exactly(source)
    assert decoding_complaints(result.path) == ""
    assert not list(result.path.parent.glob(f"{result.path.name}.partial*"))


@pytest.mark.parametrize(("name", "ending"), list(KEPT))
def test_what_cannot_be_copied_is_kept_sample_by_sample(
    joined: Callable[..., Joined], make: Callable[[str], Path], name: str, ending: str
) -> None:
    source, result = make(name), joined(name, ending)
    index = _sound(source)
    assert result.carried.left_out == {}
    assert result.carried.kept[index].encoder == KEPT[name, ending]
    with av.open(str(result.path)) as container:
        assert container.streams.audio[0].codec_context.name == KEPT[name, ending]
    assert heard_exactly(result.path) == heard_exactly(source)
    assert decoding_complaints(result.path) == ""
    assert abs(_offset(result.path) - _offset(source)) <= 0.002
    assert result.report.notes == ()
    (note,) = result.carried.notes()
    assert note.startswith(f"stream {index} is kept as {'FLAC' if KEPT[name, ending] == 'flac' else 'PCM'}")
    assert f"cannot be copied into .{ending}" in note


def test_the_hint_names_the_container_that_would_copy(joined: Callable[..., Joined]) -> None:
    said = {name: next(joined(name, "mp4").carried.notes()) for name in ("wma2.wmv", "late-bluray.m2ts")}
    assert said["wma2.wmv"].endswith("wmav2 cannot be copied into .mp4; a .mkv result can hold it")
    assert said["late-bluray.m2ts"].endswith("pcm_bluray cannot be copied into .mp4")


def test_sound_that_cannot_be_kept_is_left_out_by_name(joined: Callable[..., Joined]) -> None:
    carried = joined("wide.nut", "mkv").carried
    assert (carried.indexes, carried.kept) == ((), {})
    assert carried.left_out[1].startswith("pcm_s64le cannot be stored in matroska")


@pytest.mark.parametrize("ending", ["mov", "mp4"])
def test_pcm_that_a_container_cuts_into_other_packets_is_whole(
    joined: Callable[..., Joined], make: Callable[[str], Path], ending: str
) -> None:
    source, result = make("pcm.mxf"), joined("pcm.mxf", ending)
    assert len(packets(result.path, 1)) != len(packets(source, 1))
    assert b"".join(p.data for p in packets(result.path, 1)) == b"".join(p.data for p in packets(source, 1))
    assert result.report.other_packets == {1: round(_SECONDS * 48000)}


def test_what_streams_say_and_their_order_survive_the_program(make: Callable[[str], Path], tmp_path: Path) -> None:
    several, lines = tmp_path / "several.mkv", tmp_path / "lines.srt"
    lines.write_text("1\n00:00:00,200 --> 00:00:00,900\nfirst\n")
    run_ffmpeg(
        *(
            "-i",
            make("wma2.wmv"),
            "-i",
            make("alaw.mov"),
            "-i",
            lines,
            "-i",
            make("ms.avi"),
            "-map",
            "0:a",
            "-map",
            "0:v",
        ),
        *("-map", "1:a", "-map", "2", "-map", "3:a", "-c", "copy", "-c:a:1", "mp2", "-metadata", "title=The Film"),
        *("-metadata:s:a:0", "language=deu", "-metadata:s:a:1", "language=eng", "-metadata:s:a:0", "title=A = b"),
        *("-disposition:a", "0", "-disposition:a:2", "default+comment", "-disposition:s:0", "forced", several),
    )
    result = join(several, tmp_path / "result.mkv")
    assert result.carried.by_program == (0, 4)
    with av.open(str(several)) as before, av.open(str(result.path)) as after:
        given, streams = list(before.streams), list(after.streams)
        assert [stream.codec_context.name for stream in streams] == ["h264", "wmav2", "mp2", "srt", "adpcm_ms"]
        assert streams[1].metadata["title"] == "A = b"
        assert after.metadata["title"] == "The Film"
        for position, index in enumerate((1, 0, 2, 3, 4)):
            assert streams[position].disposition == given[index].disposition
            assert streams[position].metadata.get("language") == given[index].metadata.get("language")
    for position, index in enumerate((0, 2, 3, 4), start=1):
        assert [p.data for p in packets(result.path, position)] == [p.data for p in packets(several, index)]


def _remade(source: Path, path: Path, change: Callable[[list[av.Packet]], Iterator[av.Packet]]) -> None:
    """A copy of a file with the packets of its sound passed through `change`."""
    kind = "mpegts" if path.suffix == ".m2ts" else None
    with av.open(str(source)) as given, av.open(str(path), "w", format=kind) as to:
        streams = {stream.index: to.add_stream_from_template(stream) for stream in given.streams}
        all_packets = [packet for packet in given.demux() if packet.size]
        heard = {id(p): p for p in change([p for p in all_packets if p.stream.type == "audio"])}
        for packet in all_packets:
            if packet.stream.type == "video" or id(packet) in heard:
                packet.stream = streams[packet.stream.index]
                to.mux(packet)


def _hole(sound: list[av.Packet]) -> Iterator[av.Packet]:
    """Nothing between a third and two thirds."""
    yield from sound[: len(sound) // 3]
    yield from sound[2 * len(sound) // 3 :]


def test_a_gap_stays_a_gap_where_the_container_tells_times(make: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "hole.m2ts"
    _remade(make("bluray.m2ts"), source, _hole)
    for ending in ("mkv", "mp4"):
        result = join(source, tmp_path / f"hole.{ending}")
        assert result.carried.kept[1].encoder == "flac"
        assert heard_exactly(result.path) == heard_exactly(source)
        before, after = dict(_times(source)), dict(_times(result.path))
        kept = result.report.kept[1]
        assert len(kept.runs) == 2
        second = kept.runs[1][0]
        assert abs(after[second] - before[second]) <= 0.002
        assert after[second] - _SECONDS / 3 > second / 48000 - 0.1
        assert (kept.silence, kept.dropped) == (0, 0)


def test_a_gap_is_silent_where_the_container_counts_samples(make: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "hole.mkv"
    _remade(make("flac.mkv"), source, _hole)
    result = join(source, tmp_path / "hole.mov")
    kept = result.report.kept[1]
    frames = _times(source)
    first = next(number for (number, time), (_, before) in zip(frames[1:], frames, strict=False) if time - before > 0.2)
    silence = round(kept.silence * 48000)
    assert abs(dict(frames)[first] - (first + silence) / 48000) <= 0.002
    assert result.report.notes == (f"stream 1: {kept.silence:.2f} s of gaps in its sound are filled with silence",)
    before, after = _samples(source), _samples(result.path)
    assert np.array_equal(after[:first], before[:first])
    assert not after[first : first + silence].any()
    assert np.array_equal(after[first + silence :], before[first:])


def _samples(path: Path) -> np.ndarray:
    """Decoded packed sound; [samples, 2]."""
    with av.open(str(path)) as container:
        return np.concatenate([frame.to_ndarray().reshape(-1, 2) for frame in container.decode(audio=0)])


def test_sound_above_earlier_sound_is_dropped_where_the_container_counts_samples(
    make: Callable[[str], Path], tmp_path: Path
) -> None:
    def hurried(sound: list[av.Packet]) -> Iterator[av.Packet]:
        for number, packet in enumerate(sound):
            packet.pts = packet.dts = packet.pts - 10 * min(number, 20)  # In milliseconds; a packet lasts 21.
            yield packet

    source = tmp_path / "hurried.mkv"
    _remade(make("flac.mkv"), source, hurried)
    result = join(source, tmp_path / "hurried.mov")
    kept = result.report.kept[1]
    assert kept.dropped == pytest.approx(0.2, abs=0.021)
    assert "lay above earlier sound" in result.report.notes[0]
    assert kept.samples == round(_SECONDS * 48000) - round(kept.dropped * 48000)


def test_damaged_sound_is_counted_and_leaves_the_rest_in_its_place(make: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "damaged.mkv"
    content = bytearray(make("flac.mkv").read_bytes())
    victim = packets(make("flac.mkv"), 1)[5].data
    content[content.index(victim) : content.index(victim) + len(victim)] = b"\x55" * len(victim)
    source.write_bytes(content)
    result = join(source, tmp_path / "damaged.mov")
    kept = result.report.kept[1]
    assert kept.damaged == 1
    assert kept.silence == pytest.approx(1024 / 48000, abs=0.002)
    assert result.report.notes[0] == "stream 1: 1 packets of its sound are damaged; nothing is heard at their times"
    assert kept.samples == round(_SECONDS * 48000)


def test_sound_that_changes_its_channels_is_refused_by_name(make: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "changing.m2ts"
    with (
        av.open(str(make("bluray-surround.m2ts"))) as surround,
        av.open(str(make("bluray.m2ts"))) as stereo,
        av.open(str(source), "w", format="mpegts") as to,
    ):
        streams = [to.add_stream_from_template(stream) for stream in stereo.streams]
        last = shift = 0
        for given in (stereo, surround):
            for packet in given.demux() if given is stereo else given.demux(audio=0):
                if not packet.size:
                    continue
                if given is surround:
                    shift = shift or last + 450 - packet.pts
                    packet.pts = packet.dts = packet.pts + shift
                elif packet.stream.type == "audio":
                    last = packet.pts
                packet.stream = streams[packet.stream.index]
                to.mux(packet)
    with pytest.raises(SourceError, match=r"stream 1 changes from 48000 Hz stereo to 48000 Hz 5\.1"):
        join(source, tmp_path / "changing.mkv")
