"""Kill anything, any time: the same command again, or the same run by itself, ends with the same file.

Processes are killed at moments that chance chooses anew in every session: `CHAOS_SEED` repeats one. To hit a worker in
the middle of a stage it is stopped first, and killed once it is sure that the stage is still being written.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Final

import psutil
import pytest

from tasks.errors import LedgerError
from tests.flows.jobs import GROUP, PATIENCE, Finished, Place, Run, Scratch, make_film

pytestmark = pytest.mark.chaos

#: Chunks of a second each; the last one is short.
CHUNKS: Final = 9
FRAMES: Final = (CHUNKS - 1) * GROUP + 5

#: A slow encoder leaves time to hit it.
OPTIONS: Final = ("--chunk-seconds", "1", "--encoder", "h265")

#: Seconds after which nothing of a killed command may be left.
_GONE: Final = 20.0

#: Seconds within which an interrupted command ends.
_PROMPT: Final = 10.0

#: Stages that write chunk files, and the pool each runs on.
POOLS: Final = {"extract": "cpu", "upscale": "gpu", "encode": "cpu"}


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The film that all jobs here upscale."""
    return make_film(tmp_path_factory.mktemp("film") / "film.mp4", FRAMES, "160x90", sound=("aac", "ac3"))


@pytest.fixture(scope="module")
def undisturbed(film: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[bytes]:
    """What comes out when nothing happens."""
    place = Place(tmp_path_factory.mktemp("undisturbed"))
    finished = place.start(film, place.result("film.mp4"), *OPTIONS).wait()
    assert finished.code == 0, finished.stderr
    assert finished.record["chunks"] == CHUNKS
    yield place.result("film.mp4").read_bytes()
    place.clear_away()


def first_frame(name: str) -> int:
    """First frame of the chunk that a file in scratch belongs to."""
    match = re.match(r"[a-z]+-(\d+)-", name)
    assert match, name
    return int(match.group(1))


def is_at(scratch: Scratch, stage: str, chunk: int) -> bool:
    """Whether a stage is being written for a chunk from `chunk` on."""
    return any(first_frame(name) >= chunk * GROUP for name in scratch.being_written(stage))


def catch(run: Run, scratch: Scratch, stage: str, chunk: int = 0) -> psutil.Process:
    """Stop the worker that is in the middle of a stage of a chunk from `chunk` on.

    Returns:
        The worker, stopped: to be killed or resumed.
    """
    workers: list[psutil.Process] = []

    def caught() -> psutil.Process | None:
        nonlocal workers
        if not workers or not all(worker.is_running() for worker in workers):
            workers = run.workers(POOLS[stage])
        if not is_at(scratch, stage, chunk):
            return None
        for worker in workers:
            try:
                worker.suspend()
                if is_at(scratch, stage, chunk) and (len(workers) == 1 or _holds(worker, stage)):
                    return worker
                worker.resume()
            except psutil.NoSuchProcess:
                continue
        return None

    found = run.wait_until(caught, f"{stage} of chunk {chunk}")
    assert isinstance(found, psutil.Process)
    return found


def _holds(worker: psutil.Process, stage: str) -> bool:
    names = [Path(file.path).name for file in worker.open_files()]
    return any(name.startswith(f"{stage}-") and ".partial-" in name for name in names)


def kill_flow(run: Run, scratch: Scratch, stage: str, chunk: int) -> None:
    """Kill the command itself in the middle of a stage."""
    worker = catch(run, scratch, stage, chunk)
    run.kill()
    worker.resume()


def check_published(finished: Finished, destination: Path, undisturbed: bytes, reused: int) -> None:
    """Check that a run ended well, took over the finished chunks, and wrote what an undisturbed run writes."""
    assert finished.code == 0, finished.stderr
    assert finished.record["chunks_reused"] == reused
    assert finished.record["frames_out"] == FRAMES
    assert destination.read_bytes() == undisturbed
    assert list(destination.parent.iterdir()) == [destination]


def test_a_command_killed_in_any_stage_continues_where_it_was(
    film: Path, undisturbed: bytes, place: Place, chance: Random
) -> None:
    destination, scratch = place.result("film.mp4"), Scratch(place.scratch)
    moments = [
        ("extract", chance.randrange(0, 3)),
        ("upscale", chance.randrange(1, 3)),
        ("encode", chance.randrange(2, 4)),
        ("upscale", chance.randrange(4, 6)),
        ("encode", chance.randrange(5, 7)),
    ]
    for number, (stage, chunk) in enumerate(moments):
        run = place.start(film, destination, *OPTIONS)
        kill_flow(run, scratch, stage, chunk)
        assert not destination.exists()
        if number != 1:  # Once the next command meets what the killed one left running.
            run.wait_for_orphans(_GONE)
            assert not list(destination.parent.iterdir())
            scratch.check_kept()
    finished_before = scratch.finished()
    assert len(finished_before) >= 3
    run = place.start(film, destination, *OPTIONS)
    run.wait_until(lambda: scratch.check_kept() or is_at(scratch, "upscale", 0), "upscale")
    check_published(run.wait(), destination, undisturbed, len(finished_before))
    scratch.check_kept()
    for run in place.runs:
        run.wait_for_orphans(_GONE)
    assert list(place.scratch.iterdir()) == []


def test_a_command_killed_while_it_joins_checks_or_publishes_loses_no_chunk(
    film: Path, undisturbed: bytes, place: Place, chance: Random
) -> None:
    destination, scratch = place.result("film.mp4"), Scratch(place.scratch)
    for phase in ("assembling", "verifying", "publishing"):
        # The one before may have been killed so late that it had published; this one shall have something to join.
        destination.unlink(missing_ok=True)
        run = place.start(film, destination, *OPTIONS)
        run.wait_until(lambda run=run, phase=phase: f"\n{phase} " in run.said, phase)  # type: ignore[misc]
        time.sleep(chance.uniform(0.0, 0.1))
        run.kill()
        run.wait_for_orphans(_GONE)
        # Whole or not at all.
        if destination.exists():
            assert destination.read_bytes() == undisturbed
        else:  # Chunks are cleared away only after publication.
            assert len(scratch.finished()) == CHUNKS
        scratch.check_kept()
    check_published(place.start(film, destination, *OPTIONS).wait(), destination, undisturbed, CHUNKS)
    assert list(place.scratch.iterdir()) == []


def test_a_command_killed_after_publication_finds_its_work_done(
    film: Path, undisturbed: bytes, place: Place, chance: Random
) -> None:
    destination = place.result("film.mp4")
    run = place.start(film, destination, *OPTIONS)
    run.wait_until(lambda: "\ndone " in run.said, "done")
    time.sleep(chance.uniform(0.0, 0.3))
    run.kill()
    run.wait_for_orphans(_GONE)
    assert destination.read_bytes() == undisturbed
    finished = place.start(film, destination, *OPTIONS).wait()
    # The record says so, unless the command died before it was written; then the receipt does.
    assert finished.record.get("skipped") or finished.record["chunks_reused"] == CHUNKS
    check_published(finished, destination, undisturbed, finished.record["chunks_reused"])
    assert list(place.scratch.iterdir()) == []


def test_a_run_survives_the_death_of_its_workers(film: Path, undisturbed: bytes, place: Place, chance: Random) -> None:
    destination, scratch = place.result("film.mp4"), Scratch(place.scratch)
    # First all of inference: while encoding is held up, it may get to the end of the film.
    later = [(stage, chunk) for stage in ("upscale", "encode") for chunk in sorted(chance.sample(range(7), 3))]
    moments = [("extract", 0), ("extract", 0), ("extract", 1), *later]
    run = place.start(film, destination, *OPTIONS)
    for stage, chunk in moments:
        scratch.check_kept()
        worker = catch(run, scratch, stage, chunk)
        worker.kill()
        worker.wait(PATIENCE)
        scratch.abandon(*(name for name, pool in POOLS.items() if pool == POOLS[stage]))
    for _ in run.looks():
        scratch.check_kept()
    check_published(run.wait(), destination, undisturbed, reused=0)
    run.wait_for_orphans(_GONE)
    assert list(place.scratch.iterdir()) == []


def test_a_run_tries_a_chunk_again_when_its_encoder_is_killed(
    film: Path, undisturbed: bytes, place: Place, chance: Random
) -> None:
    destination = place.result("film.mp4")
    run = place.start(film, destination, *OPTIONS, "--verbose")
    hit: set[str] = set()
    per_chunk: Counter[int] = Counter()
    for _ in run.looks():
        for process, attempt in run.encoders():
            # One kill spoils an attempt; the third attempt at a chunk is left in peace.
            chunk = first_frame(attempt)
            if attempt in hit or per_chunk[chunk] == 2 or len(hit) == 10 or chance.random() < 0.2:
                continue
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
            hit.add(attempt)
            per_chunk[chunk] += 1
    finished = run.wait()
    check_published(finished, destination, undisturbed, reused=0)
    repeated = re.findall(r"chunk \d+ \(frames \d+-\d+\), attempt \d: ffmpeg ended with signal 9", finished.stderr)
    assert len(repeated) >= 6, hit


def test_a_chunk_that_never_encodes_ends_the_run_and_the_next_one_continues(
    film: Path, undisturbed: bytes, place: Place, chance: Random
) -> None:
    destination, scratch = place.result("film.mp4"), Scratch(place.scratch)
    victim = chance.randrange(2, CHUNKS - 1)
    run = place.start(film, destination, *OPTIONS)
    attempts: set[str] = set()
    for _ in run.looks():
        for process, attempt in run.encoders():
            if first_frame(attempt) == victim * GROUP and attempt not in attempts:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
                attempts.add(attempt)
    failed = run.wait()
    assert failed.code == 11, failed.stderr
    assert len(attempts) == 3
    assert len(failed.complaints) == 1
    frames = f"frames {victim * GROUP}-{victim * GROUP + GROUP - 1}"
    assert f"chunk {victim} ({frames}) failed after 3 attempts: ffmpeg ended with signal 9" in failed.complaints[0]
    assert "Traceback" not in failed.stderr
    assert failed.record["status"] == "failed"
    assert not list(destination.parent.iterdir())
    run.wait_for_orphans(_GONE)

    kept = scratch.finished()
    assert len(kept) >= victim - 1
    check_published(place.start(film, destination, *OPTIONS).wait(), destination, undisturbed, len(kept))


def test_an_interrupted_command_ends_at_once_and_continues_later(
    film: Path, undisturbed: bytes, place: Place, chance: Random
) -> None:
    destination, scratch = place.result("film.mp4"), Scratch(place.scratch)

    interrupted = place.start(film, destination, *OPTIONS)
    chunk = chance.randrange(1, 4)
    interrupted.wait_until(lambda: is_at(scratch, "upscale", chunk), f"upscale of chunk {chunk}")
    began = time.monotonic()
    interrupted.interrupt()
    finished = interrupted.wait()
    took = time.monotonic() - began
    print(f"ended {took:.1f} s after Ctrl-C")
    assert took < _PROMPT
    assert finished.code == 130
    assert finished.complaints == ["superres: stopped; run the same command again to continue where it stopped"]
    assert "Traceback" not in finished.stderr
    assert finished.record == {"status": "cancelled"}
    interrupted.wait_for_orphans(_GONE)
    assert not list(destination.parent.iterdir())

    # What the first one left half-written is not a sign of the second one.
    scratch.abandon("extract", "upscale", "encode")
    terminated = place.start(film, destination, *OPTIONS)
    chunk = chance.randrange(4, 6)
    # Encoding comes after inference in rank, so it may lag behind: by as much as the window allows.
    terminated.wait_until(
        lambda: is_at(scratch, "upscale", chunk) and len(scratch.finished()) >= 3, f"upscale of chunk {chunk}"
    )
    os.kill(terminated.pid, signal.SIGTERM)
    finished = terminated.wait()
    assert finished.code == 143
    assert finished.complaints == ["superres: terminated; run the same command again to continue where it stopped"]
    assert finished.record == {"status": "cancelled"}
    terminated.wait_for_orphans(_GONE)
    assert not list(destination.parent.iterdir())

    kept = scratch.finished()
    assert len(kept) >= 3
    check_published(place.start(film, destination, *OPTIONS).wait(), destination, undisturbed, len(kept))
    scratch.check_kept()


def test_damaged_chunk_files_are_noticed_and_only_they_are_made_again(
    film: Path, undisturbed: bytes, place: Place, chance: Random
) -> None:
    destination, scratch = place.result("film.mp4"), Scratch(place.scratch)
    run = place.start(film, destination, *OPTIONS)
    # In the middle of an encode, so that the upscaled chunk it reads is there.
    kill_flow(run, scratch, "encode", chance.randrange(3, 6))
    run.wait_for_orphans(_GONE)
    kept = scratch.finished()
    flipped, *intact = chance.sample(sorted(kept), len(kept))
    assert intact
    files = {path.name: path for path in scratch.files()}
    with files[flipped].open("r+b") as file:
        position = chance.randrange(files[flipped].stat().st_size)
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << chance.randrange(8)]))
    upscaled = scratch.upscaled()
    assert upscaled
    for path in upscaled:
        os.truncate(path, chance.randrange(path.stat().st_size))

    run = place.start(film, destination, *OPTIONS)
    remade = run.wait_until(lambda: {**scratch.finished()}.get(flipped) not in (None, kept[flipped]), "new chunk")
    assert remade
    now = scratch.finished()
    assert {name: now[name] for name in intact} == {name: kept[name] for name in intact}
    check_published(run.wait(), destination, undisturbed, len(intact))


def test_of_two_identical_commands_one_is_refused_and_another_job_is_not_disturbed(
    film: Path, undisturbed: bytes, place: Place
) -> None:
    destination = place.result("film.mp4")
    elsewhere = make_film(place.folder / "elsewhere.mp4", 2 * GROUP, "96x64")
    twins = [place.start(film, destination, *OPTIONS) for _ in range(2)]
    other = place.start(elsewhere, place.result("elsewhere.mp4"))

    def upscaling() -> tuple[Run, psutil.Process] | None:
        for run in twins:
            for worker in run.workers("gpu"):
                if worker.is_running() and _holds(worker, "upscale"):
                    worker.suspend()
                    return run, worker
        return None

    # The one that was first is held up until the other one has made up its mind.
    deadline = time.monotonic() + PATIENCE
    while (found := upscaling()) is None:
        assert time.monotonic() < deadline, [run.said for run in twins]
    winner, worker = found
    refused = next(run for run in twins if run is not winner).wait()
    worker.resume()
    assert refused.code == LedgerError.exit_code
    assert len(refused.complaints) == 1
    assert "is running already" in refused.complaints[0]
    assert f"process {winner.pid})" in refused.complaints[0]
    for run in (winner, other):
        assert run.wait().code == 0, run.said
    assert destination.read_bytes() == undisturbed
    assert place.result("elsewhere.mp4").exists()
    assert sorted(path.name for path in destination.parent.iterdir()) == ["elsewhere.mp4", "film.mp4"]
