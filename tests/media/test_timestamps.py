"""The frame table: the times ffmpeg decodes, the exact rate, and no file that ends early taken for a whole one."""

from __future__ import annotations

import re
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tasks.errors import FrameError, SourceError, SuperResolutionError, UnsupportedSourceError
from tasks.media.decode import decode_frames
from tasks.media.probe import probe
from tasks.media.timestamps import Fields, FrameTable, nearest_standard_rate, refuse_cut_off, scan_packets
from tests.media.clips import GOOD, RATES, Clips, rate_name, run_ffmpeg
from tests.media.witness import shown_frames


@pytest.mark.parametrize("name", GOOD)
def test_table_holds_exactly_the_times_that_ffmpeg_shows(clips: Clips, name: str) -> None:
    facts = probe(clips.path(name))
    scan = scan_packets(facts)
    table = scan.table
    refuse_cut_off(facts, scan)
    assert [int(pts) * table.time_base for pts in table.pts] == [frame.time for frame in shown_frames(clips.path(name))]
    assert np.all(np.diff(table.pts) > 0)
    assert set(table.keyframes) <= set(table.pts)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize("rate", RATES, ids=str)
def test_rate_of_the_table_is_the_exact_rational(clips: Clips, rate: Fraction, ending: str) -> None:
    assert scan_packets(probe(clips.path(rate_name(rate, ending)))).table.rate == rate


def test_pictures_before_an_edit_lists_start_are_not_counted(clips: Clips) -> None:
    facts = probe(clips.path("copy-cut.mp4"))
    assert len(scan_packets(facts).table) < facts.declared_frames


@pytest.mark.parametrize("name", ["variable-rate.mkv", "missing-frame.mkv"])
def test_a_rate_that_varies_is_known_and_every_time_kept(clips: Clips, name: str) -> None:
    table = scan_packets(probe(clips.path(name))).table
    assert not table.constant
    assert [pts * table.time_base for pts in table.pts.tolist()] == [f.time for f in shown_frames(clips.path(name))]
    seconds = (table.pts[-1] - table.pts[0]) * table.time_base
    assert abs(table.rate - (len(table) - 1) / seconds) < Fraction(1, 1000)


def test_frames_of_fields_are_shown_halfway_between_pictures() -> None:
    whole = FrameTable(np.array([0, 40, 90, 130]), np.array([0]), Fraction(1, 1000), Fraction(25))
    kept, doubled = whole.of_fields(Fields("tff")), whole.of_fields(Fields("tff", doubled=True))
    assert kept.pts.tolist() == whole.pts.tolist()
    assert doubled.time_base == Fraction(1, 2000)
    assert doubled.pts.tolist() == [0, 40, 80, 130, 180, 220, 260, 300]
    assert (doubled.rate, doubled.stream_pts.tolist()) == (50, whole.pts.tolist())


def test_two_frames_at_one_time_are_refused_by_number(clips: Clips) -> None:
    with pytest.raises(SourceError, match="frames 39 and 40 have the same timestamp"):
        scan_packets(probe(clips.path("twin-frames.mkv")))


def test_frames_without_timestamps_are_refused_with_the_way_out(clips: Clips) -> None:
    with pytest.raises(UnsupportedSourceError, match="have no timestamp") as refusal:
        scan_packets(probe(clips.path("untimed.h264")))
    assert "Matroska" in str(refusal.value)


def test_an_avi_with_dropped_frames_is_whole_and_its_head_is_not(clips: Clips) -> None:
    facts = probe(clips.path("dropped.avi"))
    scan = scan_packets(facts)
    assert (facts.declared_frames, len(scan.table)) == (80, 69)
    refuse_cut_off(facts, scan)
    shown = shown_frames(clips.path("dropped.avi"))
    assert [frame.time for frame in shown] == [int(pts) * scan.table.time_base for pts in scan.table.pts]
    cut = probe(clips.path("cut-dropped.avi"))
    with pytest.raises(FrameError, match="is cut off"):
        refuse_cut_off(cut, scan_packets(cut))


@pytest.mark.parametrize("name", ["untimed.h264", "before-zero.mkv"])
def test_the_way_out_of_missing_timestamps_gives_every_frame_one(clips: Clips, tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedSourceError) as refusal:
        scan_packets(probe(clips.path(name)))
    command = re.findall(r"\(ffmpeg (.*)\)", str(refusal.value))[0].split()
    timed = tmp_path / "timed.mkv"
    run_ffmpeg(*({"in": clips.path(name), "out.mkv": timed}.get(word, word) for word in command))
    table = scan_packets(probe(timed)).table
    assert len(table) == 80
    steps = np.diff(table.pts) * table.time_base
    # The three pictures before zero get times that are guessed; all others keep theirs.
    assert all(steps[3 if name == "before-zero.mkv" else 0 :] == Fraction(1, 25))
    assert [frame.md5 for frame in shown_frames(timed)] == [frame.md5 for frame in shown_frames(clips.path(name))]


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv"])
def test_a_file_cut_in_the_middle_is_refused_with_the_first_missing_frame(clips: Clips, name: str) -> None:
    facts = probe(clips.path(name))
    scan = scan_packets(facts)
    with pytest.raises(FrameError, match=f"{name} is cut off") as refusal:
        refuse_cut_off(facts, scan)
    assert refusal.value.frame == scan.cut_off_at
    assert 0 < scan.cut_off_at < 80


def _refuse_or_decode_all(path: Path) -> None:
    facts = probe(path)
    scan = scan_packets(facts)
    refuse_cut_off(facts, scan)
    list(decode_frames(facts, scan.table, 0, len(scan.table) - 1))


@pytest.mark.parametrize("share", [0.31, 0.6, 0.87, 0.97])
@pytest.mark.parametrize("name", ["faststart.mp4", "rate-25-1.mkv"])
def test_wherever_a_file_is_cut_it_does_not_pass_for_whole(
    clips: Clips, tmp_path: Path, name: str, share: float
) -> None:
    content = clips.path(name).read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(SuperResolutionError):
        _refuse_or_decode_all(path)


@pytest.mark.parametrize("share", [0.31, 0.6, 0.87, 0.97])
def test_a_transport_stream_cut_inside_a_packet_does_not_pass_for_whole(
    clips: Clips, tmp_path: Path, share: float
) -> None:
    content = clips.path("plain.ts").read_bytes()
    path = tmp_path / "plain.ts"
    path.write_bytes(content[: int(len(content) * share) // 188 * 188 + 100])
    with pytest.raises(SuperResolutionError):
        _refuse_or_decode_all(path)


def test_digest_names_the_content_not_the_file(clips: Clips, tmp_path: Path) -> None:
    original = clips.path("rate-25-1.mp4")
    copy, silent = tmp_path / "copy.mp4", tmp_path / "silent.mp4"
    shutil.copy(original, copy)
    run_ffmpeg("-i", original, "-an", "-c", "copy", silent)
    digests = [scan_packets(probe(path)).digest for path in (original, copy, silent, clips.path("rate-24-1.mp4"))]
    assert digests[0] == digests[1] == digests[2] != digests[3]


def test_nearest_standard_rate_tells_film_from_its_television_version() -> None:
    assert nearest_standard_rate(Fraction(23976, 1000)) == Fraction(24000, 1001)
    assert nearest_standard_rate(Fraction(24001, 1000)) == 24
    assert nearest_standard_rate(Fraction(5994, 100)) == Fraction(60000, 1001)
    assert nearest_standard_rate(Fraction(47, 2)) is None


def test_duration_covers_the_last_frame(clips: Clips) -> None:
    table = scan_packets(probe(clips.path("rate-24000-1001.mp4"))).table
    assert table.duration == len(table) * Fraction(1001, 24000)
