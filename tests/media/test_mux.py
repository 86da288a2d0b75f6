"""The result: every frame at its own time, everything else of the source unchanged, or said why not."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import pytest

from tasks.errors import ChunkFileError, SettingsError
from tasks.media.mux import mux, muxer_of
from tests.media.clips import RATES, Clips, rate_name
from tests.media.jobs import Joined, join
from tests.media.witness import (
    decoding_complaints,
    heard_samples,
    packets,
    shown_frames,
    start_time,
    without_adts,
)

#: One of each kind; the rates have a test of their own.
KINDS = (
    *("rate-24000-1001.mp4", "open-gop-hevc.mkv", "plain.ts", "offset.ts", "audio-offset.mp4", "copy-cut.mp4"),
    *("vp9.webm", "one-frame.mp4", "rich.mkv", "rich.mp4", "cover-art.mp4"),
)


@pytest.fixture(scope="module")
def joined(clips: Clips, tmp_path_factory: pytest.TempPathFactory):
    """Gives the result of a clip in a container, made once."""
    folder, done = tmp_path_factory.mktemp("joined"), {}

    def get(name: str, ending: str, profile: str = "h264") -> Joined:
        key = f"{Path(name).stem}-{Path(name).suffix[1:]}-{profile}.{ending}"
        if key not in done:
            done[key] = join(clips.path(name), folder / key, profile)
        return done[key]

    return get


def _video_times(path: Path) -> list[Fraction]:
    return sorted(packet.time for packet in packets(path, 0) if packet.time is not None)


@pytest.mark.parametrize("rate", RATES, ids=str)
def test_mp4_keeps_every_time_and_the_rate_exactly(joined, rate: Fraction) -> None:
    result = joined(rate_name(rate, "mp4"), "mp4")
    assert _video_times(result.path) == [number / rate for number in range(len(result.table))]
    with av.open(str(result.path)) as container:
        assert container.streams.video[0].average_rate == rate
        assert container.streams.video[0].frames == len(result.table)
        assert container.streams.video[0].duration * container.streams.video[0].time_base == len(result.table) / rate


@pytest.mark.parametrize("rate", RATES, ids=str)
def test_matroska_keeps_every_time_to_half_its_tick(joined, rate: Fraction) -> None:
    result = joined(rate_name(rate, "mp4"), "mkv")
    times = _video_times(result.path)
    assert len(times) == len(result.table)
    assert max(abs(time - number / rate) for number, time in enumerate(times)) <= Fraction(1, 2000)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize("name", KINDS)
def test_frames_are_shown_at_the_sources_times_counted_from_its_start(
    joined, clips: Clips, name: str, ending: str
) -> None:
    result = joined(name, ending)
    start = start_time(clips.path(name))
    wanted = [frame.time - start for frame in shown_frames(clips.path(name), f"0:{result.facts.video_index}")]
    shown = [frame.time for frame in shown_frames(result.path)]
    assert len(shown) == len(wanted)
    tick = Fraction(1, 1_000_000) if ending == "mp4" else Fraction(1, 2000) + Fraction(1, 1_000_000)
    assert max(abs(found - time) for found, time in zip(shown, wanted, strict=True)) <= tick


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize("name", KINDS)
def test_carried_packets_are_those_of_the_source(joined, clips: Clips, name: str, ending: str) -> None:
    result = joined(name, ending)
    start = start_time(clips.path(name))
    for position, index in enumerate(result.carried.indexes, start=1):
        sent, found = packets(clips.path(name), index), packets(result.path, position)
        assert [packet.data for packet in found] == [without_adts(packet.data) for packet in sent]
        assert result.report.other_packets[index] == len(sent)
        pairs = [(new.time, old.time) for new, old in zip(found, sent, strict=True) if old.time is not None]
        errors = [abs(new - old + start) for new, old in pairs]
        assert max(errors, default=0) <= Fraction(1, 1000)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize("name", KINDS)
def test_result_decodes_without_complaint(joined, name: str, ending: str) -> None:
    assert decoding_complaints(joined(name, ending).path) == ""


@pytest.mark.parametrize("name", ["rate-24000-1001.mp4", "audio-offset.mp4", "copy-cut.mp4", "rich.mp4"])
def test_the_very_samples_of_the_source_are_heard(joined, clips: Clips, name: str) -> None:
    assert heard_samples(joined(name, "mp4").path) == heard_samples(clips.path(name))


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize("name", ["audio-offset.mp4", "plain.ts", "offset.ts"])
def test_sound_keeps_its_offset_to_the_picture(joined, clips: Clips, name: str, ending: str) -> None:
    def offset(path: Path, audio: int) -> Fraction:
        sound = next(packet.time for packet in packets(path, audio))
        return sound - _video_times(path)[0]

    result = joined(name, ending)
    wanted = offset(clips.path(name), result.carried.indexes[0])
    assert abs(offset(result.path, 1) - wanted) <= Fraction(1, 1000)
    if name == "audio-offset.mp4":
        assert wanted > Fraction(3, 10)


def test_streams_chapters_and_tags_of_matroska_come_through(joined) -> None:
    result = joined("rich.mkv", "mkv")
    assert result.carried.left_out == {}
    with av.open(str(result.path)) as container:
        assert container.metadata["title"] == "The Film"
        assert {key.lower(): value for key, value in container.metadata.items()}["artist"] == "The Maker"
        chapters = [
            (part["metadata"]["title"], part["start"] * part["time_base"], part["end"] * part["time_base"])
            for part in container.chapters()
        ]
        assert chapters == [("Opening", 0, Fraction(3, 2)), ("Ending", Fraction(3, 2), Fraction(31, 10))]
        streams = list(container.streams)
        assert [stream.type for stream in streams] == ["video", "audio", "audio", "subtitle", "attachment"]
        assert [stream.metadata.get("language") for stream in streams[:4]] == ["jpn", "eng", "deu", "fra"]
        assert streams[2].metadata["title"] == "Commentary"
        assert [bool(stream.disposition & av.stream.Disposition.default) for stream in streams[1:3]] == [False, True]
        assert streams[3].disposition & av.stream.Disposition.forced
        letters = streams[4]
        assert letters.metadata["filename"] == "letters.ttf"
        assert letters.metadata["mimetype"] == "application/x-truetype-font"
        assert bytes(letters.data) == b"\0\1\0\0" + bytes(range(256)) * 8


def test_streams_chapters_and_tags_of_mp4_come_through(joined) -> None:
    result = joined("rich.mp4", "mp4")
    with av.open(str(result.path)) as container:
        assert container.metadata["title"] == "The Film"
        assert [chapter["metadata"]["title"] for chapter in container.chapters()] == ["Opening", "Ending"]
        kept = [stream for stream in container.streams if stream.type != "data"]
        assert [stream.type for stream in kept] == ["video", "audio", "audio", "subtitle"]
        assert [stream.metadata.get("language") for stream in kept] == ["jpn", "eng", "deu", "fra"]
        assert [bool(stream.disposition & av.stream.Disposition.default) for stream in kept[1:3]] == [False, True]


def test_cover_art_comes_through(joined) -> None:
    result = joined("cover-art.mp4", "mp4")
    with av.open(str(result.path)) as container:
        assert [stream.codec_context.name for stream in container.streams.video] == ["h264", "png"]
        assert container.streams.video[1].disposition & av.stream.Disposition.attached_pic


def test_what_the_container_cannot_hold_is_listed_with_the_reason(joined) -> None:
    result = joined("rich.mkv", "mp4")
    assert set(result.carried.left_out) == {3, 4}
    assert "srt cannot be stored in mp4" in result.carried.left_out[3].replace("subrip", "srt")
    assert "cannot be stored in mp4" in result.carried.left_out[4]
    assert result.carried.indexes == (1, 2)


@pytest.mark.parametrize("profile", ["h264", "h265"])
def test_pixel_shape_comes_out(joined, profile: str) -> None:
    path = joined("wide-pixels.mp4", "mkv", profile).path
    with av.open(str(path)) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(64, 45)


def test_colour_tags_come_out(joined) -> None:
    for name, codes in [("full-range.mp4", (5, 2)), ("rate-24000-1001.mp4", (1, 1))]:
        for ending in ("mp4", "mkv"):
            with av.open(str(joined(name, ending).path)) as container:
                frame = next(container.decode(video=0))
                assert (int(frame.colorspace), int(frame.color_range)) == codes


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_lengths_of_the_streams_are_those_of_the_source(joined, clips: Clips, ending: str) -> None:
    result = joined("rate-24000-1001.mp4", ending)
    with av.open(str(result.path)) as found, av.open(str(clips.path("rate-24000-1001.mp4"))) as source:
        assert found.duration == pytest.approx(source.duration, abs=25_000)


def test_too_few_or_too_many_chunks_are_refused(joined, tmp_path: Path) -> None:
    result = joined("rate-25-1.mp4", "mp4")
    chunks = sorted(
        result.path.parent.glob(f"{result.path.name}-*.mkv"), key=lambda path: int(path.stem.rpartition("-")[2])
    )
    for wrong in (chunks[:-1], [*chunks, chunks[-1]]):
        with pytest.raises(ChunkFileError):
            mux(result.facts, result.table, wrong, result.carried, tmp_path / "wrong.mp4", "mp4")


def test_unknown_endings_are_refused_with_the_known_ones() -> None:
    assert [muxer_of(Path(name)) for name in ("a.mp4", "a.MKV", "a.m4v", "a.mov")] == ["mp4", "matroska", "mp4", "mov"]
    for name in ("a", "a.avi", "mp4"):
        with pytest.raises(SettingsError, match=r"\.mp4, \.m4v, \.mov, \.mkv"):
            muxer_of(Path(name))
