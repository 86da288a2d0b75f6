"""Progress of a job, as its files tell it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.chunks import Chunk
from tasks.plan import Plan, make_plan
from tasks.progress import ProgressMeter
from tasks.request import UpscaleRequest, check_request
from tests.media.clips import Clips, clips

__all__ = ["clips"]


@pytest.fixture
def plan(clips: Clips, tmp_path: Path) -> Plan:
    request = UpscaleRequest(
        str(clips.path("rate-25-1.mp4")), str(tmp_path / "out.mp4"), scale=2, chunk_seconds=1.0,
        scratch=str(tmp_path / "scratch"),
    )  # fmt: skip
    plan = make_plan(check_request(request), "0" * 64)
    plan.folder.mkdir(parents=True)
    assert len(plan.chunks) >= 3
    return plan


def write_partial(plan: Plan, chunk: Chunk, frames: float, attempt: str) -> None:
    path = plan.upscaled(chunk)
    path.with_name(f"{path.name}.partial-{attempt}").write_bytes(bytes(int(frames * plan.target.frame_bytes)))


def test_counts_frames_of_all_stages(plan: Plan) -> None:
    meter = ProgressMeter(plan)
    first, second, third = plan.chunks[:3]
    assert (meter.look().frames_done, meter.look().frames_total) == (0, plan.frames)
    plan.extracted(first).touch()
    assert meter.look().frames_done == 0
    write_partial(plan, first, 2.5, "a")
    assert meter.look().frames_done == 2
    plan.upscaled(second).touch()
    plan.encoded(third).touch()
    progress = meter.look("assembling")
    assert progress.frames_done == 2 + second.frames + third.frames
    assert (progress.chunks_encoded, progress.chunks_total, progress.phase) == (1, len(plan.chunks), "assembling")


def test_the_longer_file_counts_where_a_lost_worker_left_one(plan: Plan) -> None:
    for frames, attempt in ((3, "lost"), (5, "running"), (1, "other")):
        write_partial(plan, plan.chunks[0], frames, attempt)
    assert ProgressMeter(plan).look().frames_done == 5


def test_an_encoded_chunk_stays_encoded(plan: Plan) -> None:
    meter = ProgressMeter(plan)
    encoded = plan.encoded(plan.chunks[0])
    encoded.touch()
    assert meter.look().chunks_encoded == 1
    encoded.unlink()  # Assembled.
    assert (meter.look().chunks_encoded, meter.look().frames_done) == (1, plan.chunks[0].frames)


def test_no_speed_before_something_was_measured(plan: Plan) -> None:
    plan.encoded(plan.chunks[0]).touch()  # Of an earlier run.
    meter = ProgressMeter(plan)
    assert (meter.look().frames_per_second, meter.look().eta_seconds) == (None, None)
    for frames in (1, 2):
        write_partial(plan, plan.chunks[1], frames, "a")
        progress = meter.look()
    assert progress.frames_per_second is not None and progress.frames_per_second > 0
    left = plan.frames - plan.chunks[0].frames - 2
    assert progress.eta_seconds == pytest.approx(left / progress.frames_per_second)
