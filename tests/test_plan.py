"""Plans: chunks cover every frame once, the same command finds its job again, and one process owns a job."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tasks.chunks import chunk_limit, lay_out
from tasks.cores import assumed_flops
from tasks.destinations import LocalFile, Output
from tasks.errors import FrameError, ScratchError, SourceError, UnsupportedSourceError
from tasks.media.encoders import file_digest
from tasks.plan import Plan, load_plan, make_plan, save_plan
from tasks.receipt import find_published, published, write_receipt
from tasks.request import UpscaleRequest, check_request
from tasks.scratch import own_job
from tests.media.clips import Clips, clips, run_ffmpeg

__all__ = ["clips"]

MODEL_HASH = "0" * 64


def _plan(source: Path, folder: Path, *, model_hash: str = MODEL_HASH, **settings: object) -> Plan:
    request = UpscaleRequest(str(source), str(folder / "film.mp4"), scratch=str(folder / "scratch"))
    return make_plan(check_request(replace(request, **settings)), model_hash)  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk_seconds", [None, 0.1, 1.0, 3.0, 1e6])
@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(25), Fraction(60000, 1001), Fraction(1, 3)])
def test_chunks_cover_every_frame_once_in_whole_groups(rate: Fraction, chunk_seconds: float | None) -> None:
    group = max(1, round(rate))
    limit = chunk_limit(
        rate=rate, group=group, frame_flop=1e9, target_frame_bytes=3_000_000, chunk_seconds=chunk_seconds, flops=1e11
    )
    assert limit >= group
    assert limit % group == 0
    for frames in (1, 2, group - 1 or 1, group, group + 1, 5 * group, 1000, 4321):
        chunks = lay_out(frames, limit, group, chunk_seconds)
        assert chunks[0].first == 0
        assert chunks[-1].last == frames - 1
        assert all(after.first == before.last + 1 for before, after in itertools.pairwise(chunks))
        assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
        assert all(chunk.first % group == 0 for chunk in chunks)
        assert max(chunk.frames for chunk in chunks) <= limit


def test_chunks_are_as_long_as_was_asked_for() -> None:
    asked = {"rate": Fraction(25), "group": 25, "frame_flop": 1e9, "target_frame_bytes": 3_000_000, "flops": 1e11}
    assert chunk_limit(**asked, chunk_seconds=3.0) == 75
    assert chunk_limit(**asked, chunk_seconds=0.01) == 25


def test_a_chunk_stays_below_its_bounds_in_bytes_and_seconds() -> None:
    rate = Fraction(25)
    eight_k = 7680 * 4320 * 3 // 2
    asked = {"rate": rate, "group": 25, "chunk_seconds": None, "flops": 1e11}
    heavy = chunk_limit(**asked, frame_flop=1.0, target_frame_bytes=eight_k)
    assert heavy * eight_k <= 4 << 30
    light = chunk_limit(**asked, frame_flop=1.0, target_frame_bytes=1)
    assert light <= 60 * rate
    slow = chunk_limit(**asked, frame_flop=1e15, target_frame_bytes=1)
    assert slow == 25


def test_a_chunk_is_about_as_much_work_on_every_device() -> None:
    asked = {"rate": Fraction(25), "group": 25, "frame_flop": 1e12, "target_frame_bytes": 1, "chunk_seconds": None}
    on_cores, on_gpu = (chunk_limit(**asked, flops=assumed_flops(4, on_gpu=on_gpu)) for on_gpu in (False, True))
    assert on_cores == 25  # More than a minute's work would be a smaller chunk than the encoder's unit.
    assert on_gpu == 1500


def test_a_short_clip_is_cut_so_that_stages_overlap_and_a_film_into_hundreds_at_most() -> None:
    assert 3 <= len(lay_out(240, 1500, 24, None)) <= 5
    assert len(lay_out(2 * 3600 * 24, 1440, 24, None)) == 120


def test_plan_has_every_frame_of_the_source(clips: Clips, tmp_path: Path) -> None:
    plan = _plan(clips.path("rate-25-1.mp4"), tmp_path, chunk_seconds=1)
    assert plan.frames == 80
    assert [(chunk.first, chunk.last) for chunk in plan.chunks] == [(0, 24), (25, 49), (50, 74), (75, 79)]
    assert plan.folder == tmp_path / "scratch" / plan.key
    assert not plan.folder.exists(), "a plan alone writes nothing"


def test_a_saved_plan_is_read_back_as_it_was(clips: Clips, tmp_path: Path) -> None:
    for name in ("rich.mkv", "offset.ts", "wide-pixels.mp4"):
        plan = _plan(clips.path(name), tmp_path, chunk_seconds=1)
        with own_job(plan.folder):
            path = save_plan(plan)
            read = load_plan(path)
        assert np.array_equal(read.table.pts, plan.table.pts)
        assert np.array_equal(read.table.keyframes, plan.table.keyframes)
        assert (read.table.rate, read.table.time_base) == (plan.table.rate, plan.table.time_base)
        assert replace(read, table=plan.table) == plan
        for chunk in plan.chunks:
            for stage in ("extracted", "upscaled", "encoded"):
                assert getattr(read, stage)(chunk) == getattr(plan, stage)(chunk)
        assert read.result == plan.result


def test_reading_a_plan_parses_no_python(clips: Clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tasks of several threads read plans at the same time, and Python 3.11 may then fail to parse (gh-106905).
    def refuse(*_: object, **__: object) -> None:
        raise SystemError("AST constructor recursion depth mismatch")

    plan = _plan(clips.path("rate-25-1.mp4"), tmp_path, chunk_seconds=1)
    with own_job(plan.folder), monkeypatch.context() as patch:  # For nothing that pytest does with a failure.
        patch.setattr(ast, "parse", refuse)
        assert load_plan(save_plan(plan)).frames == 80


def test_the_name_of_a_saved_plan_says_what_is_in_it(clips: Clips, tmp_path: Path) -> None:
    plan = _plan(clips.path("rate-25-1.mp4"), tmp_path, chunk_seconds=1)
    other = _plan(clips.path("rate-25-1.mp4"), tmp_path, chunk_seconds=2)
    assert plan.folder == other.folder
    with own_job(plan.folder):
        assert save_plan(plan) == save_plan(plan) != save_plan(other)
        assert not list(plan.folder.glob("*.partial*"))


def test_the_same_command_finds_the_same_job(clips: Clips, tmp_path: Path) -> None:
    source = clips.path("rate-25-1.mp4")
    again, elsewhere = tmp_path / "again.mp4", tmp_path / "elsewhere"
    again.write_bytes(source.read_bytes())
    elsewhere.mkdir()
    job = _plan(source, tmp_path).key
    assert _plan(source, tmp_path).key == job
    assert _plan(again, tmp_path).key == job, "the content counts, not the name"
    assert _plan(source, elsewhere).key == job
    assert _plan(source, tmp_path, chunk_seconds=1).key == job, "chunks of another length are other files"
    assert _plan(source, tmp_path, fresh=True).key == job


def test_whatever_changes_the_result_changes_the_job(clips: Clips, tmp_path: Path) -> None:
    source = clips.path("rate-25-1.mp4")
    jobs = [
        _plan(source, tmp_path).key,
        _plan(source, tmp_path, scale=4).key,
        _plan(source, tmp_path, height=108).key,
        _plan(source, tmp_path, encoder="h265").key,
        _plan(source, tmp_path, precision="int8").key,
        _plan(source, tmp_path, tolerance=1).key,
        _plan(source, tmp_path, destination=str(tmp_path / "film.mkv")).key,
        _plan(source, tmp_path, model_hash="1" * 64).key,
        _plan(clips.path("rate-24-1.mp4"), tmp_path).key,
    ]
    assert len(set(jobs)) == len(jobs)


def test_other_sound_with_the_same_picture_never_uses_the_plan_of_the_first(clips: Clips, tmp_path: Path) -> None:
    source, dubbed = clips.path("rate-25-1.mp4"), tmp_path / "dubbed.mp4"
    run_ffmpeg("-i", source, "-f", "lavfi", "-i", "sine=f=900:d=3", "-map", "0:v", "-map", "1:a", "-c:v", "copy",
               "-c:a", "aac", dubbed)  # fmt: skip
    saved = []
    for plan in (_plan(source, tmp_path), _plan(dubbed, tmp_path)):
        with own_job(plan.folder):
            saved.append(save_plan(plan))
    assert saved[0] != saved[1]
    assert load_plan(saved[1]).facts.path == str(dubbed)


def test_chunk_files_of_different_lengths_have_different_names(clips: Clips, tmp_path: Path) -> None:
    source = clips.path("rate-25-1.mp4")
    one, two = (_plan(source, tmp_path, chunk_seconds=seconds) for seconds in (1, 2))
    names = [{plan.encoded(chunk).name for chunk in plan.chunks} for plan in (one, two)]
    assert not names[0] & names[1]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cut.mp4", FrameError),
        ("cut.mkv", FrameError),
        ("untimed.h264", UnsupportedSourceError),
        ("twin-frames.mkv", SourceError),
    ],
)
def test_sources_with_wrong_times_are_refused_while_planning(
    clips: Clips, tmp_path: Path, name: str, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=name):
        _plan(clips.path(name), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_salvage_plans_what_decodes_and_counts_what_is_lost(clips: Clips, tmp_path: Path) -> None:
    plan = _plan(clips.path("cut.mp4"), tmp_path, salvage=True)
    assert plan.frames + plan.damaged_frames == 80
    assert 40 <= plan.frames <= 50


def test_salvage_of_a_whole_file_loses_nothing(clips: Clips, tmp_path: Path) -> None:
    plan = _plan(clips.path("rate-25-1.mp4"), tmp_path, salvage=True)
    assert (plan.frames, plan.damaged_frames) == (80, 0)
    assert plan.key == _plan(clips.path("rate-25-1.mp4"), tmp_path).key


_HOLD = """
import sys, time
from pathlib import Path
from tasks.scratch import own_job
with own_job(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_told_who_holds_the_job(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        (folder / "sample.yuv.partial-1").touch()
        with pytest.raises(ScratchError, match=f"already running .process {holder.pid}"), own_job(folder):
            pass
        assert (folder / "sample.yuv.partial-1").exists(), "nothing of a running job is touched"
    finally:
        holder.kill()
        holder.wait()
    with own_job(folder):
        assert not (folder / "sample.yuv.partial-1").exists(), "a dead process holds nothing"


def test_unfinished_files_are_removed_and_finished_ones_kept(tmp_path: Path) -> None:
    folder, chunk, key = tmp_path / "job", "0000000-0000023", "0123456789ab"
    finished = {f"encode-{chunk}-{key}.mkv", f"encode-{chunk}-{key}.mkv.json", f"plan-{key}.json"}
    with own_job(folder):
        for name in (*finished, f"upscale-{chunk}-{key}.yuv.partial-12", f"plan-{key}.partial"):
            (folder / name).touch()
        (folder / f"encode-{chunk}-{key}.mkv.partial-34").mkdir()
        (folder / f"encode-{chunk}-{key}.mkv.partial-34" / "00.mkv").touch()
    with own_job(folder):
        assert {path.name for path in folder.iterdir()} == {"lock", *finished}
    with own_job(folder, fresh=True):
        assert {path.name for path in folder.iterdir()} == {"lock"}


@pytest.mark.parametrize("place", ["/proc/job", "/dev/null/job"])
def test_scratch_that_cannot_hold_a_job_is_refused(place: str) -> None:
    with pytest.raises(ScratchError, match="cannot use scratch folder"), own_job(Path(place)):
        pass


def test_a_receipt_names_only_the_very_file_that_was_published(tmp_path: Path) -> None:
    result, job = tmp_path / "film.mp4", tmp_path / "scratch" / "job"
    destination = LocalFile(result)
    job.mkdir(parents=True)
    result.write_bytes(b"result")
    assert not published(job, destination)
    write_receipt(job, destination, file_digest(result))
    assert published(job, destination) == Output(str(result), file_digest(result), 6)
    assert find_published(tmp_path / "scratch", destination)
    assert not published(job, LocalFile(tmp_path / "other.mp4"))
    result.write_bytes(b"changed")
    assert not published(job, destination)
    result.unlink()
    assert not published(job, destination)
    for content in ("", "{}", "[]", "{"):
        (job / "receipt.json").write_text(content)
        assert not published(job, destination)
        assert not find_published(tmp_path / "scratch", destination)
