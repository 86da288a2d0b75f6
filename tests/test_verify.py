"""Verification notices every difference, and publishing gives the whole result or leaves things as they were."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from tasks import receipt
from tasks.assemble import assemble_result
from tasks.destinations import Output
from tasks.encode import encode_upscaled
from tasks.errors import DestinationError, SettingsError, VerificationError
from tasks.extract import extract_chunk
from tasks.media.chunk_file import ChunkReader, ChunkWriter
from tasks.media.encoders import file_digest
from tasks.media.mux import MuxReport
from tasks.models.weights import content_hash
from tasks.plan import Plan, load_plan, make_plan, save_plan
from tasks.publish import publish_result
from tasks.request import UpscaleRequest, check_request
from tasks.scratch import own_job
from tasks.upscale import upscale_chunk
from tasks.verify import verify_result
from tests.media.clips import Clips, clips, run_ffmpeg
from tests.media.jobs import encode_frames
from tests.media.witness import decoding_complaints, shown_frames

__all__ = ["clips"]


def _assembled(source: Path, folder: Path, ending: str, **settings: object) -> tuple[Plan, MuxReport]:
    """A job whose chunks are encoded (each pixel four times) and joined."""
    folder.mkdir(parents=True)
    request = UpscaleRequest(str(source), str(folder / f"film.{ending}"), scratch=str(folder / "scratch"))
    plan = make_plan(check_request(replace(request, **{"chunk_seconds": 2.0, **settings})), "0" * 64)  # type: ignore[arg-type]
    with own_job(plan.folder):
        for chunk in plan.chunks:
            path = plan.encoded(chunk)
            encode_frames(plan.facts, plan.table, chunk.first, chunk.last, path, plan.target, plan.profile.name)
    return plan, assemble_result(plan)


@pytest.fixture(scope="module", params=["mp4", "mkv"])
def assembled(
    request: pytest.FixtureRequest, clips: Clips, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, MuxReport]:
    folder = tmp_path_factory.mktemp("verify") / request.param
    return _assembled(clips.path("rate-24000-1001.mp4"), folder, request.param)


@pytest.fixture
def job(assembled: tuple[Plan, MuxReport]) -> Iterator[tuple[Plan, MuxReport]]:
    """A job whose result may be spoilt."""
    result = assembled[0].result
    content = result.read_bytes()
    yield assembled
    result.write_bytes(content)


def _rewrite(path: Path, change: Callable[[list[av.Packet]], list[av.Packet]]) -> None:
    """Copy all packets (in the file's order) through `change` into the same file."""
    spoilt = path.with_name(f"spoilt{path.suffix}")
    with av.open(str(path)) as source, av.open(str(spoilt), "w", options={"avoid_negative_ts": "disabled"}) as output:
        streams = {stream.index: output.add_stream_from_template(stream) for stream in source.streams}
        packets = [packet for packet in source.demux() if packet.size]
        for packet in change(packets):
            packet.stream = streams[packet.stream_index]
            output.mux(packet)
    spoilt.replace(path)


def _of(packets: list[av.Packet], index: int) -> list[av.Packet]:
    return [packet for packet in packets if packet.stream_index == index]


def test_a_faithful_result_passes(job: tuple[Plan, MuxReport]) -> None:
    plan, report = job
    verify_result(plan, report)
    assert len(shown_frames(plan.result)) == plan.frames == 77
    assert decoding_complaints(plan.result) == ""


@pytest.mark.parametrize("name", ["offset.ts", "copy-cut.mp4", "audio-offset.mp4", "rich.mkv", "rich.mp4", "vp9.webm"])
@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_faithful_results_of_difficult_sources_pass(clips: Clips, tmp_path: Path, name: str, ending: str) -> None:
    verify_result(*_assembled(clips.path(name), tmp_path / "job", ending))


@pytest.mark.parametrize("encoder", ["h264", "h265"])
def test_faithful_results_with_wide_pixels_pass(clips: Clips, tmp_path: Path, encoder: str) -> None:
    verify_result(*_assembled(clips.path("wide-pixels.mp4"), tmp_path / "job", "mkv", encoder=encoder))


def test_wide_pixels_are_refused_where_the_encoder_cannot_store_them(clips: Clips, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="ffv1 cannot store"):
        _assembled(clips.path("wide-pixels.mp4"), tmp_path / "job", "mkv", encoder="ffv1")


def _upscaled_and_spoilt(source: Path, folder: Path, spoil: Callable[[np.ndarray], np.ndarray]) -> None:
    """Do a job of two chunks, the second of which has what `spoil` makes of its upscaled frames, and verify it."""
    folder.mkdir()
    request = UpscaleRequest(str(source), str(folder / "film.mkv"), scratch=str(folder), chunk_seconds=1.0)
    checked = check_request(request)
    plan = make_plan(checked, content_hash(checked.card))
    with own_job(plan.folder):
        for chunk in plan.chunks:
            extract_chunk(plan, chunk)
            upscale_chunk(plan, chunk)
            if chunk.index == 1:
                (frames,) = ChunkReader(plan.upscaled(chunk)).batches(chunk.frames)
                with ChunkWriter(plan.upscaled(chunk), plan.target) as writer:
                    writer.write(spoil(frames))
            encode_upscaled(plan, chunk)
        verify_result(plan, assemble_result(plan))


def test_a_chunk_that_drifts_by_one_frame_is_named(clips: Clips, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"chunk 1 \(frames 25-49\) drifts"):
        _upscaled_and_spoilt(clips.path("one-object.mkv"), tmp_path / "job", lambda frames: np.roll(frames, 1, axis=0))


def test_a_frame_that_shows_something_else_is_named(clips: Clips, tmp_path: Path) -> None:
    def invert(frames: np.ndarray) -> np.ndarray:
        frames[7] = 255 - frames[7]
        return frames

    with pytest.raises(VerificationError, match=r"chunk 1 \(frames 25-49\): frame 32 is far from its source"):
        _upscaled_and_spoilt(clips.path("one-object.mkv"), tmp_path / "job", invert)


def test_frames_in_their_places_pass(clips: Clips, tmp_path: Path) -> None:
    _upscaled_and_spoilt(clips.path("one-object.mkv"), tmp_path / "job", lambda frames: frames)


def test_a_repeated_copy_alone_is_no_difference(job: tuple[Plan, MuxReport]) -> None:
    plan, report = job
    _rewrite(plan.result, lambda packets: packets)
    verify_result(plan, report)


def test_a_dropped_video_packet_is_noticed(job: tuple[Plan, MuxReport]) -> None:
    plan, report = job

    def drop(packets: list[av.Packet]) -> list[av.Packet]:
        victim = _of(packets, 0)[50]
        return [packet for packet in packets if packet is not victim]

    _rewrite(plan.result, drop)
    with pytest.raises(VerificationError, match="the result has 76 frames, the source 77"):
        verify_result(plan, report)


def test_a_frame_shown_at_another_time_is_noticed_by_number(job: tuple[Plan, MuxReport]) -> None:
    plan, report = job

    def shift(packets: list[av.Packet]) -> list[av.Packet]:
        video = _of(packets, 0)
        victim = sorted(video, key=lambda packet: packet.pts)[60]
        victim.pts += 2 if victim.time_base.denominator == 1000 else 100
        return packets

    _rewrite(plan.result, shift)
    with pytest.raises(VerificationError, match="frame 60 is shown at"):
        verify_result(plan, report)


def test_changed_video_content_is_noticed(job: tuple[Plan, MuxReport]) -> None:
    plan, report = job
    content = bytearray(plan.result.read_bytes())
    with av.open(str(plan.result)) as container:
        victim = [bytes(packet) for packet in container.demux(video=0) if packet.size][40]
    content[content.index(victim) + len(victim) // 2] ^= 1
    plan.result.write_bytes(content)
    with pytest.raises(VerificationError, match="video packets read back differ"):
        verify_result(plan, report)


def test_a_changed_audio_packet_is_noticed(job: tuple[Plan, MuxReport]) -> None:
    plan, report = job
    content = bytearray(plan.result.read_bytes())
    with av.open(str(plan.result)) as container:
        victim = [bytes(packet) for packet in container.demux(audio=0) if packet.size][40]
    content[content.index(victim) + len(victim) // 2] ^= 1
    plan.result.write_bytes(content)
    with pytest.raises(VerificationError, match="the packets of stream 1 differ"):
        verify_result(plan, report)


def test_a_lost_audio_packet_is_noticed(job: tuple[Plan, MuxReport]) -> None:
    plan, report = job

    def drop(packets: list[av.Packet]) -> list[av.Packet]:
        victim = _of(packets, 1)[40]
        return [packet for packet in packets if packet is not victim]

    _rewrite(plan.result, drop)
    with pytest.raises(VerificationError, match="stream 1 has"):
        verify_result(plan, report)


def test_shifted_sound_is_noticed(job: tuple[Plan, MuxReport]) -> None:
    plan, report = job

    def shift(packets: list[av.Packet]) -> list[av.Packet]:
        for packet in _of(packets, 1):
            late = round(0.3 / packet.time_base)
            packet.pts, packet.dts = packet.pts + late, packet.dts + late
        return packets

    _rewrite(plan.result, shift)
    with pytest.raises(VerificationError):
        verify_result(plan, report)


def test_a_lost_sound_stream_is_noticed(job: tuple[Plan, MuxReport]) -> None:
    plan, report = job
    silent = plan.result.with_name(f"silent{plan.result.suffix}")
    run_ffmpeg("-i", plan.result, "-an", "-c", "copy", "-copyts", silent)
    silent.replace(plan.result)
    with pytest.raises(VerificationError, match="stream 1 has 0 packets"):
        verify_result(plan, report)


@pytest.fixture(scope="module", params=["dvd-sound.vob", "wma.wmv"])
def sounding(
    request: pytest.FixtureRequest, clips: Clips, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, MuxReport]:
    """A job whose sound is kept as FLAC, and one whose sound the ffmpeg program copied."""
    return _assembled(clips.path(request.param), tmp_path_factory.mktemp("sounding") / "job", "mkv")


@pytest.fixture
def sounding_job(sounding: tuple[Plan, MuxReport]) -> Iterator[tuple[Plan, MuxReport]]:
    """Of `sounding`, its result free to be spoilt; the plan as a worker reads it."""
    content = sounding[0].result.read_bytes()
    yield load_plan(save_plan(sounding[0])), sounding[1]
    sounding[0].result.write_bytes(content)


def test_sound_by_other_ways_passes(sounding_job: tuple[Plan, MuxReport]) -> None:
    plan, report = sounding_job
    verify_result(plan, report)
    assert bool(plan.carried.kept) != bool(plan.carried.by_program)
    assert plan.carried.kept.keys() == report.kept.keys()
    assert list(plan.carried.notes()) == [note for note in plan.notes if "stream 1" in note]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (("-af", "volume=0.999"), "stream 1 (differ from|has)|of stream 1 (differ|has)"),
        (("-af", "atrim=end=0.9"), "stream 1 has"),
        (("-an",), "stream 1 has 0"),
    ],
    ids=["louder", "shorter", "lost"],
)
def test_spoilt_sound_by_other_ways_is_noticed(
    sounding_job: tuple[Plan, MuxReport], spoil: tuple[str, ...], said: str
) -> None:
    plan, report = sounding_job
    spoilt = plan.result.with_name("spoilt.mkv")
    sound = ("-c:a", "flac" if plan.carried.kept else "wmav2") if "-af" in spoil else ()
    run_ffmpeg("-i", plan.result, "-map", "0", "-copyts", "-c:v", "copy", *sound, *spoil, spoilt)
    spoilt.replace(plan.result)
    with pytest.raises(VerificationError, match=said):
        verify_result(plan, report)


def test_shifted_sound_by_other_ways_is_noticed(sounding_job: tuple[Plan, MuxReport]) -> None:
    plan, report = sounding_job
    late, spoilt = ("-itsoffset", "0.03", "-i", plan.result), plan.result.with_name("spoilt.mkv")
    run_ffmpeg("-i", plan.result, *late, "-map", "0:v", "-map", "1:a", "-copyts", "-c", "copy", spoilt)
    spoilt.replace(plan.result)
    with pytest.raises(VerificationError, match=r"stream 1 is shifted by 0\.03"):
        verify_result(plan, report)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-vf", "scale=192:108"), "the picture is 192x108"),
        (("-pix_fmt", "yuv444p"), "yuv444p"),
        (("-vf", "setparams=colorspace=smpte170m"), "tagged smpte170m"),
        (("-vf", "setparams=range=pc"), "full range True"),
        (("-vf", "setsar=4/3"), "sample aspect ratio is 4/3"),
    ],
)
def test_another_picture_format_is_noticed(job: tuple[Plan, MuxReport], options: tuple[str, ...], said: str) -> None:
    plan, report = job
    other = plan.result.with_name(f"other{plan.result.suffix}")
    run_ffmpeg("-i", plan.result, *options, "-c:v", "libx264", "-preset", "ultrafast", "-c:a", "copy", other)
    other.replace(plan.result)
    with pytest.raises(VerificationError, match=said):
        verify_result(plan, report)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_result_is_noticed(job: tuple[Plan, MuxReport], share: float) -> None:
    plan, report = job
    content = plan.result.read_bytes()
    plan.result.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(Exception) as failure:
        verify_result(plan, report)
    assert isinstance(failure.value, VerificationError), repr(failure.value)


def test_a_missing_or_damaged_chunk_is_named_before_anything_is_joined(clips: Clips, tmp_path: Path) -> None:
    plan, _ = _assembled(clips.path("rate-25-1.mp4"), tmp_path / "job", "mp4")
    plan.result.unlink()
    last = plan.encoded(plan.chunks[-1])
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(VerificationError, match=r"chunk 1 \(frames 50-79\) is missing or damaged"):
        assemble_result(plan)
    assert not plan.result.exists()


def _destination(plan: Plan) -> Path:
    return Path(plan.request.destination)


@pytest.fixture
def published(job: tuple[Plan, MuxReport]) -> Iterator[Plan]:
    """A job to publish; its destination is cleared afterwards."""
    yield job[0]
    _destination(job[0]).unlink(missing_ok=True)


def test_publishing_gives_the_very_file_without_copying_on_one_file_system(published: Plan) -> None:
    before = set(_destination(published).parent.iterdir())
    output = publish_result(published, {})
    assert output == Output(
        str(_destination(published)), file_digest(published.result), published.result.stat().st_size
    )
    assert _destination(published).samefile(published.result)
    assert set(_destination(published).parent.iterdir()) - before == {_destination(published)}
    assert receipt.published(published.folder, published.destination) == output
    assert publish_result(published, {}) == output, "a second worker, after the first was lost, finds it done"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a second file system")
def test_publishing_copies_to_another_file_system(published: Plan) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        if Path(folder).stat().st_dev == published.folder.stat().st_dev:
            pytest.skip("needs a second file system")
        destination = Path(folder) / _destination(published).name
        plan = replace(published, request=replace(published.request, destination=str(destination)))
        publish_result(plan, {})
        assert destination.read_bytes() == plan.result.read_bytes()
        assert list(Path(folder).iterdir()) == [destination]


def test_what_appeared_at_the_destination_meanwhile_is_kept(published: Plan) -> None:
    _destination(published).write_bytes(b"somebody's work")
    with pytest.raises(DestinationError, match="exists already"):
        publish_result(published, {})
    assert _destination(published).read_bytes() == b"somebody's work"


def test_an_old_file_is_replaced_only_when_asked(published: Plan) -> None:
    _destination(published).write_bytes(b"old")
    publish_result(replace(published, request=replace(published.request, overwrite=True)), {})
    assert _destination(published).samefile(published.result)


def test_the_old_file_survives_a_failure(published: Plan) -> None:
    _destination(published).write_bytes(b"old")
    plan = replace(published, request=replace(published.request, overwrite=True), folder=Path("/proc/nowhere"))
    with pytest.raises((DestinationError, FileNotFoundError)):
        publish_result(plan, {})
    assert _destination(published).read_bytes() == b"old"
    assert not list(_destination(published).parent.glob(".*.partial"))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to mount")
def test_a_full_destination_is_an_error_and_leaves_nothing(published: Plan, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount")
    try:
        destination = small / _destination(published).name
        plan = replace(published, request=replace(published.request, destination=str(destination)))
        with pytest.raises(DestinationError, match="No space left"):
            publish_result(plan, {})
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)
