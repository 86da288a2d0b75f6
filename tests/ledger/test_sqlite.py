"""A ledger in a file: several processes, its rights, and what cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.errors import LedgerError
from tasks.ledger import Ledger, LedgerSettings, open_ledger
from tasks.ledger.record import JobRecord, JobState
from tasks.ledger.sqlite import SqliteBackend
from tests.ledger.jobs import ERROR, JOB, begin, job

_HEAD = """
import os, resource, sys
from tasks.errors import LedgerError
from tasks.ledger import LedgerSettings, open_ledger
from tasks.ledger import sqlite
from tests.ledger.jobs import JOB, begin, job
settings = LedgerSettings(file=sys.argv[1])
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "home" / "jobs.sqlite"


def _start(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _HEAD + script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


_WRITE_MANY = """
number = int(sys.argv[2])
for count in range(10):  # Each opening makes what is missing; all do so at once.
    record = begin(open_ledger(settings), job(100 * number + count))
ledger = open_ledger(settings)
for count in range(25):
    while (shared := ledger.find(JOB.job_id)) is None:
        pass
    ledger.renew(shared)
    record = ledger.renew(record, frames_done=count)
"""


def test_several_processes_write_at_once_and_nothing_is_lost(file: Path) -> None:
    processes = [_start(_WRITE_MANY, file, number) for number in range(4)]
    begin(open_ledger(LedgerSettings(file=str(file))))
    for process in processes:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
    ledger = open_ledger(LedgerSettings(file=str(file)))
    shared = ledger.find(JOB.job_id)
    assert shared is not None
    assert shared.version == 1 + 4 * 25
    for number in range(4):
        for count in range(10):
            record = ledger.find(job(100 * number + count).job_id)
            assert record is not None
            assert record.version == (26 if count == 9 else 1)


_READ = """
print(len(open_ledger(settings).by_owner("ann")))
"""


def test_opening_it_again_takes_no_lock_from_other_threads_of_the_process(file: Path) -> None:
    settings = LedgerSettings(file=str(file))
    ledger = open_ledger(settings)
    with SqliteBackend(file)._open() as held:  # As any thread has it while it reads or writes.
        held.execute("SELECT * FROM jobs").fetchone()
        open_ledger(settings)
        assert _start(_READ, file).communicate(timeout=60)[0] == "0\n"
        # The other process was not the last one to have it open, so it must not have taken the log away.
        begin(ledger)
        assert _start(_READ, file).communicate(timeout=60)[0] == "1\n"
        held.execute("UPDATE jobs SET owner = 'bob'")
    assert _start(_READ, file).communicate(timeout=60)[0] == "0\n"


def test_only_its_user_may_read_it(file: Path) -> None:
    before = os.umask(0)
    try:
        ledger = open_ledger(LedgerSettings(file=str(file)))
        begin(ledger)
        with SqliteBackend(file)._open() as held:
            held.execute("SELECT * FROM jobs").fetchone()
            rights = {path.name: path.stat().st_mode & 0o777 for path in [file.parent, *file.parent.iterdir()]}
    finally:
        os.umask(before)
    assert rights == {"home": 0o700, "jobs.sqlite": 0o600, "jobs.sqlite-wal": 0o600, "jobs.sqlite-shm": 0o600}


_AS_ANOTHER = """
if os.geteuid() == 0:
    os.seteuid(65534)
try:
    open_ledger(settings)
except LedgerError as error:
    print(error)
"""


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_that_is_read_only_is_refused(tmp_path: Path, exists: bool) -> None:
    file = tmp_path / "jobs.sqlite"
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    if exists:
        begin(open_ledger(LedgerSettings(file=str(file))))
        file.chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        output, _ = _start(_AS_ANOTHER, file).communicate(timeout=60)
    finally:
        tmp_path.chmod(0o755)
    assert output == f"the job ledger {file} cannot be used (Permission denied). Name another file.\n"


@pytest.mark.parametrize("place", ["/proc/ledger/jobs.sqlite", "/dev/null/jobs.sqlite", "/dev"])
def test_a_place_that_cannot_hold_a_file_is_refused(place: str) -> None:
    with pytest.raises(LedgerError, match=f"the job ledger {place} cannot be used"):
        open_ledger(LedgerSettings(file=place))


_FILL = """
ledger = open_ledger(settings)
record = begin(ledger)
resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, 80_000))
try:
    for number in range(10_000):
        begin(ledger, job(number))
except LedgerError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, 80_000))
print(ledger.find(JOB.job_id) == record)
"""


def test_a_file_that_cannot_grow_is_said_to_be_so_and_stays_readable(file: Path) -> None:
    output, _ = _start(_FILL, file).communicate(timeout=60)
    told, readable = output.splitlines()
    # What a quota leads to; a full disk is SQLITE_FULL.
    assert told == f"the job ledger {file} cannot be used (disk I/O error). Check the disk and your quota on it."
    assert readable == "True"
    assert begin(open_ledger(LedgerSettings(file=str(file))), replace(JOB, source="new")).version == 1


def test_another_file_is_not_written_over(file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(b"a film, not a ledger\n" * 100)
    with pytest.raises(LedgerError, match=r"\(file is not a database\)\. Move it away"):
        open_ledger(LedgerSettings(file=str(file)))
    assert file.read_bytes() == b"a film, not a ledger\n" * 100


def test_a_file_that_went_away_is_missed_and_not_made_anew(file: Path) -> None:
    ledger = open_ledger(LedgerSettings(file=str(file)))
    file.unlink()
    with pytest.raises(LedgerError, match="unable to open"):
        begin(ledger)
    assert not file.exists()


def test_records_are_removed_when_their_time_is_over(file: Path) -> None:
    backend = SqliteBackend(file)
    backend.set_up()
    ledger = Ledger(backend, keep_days=2)
    running, ended = begin(ledger, job(1)), ledger.fail(begin(ledger, job(2)), ERROR)
    assert ended.expires_at == int(ended.updated_at) + 2 * 86_400
    assert backend.purge(ended.expires_at) == 0
    assert backend.purge(ended.expires_at + 1) == 1
    assert (ledger.find(running.job_id), ledger.find(ended.job_id)) == (running, None)
    backend.create(JobRecord("old", "ann", JobState.FAILED, expires_at=1))
    assert open_ledger(LedgerSettings(file=str(file))).find("old") is None


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SUPERRES_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_file_lies_in_the_projects_home_by_default(home: Path) -> None:
    record = begin(open_ledger(LedgerSettings()))
    assert open_ledger(LedgerSettings(file=str(home / "jobs.sqlite"))).find(JOB.job_id) == record
