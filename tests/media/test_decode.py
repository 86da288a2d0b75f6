"""Decoding by chunks: the frames of one whole decode, whatever the chunk length, or an error that names the frame."""

from __future__ import annotations

import hashlib
from pathlib import Path

import av
import numpy as np
import pytest

from tasks.errors import FrameError, UnsupportedSourceError
from tasks.media.decode import _start, decodable_times, decode_frames
from tasks.media.encoders import group_frames
from tasks.media.keyframes import packets_from, resets_decoder
from tasks.media.probe import SourceFacts, probe
from tasks.media.timestamps import FrameTable, scan_packets
from tests.media.clips import GOOD, Clips, run_ffmpeg
from tests.media.witness import shown_frames


def _decoded(facts: SourceFacts, table: FrameTable, first: int, last: int) -> list[str]:
    return [hashlib.md5(frame.tobytes()).hexdigest() for frame in decode_frames(facts, table, first, last, threads=2)]


@pytest.mark.parametrize("name", GOOD)
def test_frames_equal_one_whole_decode_at_every_chunk_length(clips: Clips, name: str) -> None:
    facts = probe(clips.path(name))
    table = scan_packets(facts).table
    wanted = [frame.md5 for frame in shown_frames(clips.path(name), f"0:{facts.video_index}")]
    for length in (37, group_frames(table.rate), len(table)):
        chunks = [(first, min(first + length, len(table)) - 1) for first in range(0, len(table), length)]
        found = [digest for first, last in chunks for digest in _decoded(facts, table, first, last)]
        assert found == wanted, f"chunks of {length} frames"


@pytest.mark.parametrize(
    ("name", "groups_before"),
    [
        *((name, 0) for name in ("rate-25-1.mp4", "plain.ts", "closed-gop-hevc.mp4", "vp9.webm")),
        *((name, 1) for name in ("open-gop-h264.mkv", "open-gop-hevc.mkv", "intra-refresh.mkv", "mpeg2.ts")),
    ],
)
def test_decoding_starts_at_the_last_keyframe_if_that_resets_the_decoder(
    clips: Clips, name: str, groups_before: int
) -> None:
    facts = probe(clips.path(name))
    table = scan_packets(facts).table
    numbers = np.searchsorted(table.pts, table.keyframes).tolist()
    assert len(numbers) >= 3
    starts = [None, *table.keyframes[1:].tolist()]
    for group, number in enumerate(numbers):
        wanted = starts[max(0, group - groups_before)]
        assert _start(facts, table, number) == _start(facts, table, number + 5) == wanted


@pytest.mark.parametrize("name", GOOD)
def test_every_keyframe_is_found_without_reading_from_the_start(clips: Clips, name: str) -> None:
    facts = probe(clips.path(name))
    table = scan_packets(facts).table
    for start in table.keyframes[1:].tolist():
        with av.open(str(facts.path)) as container:
            packet = next(packets_from(container, facts.video_index, table, start))
            assert packet.pts == start
            assert packet.is_keyframe


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("name", ["closed-gop-hevc.mp4", "rate-25-1.mp4"])
def test_units_are_found_however_a_container_marks_them(
    clips: Clips, tmp_path: Path, name: str, container: str
) -> None:
    path = tmp_path / f"copy.{container}"
    run_ffmpeg("-i", clips.path(name), "-c", "copy", path)
    with av.open(str(path)) as source:
        packets = [packet for packet in source.demux(video=0) if packet.size]
        assert [resets_decoder(packet) for packet in packets] == [packet.is_keyframe for packet in packets]


@pytest.mark.parametrize(
    "name",
    [
        *("open-gop-h264.mkv", "open-gop-hevc.mkv", "intra-refresh.mkv", "mpeg2.ts"),
        *("rate-25-1.mp4", "plain.ts", "closed-gop-hevc.mp4"),
    ],
)
def test_any_single_frame_can_be_decoded_alone(clips: Clips, name: str) -> None:
    facts = probe(clips.path(name))
    table = scan_packets(facts).table
    wanted = [frame.md5 for frame in shown_frames(clips.path(name))]
    for number in (0, 23, 24, 25, 47, 48, 71, 79):
        assert _decoded(facts, table, number, number) == [wanted[number]], f"frame {number}"


def _damage(source: Path, target: Path, number: int) -> tuple[int, int]:
    """Overwrite most of one video packet, its headers included.

    Bits flipped further inside would do for FFV1, which has checksums. H.264 has none: its arithmetic decoder makes
    some other picture of such bits without noticing.

    Returns:
        The frame (in presentation order) whose packet it is, and its group's last frame.
    """
    with av.open(str(source)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        order = sorted(packet.pts for packet in packets)
        victim = packets[number]
        keys = [packet.pts for packet in packets if packet.is_keyframe and packet.pts > victim.pts]
        end = order.index(min(keys)) - 1 if keys else len(order) - 1
        content = bytearray(source.read_bytes())
        at = content.index(bytes(victim))
        for offset in range(at, at + 3 * victim.size // 4):
            content[offset] ^= 0xA5
        target.write_bytes(content)
        return order.index(victim.pts), end


@pytest.mark.xfail(reason="libavcodec conceals a slice of FFV1 whose checksum fails and only logs it", strict=True)
def test_one_flipped_byte_is_noticed_where_the_codec_has_checksums(clips: Clips, tmp_path: Path) -> None:
    source, path = clips.path("lossless.mkv"), tmp_path / "flipped.mkv"
    with av.open(str(source)) as container:
        victim = [bytes(packet) for packet in container.demux(video=0) if packet.size][30]
    content = bytearray(source.read_bytes())
    content[content.index(victim) + len(victim) // 2] ^= 1
    path.write_bytes(content)
    facts = probe(path)
    with pytest.raises(FrameError) as failure:
        _decoded(facts, scan_packets(facts).table, 0, 79)
    assert failure.value.frame == 30


@pytest.mark.parametrize("name", ["rate-25-1.mp4", "lossless.mkv", "intra-only.mov", "open-gop-h264.mkv"])
@pytest.mark.parametrize("number", [30, 41])
def test_a_damaged_packet_is_an_error_that_names_the_frame(
    clips: Clips, tmp_path: Path, name: str, number: int
) -> None:
    path = tmp_path / name
    victim, group_end = _damage(clips.path(name), path, number)
    facts = probe(path)
    table = scan_packets(facts).table
    with pytest.raises(FrameError, match="cannot be decoded") as failure:
        _decoded(facts, table, 0, len(table) - 1)
    # A picture that refers to the damaged one, shown before it, may be the first that is missing.
    assert failure.value.frame is not None
    assert victim - 4 <= failure.value.frame <= group_end
    assert str(failure.value.frame) in str(failure.value)
    assert "--salvage" in str(failure.value)


def test_salvage_loses_no_more_than_the_damaged_group(clips: Clips, tmp_path: Path) -> None:
    path = tmp_path / "damaged.mp4"
    victim, group_end = _damage(clips.path("rate-25-1.mp4"), path, 30)
    facts = probe(path)
    whole = scan_packets(facts).table
    kept = set(decodable_times(facts, whole).tolist())
    lost = [number for number, pts in enumerate(whole.pts.tolist()) if pts not in kept]
    assert lost
    assert victim - 4 <= min(lost)
    assert max(lost) <= group_end


def test_salvage_never_keeps_a_picture_that_refers_to_a_lost_one(clips: Clips, tmp_path: Path) -> None:
    original, path = clips.path("rate-25-1.mp4"), tmp_path / "damaged.mp4"
    _damage(original, path, 30)
    facts = probe(path)
    whole = scan_packets(facts).table
    kept = decodable_times(facts, whole)
    shown = {frame.time: frame.md5 for frame in shown_frames(original)}
    table = FrameTable(kept, whole.keyframes, whole.time_base, whole.rate)
    assert _decoded(facts, table, 0, len(table) - 1) == [shown[int(pts) * table.time_base] for pts in kept]


@pytest.mark.parametrize("name", ["lossless.mkv", "intra-only.mov"])
def test_chunks_beside_the_damage_are_not_concerned(clips: Clips, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    _damage(clips.path(name), path, 30)
    facts = probe(path)
    table = scan_packets(facts).table
    wanted = [frame.md5 for frame in shown_frames(clips.path(name))]
    assert _decoded(facts, table, 0, 25) == wanted[:26]
    assert _decoded(facts, table, 50, 79) == wanted[50:]


@pytest.mark.parametrize("name", ["lossless.mkv", "intra-only.mov"])
def test_salvage_keeps_all_but_the_damaged_frame_at_their_own_times(clips: Clips, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    victim, _ = _damage(clips.path(name), path, 30)
    facts = probe(path)
    whole = scan_packets(facts).table
    kept = decodable_times(facts, whole)
    assert kept.tolist() == [pts for number, pts in enumerate(whole.pts.tolist()) if number != victim]
    table = FrameTable(kept, whole.keyframes, whole.time_base, whole.rate)
    wanted = [frame.md5 for number, frame in enumerate(shown_frames(clips.path(name))) if number != victim]
    for length in (25, len(table)):
        chunks = [(first, min(first + length, len(table)) - 1) for first in range(0, len(table), length)]
        assert [digest for chunk in chunks for digest in _decoded(facts, table, *chunk)] == wanted


def test_salvage_of_a_cut_file_keeps_what_is_there(clips: Clips) -> None:
    facts = probe(clips.path("cut.mp4"))
    scan = scan_packets(facts)
    kept = decodable_times(facts, scan.table)
    assert 40 <= len(kept) <= len(scan.table)
    assert np.isin(kept, scan.table.pts).all()
    original = {frame.time: frame.md5 for frame in shown_frames(clips.path("faststart.mp4"))}
    table = FrameTable(kept, scan.table.keyframes, scan.table.time_base, scan.table.rate)
    found = _decoded(facts, table, 0, len(table) - 1)
    assert found == [original[int(pts) * table.time_base] for pts in kept]


def test_a_stream_that_changes_its_size_is_refused_at_the_frame(clips: Clips, tmp_path: Path) -> None:
    small, listing, joined = tmp_path / "small.ts", tmp_path / "list.txt", tmp_path / "joined.ts"
    run_ffmpeg("-i", clips.path("plain.ts"), "-an", "-vf", "scale=96:64", "-c:v", "libx264", "-threads", "1", small)
    listing.write_text(f"file '{clips.path('plain.ts')}'\nfile '{small}'\n")
    run_ffmpeg("-f", "concat", "-safe", "0", "-i", listing, "-map", "0:v", "-c", "copy", joined)
    facts = probe(joined)
    table = scan_packets(facts).table
    with pytest.raises((UnsupportedSourceError, FrameError)) as refusal:
        _decoded(facts, table, 0, len(table) - 1)
    assert "80" in str(refusal.value)
