"""Scratch: who may be in a folder, and that nothing goes but what nobody needs and this project wrote."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tasks.aws import aws_client
from tasks.errors import ScratchError, SourceError
from tasks.progress import TransferNote
from tasks.scratch import SOURCES, Leftover, find_leftovers, give_up, hold, note_job, own_job, remove
from tasks.stage import held, look_at, staged_path, staging_note
from tasks.store.address import Address
from tasks.store.download import download
from tasks.store.settings import StoreSettings
from tests.aws import running_aws

JOB = "0123456789abcdef"
CHUNK = "upscale-0000000-0000023-0123456789ab.yuv"
DAY = 86_400.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a job that somebody left: a finished chunk, an unfinished one, and what is written besides."""
    folder = tmp_path / "scratch" / JOB
    with own_job(folder):
        note_job(folder, "job-1")
        note_job(folder, "job-1")
    (folder / CHUNK).write_bytes(b"x" * 50_000)
    (folder / f"{CHUNK}.partial-0a1b2c3d").write_bytes(b"x" * 30_000)
    return folder


def found(folder: Path) -> list[Leftover]:
    return list(find_leftovers(folder.parent))


def removed(folder: Path) -> int | None:
    """Bytes freed by the removal of the one folder that is left over."""
    (leftover,) = found(folder)
    return remove(leftover)


def used(*folders: Path) -> int:
    """Bytes that the disk says files take."""
    listed = subprocess.run(["du", "--block-size=1", "-a", *map(str, folders)], capture_output=True, text=True).stdout
    rows = [line.split("\t") for line in listed.splitlines()]
    return sum(int(size) for size, path in rows if not Path(path).is_dir() and not path.endswith("/lock"))


def elsewhere(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Python in another process, which says a line when it is ready."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


HOLDER = """
import sys
from pathlib import Path
from tasks.scratch import hold
with hold(Path(sys.argv[1]), int(sys.argv[2])):
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=[fcntl.LOCK_EX, fcntl.LOCK_SH], ids=["alone", "shared"])
def holder(folder: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """Another process that works in the folder."""
    process = elsewhere(HOLDER, folder, request.param)
    yield process
    process.kill()
    process.wait()


def test_a_folder_that_nobody_works_in_is_removed_and_what_it_took_is_counted(folder: Path) -> None:
    os.utime(folder / CHUNK, (1, time.time() - 3 * DAY))
    (leftover,) = found(folder)
    assert leftover.job_ids == ("job-1",)
    assert abs(leftover.touched - time.time()) < 60  # By the file written last.
    assert leftover.bytes == used(folder) > 80_000
    assert remove(leftover) == leftover.bytes
    assert list(folder.parent.iterdir()) == []


def test_a_folder_in_use_is_neither_found_nor_removed(folder: Path, holder: subprocess.Popen[str]) -> None:
    assert found(folder) == []
    assert remove(Leftover(folder, 0, time.time() + DAY, ())) is None
    give_up(folder)
    assert (folder / CHUNK).exists()
    holder.kill()
    holder.wait()
    assert removed(folder)


def test_a_folder_is_free_at_once_though_a_process_that_was_just_forked_has_its_lock_open(folder: Path) -> None:
    with own_job(folder):
        if not (child := os.fork()):
            time.sleep(60)
            os._exit(0)
    try:
        give_up(folder)
        assert not folder.exists()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_that_was_worked_in_since_it_was_found_stays(folder: Path) -> None:
    (leftover,) = found(folder)
    with own_job(folder):
        (folder / "sample.yuv").write_bytes(b"new")
    assert remove(leftover) is None
    assert (folder / CHUNK).exists()


def test_holes_and_what_has_another_name_free_nothing(folder: Path, tmp_path: Path) -> None:
    result = folder / "result.mp4"
    result.write_bytes(b"x" * 100_000)
    os.link(result, tmp_path / "published.mp4")
    staged = folder.parent / SOURCES / JOB
    hold(staged, fcntl.LOCK_SH).close()
    with (staged / "source.mp4.download").open("wb") as file:
        file.truncate(10**9)
        file.write(b"x" * 4096)
    before = used(folder.parent, tmp_path / "published.mp4")
    leftovers = found(folder)
    assert [each.folder for each in leftovers] == [folder, staged]
    freed = sum(remove(each) or 0 for each in leftovers)
    assert 0 < freed < 200_000
    assert before - used(tmp_path / "published.mp4") == freed == sum(each.bytes for each in leftovers)


def test_files_of_others_and_the_folder_around_them_stay(folder: Path) -> None:
    names = ("film.mp4", "source.mp4", "holiday.partial.mp4", "upscale-my.yuv", "result", "notes/result.mp4")
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    with own_job(folder, fresh=True):
        pass
    (folder / CHUNK).write_bytes(b"x" * 5000)
    assert removed(folder) == used_by_chunk(5000)
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == sorted(names)
    assert found(folder) == []


def used_by_chunk(size: int) -> int:
    return -(-size // 4096) * 4096 + 4096  # With the list of jobs.


def test_what_else_lies_in_scratch_stays(folder: Path) -> None:
    scratch = folder.parent
    for name in ("film.mp4", "archive/film.mp4", "fedcba9876543210/film.mp4", f"{SOURCES}/film.mp4", JOB.upper()):
        (scratch / name).parent.mkdir(exist_ok=True)
        (scratch / name).write_text("mine")
    before = {path for path in scratch.rglob("*") if folder not in (path, *path.parents)}
    assert removed(folder)
    assert set(scratch.rglob("*")) == before


def test_links_are_not_followed(folder: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / CHUNK).write_text("mine")
    (precious / "film.mp4").write_text("mine")
    (precious / "lock").write_text("mine")
    scratch = folder.parent
    (folder / f"encode-0000000-0000023-0123456789ab.mkv.partial-{'x' * 8}").symlink_to(precious)
    (folder / "result.mp4").symlink_to(precious / "film.mp4")
    (folder / "sample.yuv").symlink_to(tmp_path / "nowhere")
    (scratch / "fedcba9876543210").symlink_to(precious)
    (scratch / SOURCES).symlink_to(precious)
    assert removed(folder)
    assert not folder.exists()
    assert {path.name: path.read_text() for path in precious.iterdir()} == dict.fromkeys(
        ("lock", "film.mp4", CHUNK), "mine"
    )
    # The name of whoever works in a folder is not written through a link either.
    trap = scratch / "aaaaaaaaaaaaaaaa"
    trap.mkdir()
    (trap / "lock").symlink_to(precious / "film.mp4")
    with pytest.raises(ScratchError, match="cannot use scratch folder"), own_job(trap):
        pass
    assert found(folder) == []
    assert (precious / "film.mp4").read_text() == "mine"


def test_odd_folders_do_not_stop_the_others(folder: Path) -> None:
    scratch = folder.parent
    (folder / "jobs").write_bytes(b"\xff\xfe\x00 job-2\n")
    (scratch / "fedcba9876543210").write_text("a file with the name of a folder")
    (scratch / "bbbbbbbbbbbbbbbb").mkdir()  # Somebody was killed right after making it.
    odd = scratch / "cccccccccccccccc"
    (odd / "jobs").mkdir(parents=True)
    (odd / "lock").mkdir()
    listed = scratch / "dddddddddddddddd"
    hold(listed, fcntl.LOCK_SH).close()
    (listed / "jobs").mkdir()
    (scratch / SOURCES).write_text("a file with the name of a folder")
    leftovers = found(folder)
    assert [each.folder.name[0] for each in leftovers] == ["0", "b", "d"]
    assert "job-2" in leftovers[0].job_ids
    assert [each.job_ids for each in leftovers[1:]] == [(), ()]
    for each in leftovers:
        assert remove(each) is not None
    assert sorted(path.name for path in scratch.iterdir()) == [odd.name, "fedcba9876543210", SOURCES]


def test_scratch_that_is_missing_is_empty_and_one_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert list(find_leftovers(tmp_path / "nowhere")) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ScratchError, match="cannot read"):
        list(find_leftovers(tmp_path / "file"))


@pytest.fixture
def common() -> Iterator[Path]:
    """A scratch folder that everybody may read."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become somebody else")
def test_folders_of_somebody_else_are_left_alone(common: Path) -> None:
    other = common / "eeeeeeeeeeeeeeee"
    hold(other, fcntl.LOCK_SH).close()
    (other / CHUNK).write_bytes(b"x" * 10_000)
    other.chmod(0o555)
    (other / "lock").chmod(0o666)  # They may lock it, but not remove what is in it.
    unreadable = common / "ffffffffffffffff"
    hold(unreadable, fcntl.LOCK_SH).close()
    unreadable.chmod(0o700)
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            by_name = {each.folder.name[0]: each for each in find_leftovers(common)}
            good = list(by_name) == ["e"] and remove(by_name["e"]) == 0
            os._exit(0 if good else 1)
        except BaseException:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert (other / CHUNK).exists()
    assert (unreadable / "lock").exists()


def test_a_download_that_breaks_off_leaves_nothing_but_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.store.download.PART_BYTES", 10_000)
    with running_aws() as aws:
        s3, store = aws_client("s3", aws), StoreSettings(aws)
        s3.create_bucket(Bucket="videos", CreateBucketConfiguration={"LocationConstraint": aws.region})
        s3.put_object(Bucket="videos", Key="film one.MP4", Body=os.urandom(45_000))
        source = look_at("s3://videos/film one.MP4", store)
        path, address = staged_path(source, tmp_path), Address("videos", "film one.MP4")
        note = TransferNote(staging_note(source, tmp_path))

        def break_off(done: int, total: int) -> None:
            note.write(done, total)
            if done >= 20_000:
                raise RuntimeError("broken off")

        with pytest.raises(RuntimeError, match="broken off"), held(source, tmp_path, "job-1"):
            (path.parent / "download.lock").touch()
            download(store, address, source.facts, path, break_off)
        names = {entry.name for entry in path.parent.iterdir()}
        assert {"source.mp4.download", "source.mp4.parts", "staging.progress", "jobs", "lock"} <= names
        (leftover,) = find_leftovers(tmp_path)
        assert leftover.job_ids == ("job-1",)
        assert remove(leftover)
        assert not path.parent.exists()
        with pytest.raises(SourceError), held(source, tmp_path, "job-1"):  # Another attempt would meet it again.
            download(store, address, source.facts, path)
            assert path.exists()
            raise SourceError("no video")
        assert not path.parent.exists()


def test_who_wants_a_folder_that_is_being_removed_waits_and_makes_it_anew(folder: Path) -> None:
    with hold(folder, fcntl.LOCK_EX) as lock:
        lock.write("removal")
        lock.flush()
        waiting = elsewhere(f"print('ready', flush=True)\n{HOLDER}", folder, fcntl.LOCK_EX)
        time.sleep(2.0)  # Longer than anybody waits for a job that runs.
        assert waiting.poll() is None
        gone = folder.rename(folder.parent / "gone")  # In one step: whoever waits may look between two.
        shutil.rmtree(gone)
    said, _ = waiting.communicate(timeout=30)
    assert (waiting.returncode, said) == (0, "ready\n")
    assert (folder / "lock").exists()


WORKER = """
import os, sys, time
from pathlib import Path
from tasks.scratch import own_job
folder, mine = Path(sys.argv[1]), Path(sys.argv[1]) / "sample.yuv"
print("ready", flush=True)
until = time.monotonic() + float(sys.argv[2])
jobs = 0
while time.monotonic() < until:
    with own_job(folder, fresh=True):
        mine.write_text(str(os.getpid()))
        os.sched_yield()
        for _ in range(20):
            assert mine.read_text() == str(os.getpid()), "somebody else is here"
        jobs += 1
    time.sleep(0.002)
print(jobs)
"""

REMOVER = """
import sys, time
from pathlib import Path
from tasks.scratch import Leftover, find_leftovers, give_up, remove
print("ready", flush=True)
until = time.monotonic() + float(sys.argv[2])
times = 0
while time.monotonic() < until:
    for leftover in find_leftovers(Path(sys.argv[1]).parent):
        remove(leftover)
    times += bool(remove(Leftover(Path(sys.argv[1]), 0, time.time(), ())))
    give_up(Path(sys.argv[1]))
print(times)
"""


def test_jobs_that_begin_while_folders_are_removed_lose_nothing(folder: Path) -> None:
    """Two jobs take turns with a folder that two others remove all the time: nobody is refused, nothing gets lost."""
    processes = [elsewhere(code, folder, 4.0) for code in (WORKER, WORKER, REMOVER, REMOVER)]
    ended = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    print(ended)
    assert all(int(count) > 10 for count in ended[:2])
    assert all(int(count) > 2 for count in ended[2:])
