"""Probing: facts are exact, and what cannot be done faithfully is refused by name."""

from __future__ import annotations

import os
import shutil
from fractions import Fraction
from pathlib import Path

import pytest

from tasks.errors import SourceError, UnsupportedSourceError
from tasks.media.probe import SourceFacts, probe, refuse_unsupported
from tests.media.clips import GOOD, HEIGHT, RATES, WIDTH, Clips, rate_name


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize("rate", RATES, ids=str)
def test_rate_is_the_exact_rational(clips: Clips, rate: Fraction, ending: str) -> None:
    assert probe(clips.path(rate_name(rate, ending))).frame_rate == rate


@pytest.mark.parametrize("name", GOOD)
def test_good_clips_are_accepted_with_their_size(clips: Clips, name: str) -> None:
    facts = probe(clips.path(name))
    refuse_unsupported(facts)
    assert (facts.width, facts.height, facts.picture.pix_fmt) == (WIDTH, HEIGHT, "yuv420p")
    assert facts.size_bytes == clips.path(name).stat().st_size
    assert not facts.streams[facts.video_index].cover_art


def test_container_tags_are_read(clips: Clips) -> None:
    facts = probe(clips.path("rich.mkv"))
    assert [(stream.kind, stream.language) for stream in facts.streams] == [
        ("video", "jpn"), ("audio", "eng"), ("audio", "deu"), ("subtitle", "fra"), ("attachment", None),
    ]  # fmt: skip
    assert facts.streams[2].title == "Commentary"


def test_cover_art_is_not_the_video(clips: Clips) -> None:
    facts = probe(clips.path("cover-art.mp4"))
    assert facts.codec == "h264"
    assert [stream.cover_art for stream in facts.streams] == [False, False, True]


def test_start_of_a_transport_stream_is_kept(clips: Clips) -> None:
    assert probe(clips.path("offset.ts")).start_seconds > 37


def test_sample_aspect_ratio_is_exact(clips: Clips) -> None:
    assert probe(clips.path("wide-pixels.mp4")).sample_aspect_ratio == Fraction(64, 45)


def test_declared_frames_are_those_of_the_header(clips: Clips) -> None:
    assert probe(clips.path("rate-25-1.mp4")).declared_frames == 80


def test_tagged_colour_is_believed(clips: Clips) -> None:
    facts = probe(clips.path("rate-25-1.mp4"))
    colour = facts.colour
    assert (colour.matrix, colour.full_range, colour.primaries, colour.transfer) == ("bt709", False, "bt709", "bt709")
    assert facts.colour_assumed == ()


def test_untagged_small_picture_is_taken_for_limited_bt601_and_said_so(clips: Clips) -> None:
    facts = probe(clips.path("audio-offset.mp4"))
    assert (facts.colour.matrix, facts.colour.full_range) == ("smpte170m", False)
    assert facts.colour_assumed == ("matrix", "range")


def test_full_range_is_kept(clips: Clips) -> None:
    facts = probe(clips.path("full-range.mp4"))
    assert facts.colour.full_range
    assert facts.picture.pix_fmt == "yuv420p"


def test_facts_survive_json(clips: Clips) -> None:
    facts = probe(clips.path("rich.mp4"))
    data = facts.to_dict()
    assert data["frame_rate"] == "24000/1001"
    assert set(data) == set(SourceFacts.__dataclass_fields__)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("ten-bit.mkv", "yuv420p10le"),
        ("full-chroma.mkv", "yuv444p"),
        ("full-range.mp4", "yuv420p"),
        ("odd-size.mkv", "yuv420p"),
    ],
)
def test_the_layout_of_frames_is_known(clips: Clips, name: str, layout: str) -> None:
    facts = probe(clips.path(name))
    refuse_unsupported(facts)
    assert facts.picture.pix_fmt == layout


def test_how_players_turn_the_picture_is_known(clips: Clips) -> None:
    facts = probe(clips.path("rotated.mp4"))
    assert facts.rotation == 90
    assert facts.display_matrix == (0, -65536, 0, 65536, 0, 0, 0, 0, 1 << 30)
    assert probe(clips.path("rich.mp4")).display_matrix == ()


@pytest.mark.parametrize(
    ("name", "trait"),
    [
        ("sixteen-bit.mkv", "yuv420p16le"),
        ("ictcp.mkv", "colour matrix ictcp"),
    ],
)
def test_what_is_not_handled_is_refused_by_name(clips: Clips, name: str, trait: str) -> None:
    facts = probe(clips.path(name))
    with pytest.raises(UnsupportedSourceError) as refusal:
        refuse_unsupported(facts)
    assert trait in str(refusal.value)
    assert name in str(refusal.value)
    assert refusal.value.remedy


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sound.m4a", "holds no video (it holds: audio)"),
        ("still.png", "is a picture"),
        ("still.jpg", "is a picture"),
        ("notes.txt", "is a text file"),
        ("notes.mp4", "is a text file"),
        ("playlist.m3u8", "list or text"),
        ("playlist.mp4", "is a text file"),
        ("script.ffconcat", "not a video"),
        ("script.mkv", "not a video"),
        ("relative.ffconcat", "list or text"),
        ("bomb.y4m", "not a video"),
        ("no-index.mp4", "moov"),
    ],
)
def test_what_is_no_video_is_refused_with_the_reason(clips: Clips, name: str, reason: str) -> None:
    clips.path("plain.ts")
    with pytest.raises(SourceError) as refusal:
        probe(clips.path(name))
    assert reason in str(refusal.value)
    assert name in str(refusal.value)
    assert refusal.value.remedy


def test_missing_empty_and_special_files_are_refused(tmp_path: Path) -> None:
    empty, pipe = tmp_path / "empty.mp4", tmp_path / "pipe.mp4"
    empty.touch()
    os.mkfifo(pipe)
    for path, reason in [
        (tmp_path / "nowhere.mp4", "does not exist"),
        (empty, "is empty"),
        (tmp_path, "is a directory"),
        (pipe, "not a regular file"),
    ]:
        with pytest.raises(SourceError, match=reason):
            probe(path)


@pytest.mark.parametrize(
    "name", ["http:x.mp4", "concat:a.mp4|b.mp4", "-i.mp4", "% d 'quoted\" $(x).mp4", "línea\n.mp4"]
)
def test_file_names_mean_only_themselves(clips: Clips, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    shutil.copy(clips.path("one-frame.mp4"), path)
    assert probe(path).width == WIDTH
