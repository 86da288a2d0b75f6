"""Housekeeping: jobs whose process is gone end in the ledger and in Prefect, and only what nobody needs is removed."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Running, Scheduled, State

from blocks.job_ledger import JobLedger
from blocks.media_store import MediaStore
from flows.housekeeping import HousekeepingOptions, housekeeping
from tasks.aws import AwsSettings, aws_client
from tasks.destinations import LocalFile, StoredObject
from tasks.ledger import Ledger, LedgerSettings, open_ledger
from tasks.ledger.record import JobError, JobRecord, JobState, NewJob
from tasks.ledger.sqlite import SqliteBackend
from tasks.media.encoders import file_digest
from tasks.receipt import write_receipt
from tasks.scratch import SOURCES, note_job, own_job
from tasks.store.address import Address
from tasks.store.settings import StoreSettings
from tests.aws import running_aws
from tests.flows.jobs import GROUP, Place, Run, make_film
from tests.infra.slurm_cluster import slurm  # noqa: F401
from tests.ledger.jobs import ELSEWHERE
from tests.waiting import eventually

DAY = 86_400.0
KEY = "0123456789abcdef"
CHUNK = "encode-0000000-0000023-0123456789ab.mkv"

#: A process that works on a job: it has begun it, holds its folder and waits.
WORKER = """
import json, sys
from pathlib import Path
from tasks.ledger import LedgerSettings, open_ledger
from tasks.ledger.holder import this_holder
from tasks.ledger.record import JobState, NewJob
from tasks.scratch import note_job, own_job
given = json.loads(sys.argv[1])
ledger, folder = open_ledger(LedgerSettings(file=given["ledger"])), Path(given["folder"])
record = ledger.begin(NewJob("ann", given["source"], "v1", given["destination"]), this_holder(), given["run"])
record = ledger.advance(
    record, JobState(given["state"]), work_folder=str(folder), frames_total=48, slurm_jobs=tuple(given["slurm_jobs"])
)
with own_job(folder):
    note_job(folder, record.job_id)
    (folder / given["file"]).write_bytes(b"x" * 20_000)
    print("ready", record.job_id, flush=True)
    sys.stdin.read()
"""


@flow
def some_flow() -> None:
    """Gives flow runs."""


@dataclass
class Site:
    """A ledger, a scratch folder, and processes that work."""

    home: Path
    store: str = ""
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def scratch(self) -> Path:
        return self.home / "scratch"

    @property
    def ledger(self) -> Ledger:
        return open_ledger(LedgerSettings(file=str(self.home / "jobs.sqlite")))

    def start(
        self,
        name: str,
        *,
        run: UUID | None = None,
        state: JobState = JobState.UPSCALING,
        slurm_jobs: tuple[str, ...] = (),
    ) -> tuple[subprocess.Popen[str], str, Path]:
        """Start a job; gives its process, its id and its folder."""
        folder = self.scratch / name.encode().hex().ljust(16, "0")[:16]
        given = {
            "ledger": str(self.home / "jobs.sqlite"),
            "folder": str(folder),
            "source": f"/films/{name}.mp4",
            "destination": f"s3://results/{name}.mp4" if self.store else str(self.home / f"{name}.mp4"),
            "run": str(run or ""),
            "state": state,
            "slurm_jobs": slurm_jobs,
            "file": CHUNK,
        }
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, json.dumps(given)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.processes.append(process)
        assert process.stdout is not None
        ready, job = process.stdout.readline().split()
        assert ready == "ready"
        return process, job, folder

    def keep(self, **options: Any) -> dict[str, Any]:
        """Run housekeeping in this process; gives what it did."""
        given = {"scratch": str(self.scratch), "ledger": "keeping", "store": self.store, **options}
        return housekeeping(HousekeepingOptions(**given))

    def states(self, *jobs: str) -> list[JobState]:
        records = [self.ledger.find(job) for job in jobs]
        return [record.state for record in records if record is not None]

    def put(self, record: JobRecord) -> str:
        """Write a record as it is; gives its id."""
        backend = SqliteBackend(self.home / "jobs.sqlite")
        backend.set_up()
        backend.create(record)
        return record.job_id


@pytest.fixture
def site(tmp_path: Path, prefect_api: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("SUPERRES_HOME", str(tmp_path))
    JobLedger(file=str(tmp_path / "jobs.sqlite")).save("keeping", overwrite=True)
    site = Site(tmp_path)
    yield site
    for process in site.processes:
        process.kill()
        process.wait()


def flow_run(state: State[Any]) -> UUID:
    """A flow run in a state that nobody works on."""
    with get_client(sync_client=True) as client:
        return client.create_flow_run(some_flow, state=state).id


def state_of(run: UUID) -> State[Any]:
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run).state
    assert state is not None
    return state


def kill(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def age(folder: Path, seconds: float) -> None:
    """Let everything in a folder look as old as that."""
    for path in folder.rglob("*"):
        os.utime(path, times=(time.time() - seconds,) * 2, follow_symlinks=False)


def ended(job: str, state: JobState, days: float) -> JobRecord:
    then = time.time() - days * DAY
    error = JobError("upscaling", "frame", "a frame is bad") if state == JobState.FAILED else None
    return JobRecord(job, "ann", state, error=error, created_at=then, updated_at=then, write_id=job)


def leave(folder: Path, *jobs: str, days: float, files: tuple[str, ...] = (CHUNK,)) -> Path:
    """A folder that jobs left some days ago."""
    with own_job(folder):
        for job in jobs:
            note_job(folder, job)
        for file in files:
            (folder / file).write_bytes(b"x" * 20_000)
    age(folder, days * DAY)
    return folder


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def superres(place: Place, *arguments: str) -> dict[str, Any]:
    """Run a command at a place; gives its JSON."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"SUPERRES_HOME": str(place.folder / "home"), "PREFECT_HOME": str(place.folder / "profile")}
    command = [str(Path(sys.executable).with_name("superres")), *arguments, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_a_command_that_was_killed_is_ended_as_failed_and_its_files_go_when_they_were_kept_long_enough(
    place: Place,
) -> None:
    film = make_film(place.folder / "film.mp4", 4 * GROUP, "96x64")
    run = place.start(film, place.result("film.mp4"), "--chunk-seconds", "1", "--encoder", "h265")
    run.wait_until(lambda: list(place.scratch.glob("*/encode-*.mkv")), "an encoded chunk")
    run.kill()
    run.wait_for_orphans(30)
    (folder,) = place.scratch.iterdir()
    (job,) = superres(place, "jobs")["jobs"]
    assert job["state"] not in ("failed", "published", "cancelled")
    scratch = ("--scratch", str(place.scratch))

    found = superres(place, "housekeeping", *scratch)
    assert found["dry_run"]
    assert [(each["job"], each["state"]) for each in found["jobs_ended"]] == [(job["job_id"], "failed")]
    assert superres(place, "jobs", job["job_id"]) == job

    superres(place, "housekeeping", "--delete", *scratch)
    after = superres(place, "jobs", job["job_id"])
    assert (after["state"], after["error"]["kind"]) == ("failed", "lost")
    assert f"process {run.pid} is gone" in after["error"]["message"]
    assert states_in_prefect(place) == {job["flow_run_id"]: "CRASHED"}
    assert folder.exists()

    before = used(folder)
    freed = superres(place, "housekeeping", "--delete", "--keep-failed", "0", *scratch)
    assert freed["bytes_freed"] == before > 0
    assert list(place.scratch.iterdir()) == []  # So every file that a job leaves is known as such.
    assert film.exists()


def used(folder: Path) -> int:
    """Bytes that the disk says the files of a folder take, but for its lock."""
    listed = subprocess.run(["du", "--block-size=1", "-a", str(folder)], capture_output=True, text=True, check=True)
    rows = [line.split("\t") for line in listed.stdout.splitlines()]
    return sum(int(size) for size, path in rows if not Path(path).is_dir() and not path.endswith("/lock"))


def states_in_prefect(place: Place) -> dict[str, str]:
    """States of the flow runs of `upscale-video` in the history of a private server."""
    (database,) = (place.folder / "home" / "prefect").glob("prefect-*.db")
    query = (
        "SELECT flow_run.id, state_type FROM flow_run JOIN flow ON flow.id = flow_id WHERE flow.name = 'upscale-video'"
    )
    with sqlite3.connect(database) as connection:
        return dict(connection.execute(query))


def test_a_job_whose_process_is_gone_ends_and_its_flow_run_with_it_and_one_that_works_is_left_alone(site: Site) -> None:
    lost_run, live_run = flow_run(Running()), flow_run(Running())
    lost, lost_job, lost_folder = site.start("lost", run=lost_run)
    _, live_job, live_folder = site.start("works", run=live_run)
    kill(lost)
    age(lost_folder, 30 * DAY)
    age(live_folder, 30 * DAY)
    done = site.keep(finished_hours=0, failed_days=0)
    assert [each["job"] for each in done["jobs_ended"]] == [lost_job]
    assert site.states(lost_job, live_job) == [JobState.FAILED, JobState.UPSCALING]
    assert (state_of(lost_run).name, state_of(live_run).name) == ("Crashed", "Running")
    assert "is gone" in (state_of(lost_run).message or "")
    assert [each["folder"] for each in done["folders_removed"]] == [str(lost_folder)]
    assert not lost_folder.exists()
    assert (live_folder / CHUNK).exists()
    assert site.keep(finished_hours=0, failed_days=0)["jobs_ended"] == []


def test_a_lost_job_ends_as_its_flow_run_did(site: Site) -> None:
    cases: dict[str, tuple[State[Any] | None, JobState, str]] = {
        "cancelled": (Cancelled(message="no longer wanted"), JobState.CANCELLED, "Cancelled"),
        "wished away": (Cancelling(), JobState.CANCELLED, "Cancelled"),
        "crashed": (Crashed(message="out of memory"), JobState.FAILED, "Crashed"),
        "done": (Completed(), JobState.FAILED, "Completed"),
        "expected": (Scheduled(), JobState.UPSCALING, "Scheduled"),  # Prefect will try it again.
        "nowhere": (None, JobState.FAILED, ""),
    }
    runs = {name: uuid4() if state is None else flow_run(state) for name, (state, _, _) in cases.items()}
    started = {name: site.start(name, run=run) for name, run in runs.items()}
    assert site.keep()["jobs_ended"] == []  # Whatever Prefect says: they work.
    for process, _, _ in started.values():
        kill(process)
    site.keep()
    for name, (state, outcome, prefect) in cases.items():
        record = site.ledger.find(started[name][1])
        assert record is not None
        assert record.state == outcome, name
        if state is not None:
            assert state_of(runs[name]).name == prefect
            assert not state.message or (record.error is not None and record.error.message == state.message)


def test_a_job_elsewhere_ends_only_a_while_after_its_lease(site: Site) -> None:
    """Nobody here can look whether its process is gone, and its clock may be behind ours."""
    jobs = []
    for number, lapsed in enumerate((-60.0, 60.0, 600.0, 1000.0)):
        new = NewJob("ann", f"/films/{number}.mp4", "v1", f"/out/{number}.mp4")
        site.ledger.begin(new, ELSEWHERE, str(flow_run(Running())))
        record = site.ledger.find(new.job_id)
        assert record is not None
        changed = replace(record, lease_until=time.time() - lapsed, write_id=f"w{number}")
        SqliteBackend(site.home / "jobs.sqlite").replace(changed, record)
        jobs.append(new.job_id)
    leave(site.scratch / KEY, *jobs[:3], days=30)
    done = site.keep(failed_days=0)
    assert [each["job"] for each in done["jobs_ended"]] == [jobs[3]]
    assert site.states(*jobs) == [JobState.CREATED] * 3 + [JobState.FAILED]
    assert done["folders_removed"] == []


def test_a_job_that_published_just_before_it_was_killed_is_ended_as_published(site: Site) -> None:
    run = flow_run(Running())
    process, job, folder = site.start("film", run=run, state=JobState.VERIFYING)
    result = site.home / "film.mp4"
    result.write_bytes(b"a film")
    write_receipt(folder, LocalFile.at(str(result)), file_digest(result))
    kill(process)
    expected = [{"job": job, "state": "published", "source": "/films/film.mp4"}]
    for dry_run in (True, False):
        done = site.keep(dry_run=dry_run, finished_hours=0)
        assert [{name: each[name] for name in expected[0]} for each in done["jobs_ended"]] == expected
        assert len(done["folders_removed"]) == 1
    record = site.ledger.find(job)
    assert record is not None
    assert (record.state, record.frames_done) == (JobState.PUBLISHED, 48)
    assert record.output is not None
    assert (record.output["uri"], record.output["bytes"]) == (str(result), 6)
    assert result.read_bytes() == b"a film"


@pytest.fixture
def aws(site: Site) -> Iterator[AwsSettings]:
    """An AWS with a bucket of results, and a block of this site that names it."""
    from tests.flows.clouds import save_blocks

    with running_aws() as settings:
        aws_client("s3", settings).create_bucket(
            Bucket="results", CreateBucketConfiguration={"LocationConstraint": settings.region}
        )
        save_blocks(settings)
        site.store = "cloud"
        yield settings


def test_where_the_store_does_not_tell_whether_a_result_is_there_the_job_is_left_for_later(
    site: Site, aws: AwsSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, job, folder = site.start("film", run=flow_run(Running()), state=JobState.VERIFYING)
    result = folder / "result.mp4"
    result.write_bytes(b"a film")
    digest = file_digest(result)
    destination = StoredObject(Address("results", "film.mp4"), StoreSettings(aws))
    write_receipt(folder, destination, digest)
    destination.put(result, digest, overwrite=False, notes={}, progress=lambda *_: None)
    kill(process)
    away = MediaStore.load("cloud")
    assert isinstance(away, MediaStore)
    assert away.credentials is not None
    credentials = away.credentials.model_copy(deep=True)
    credentials.aws_client_parameters.endpoint_url = "http://127.0.0.1:9"
    credentials.save("away", overwrite=True)
    MediaStore(credentials=type(credentials).load("away")).save("away", overwrite=True)
    monkeypatch.setattr("tasks.aws._ATTEMPTS", 1)  # Else it takes a minute.
    aws_client.cache_clear()
    assert site.keep(store="away", finished_hours=0, failed_days=0)["jobs_ended"] == []
    assert site.states(job) == [JobState.VERIFYING]
    assert result.exists()
    site.keep()
    assert site.states(job) == [JobState.PUBLISHED]


def test_what_a_removed_job_had_begun_to_upload_is_removed_too(site: Site, aws: AwsSettings) -> None:
    s3 = aws_client("s3", aws)
    begun = {key: s3.create_multipart_upload(Bucket="results", Key=key)["UploadId"] for key in ("old.mp4", "new.mp4")}
    for folder, key, days in (("a" * 16, "old.mp4", 30), ("b" * 16, "new.mp4", 1)):
        leave(site.scratch / folder, days=days)
        state = {"uri": f"s3://results/{key}", "upload_id": begun[key], "part_bytes": 8 << 20}
        (site.scratch / folder / "upload.json").write_text(json.dumps(state))
        age(site.scratch / folder, days * DAY)
    assert len(site.keep()["folders_removed"]) == 1
    assert [each["Key"] for each in s3.list_multipart_uploads(Bucket="results")["Uploads"]] == ["new.mp4"]


def test_a_dry_run_tells_what_would_be_done_and_changes_nothing(site: Site) -> None:
    run = flow_run(Running())
    process, job, folder = site.start("lost", run=run)
    kill(process)
    kept = leave(site.scratch / KEY, site.put(ended("job-1", JobState.PUBLISHED, 2)), days=2)
    before, record = everything(site.scratch), site.ledger.find(job)
    told = site.keep(dry_run=True)
    assert (everything(site.scratch), site.ledger.find(job)) == (before, record)
    assert state_of(run).name == "Running"
    done = site.keep()
    assert told == {**done, "dry_run": True}
    assert [each["folder"] for each in done["folders_removed"]] == [str(kept)]
    assert done["bytes_freed"] > 20_000
    assert folder.exists()  # It failed just now, and may be run again.


def test_files_are_kept_for_a_day_where_all_is_done_and_for_a_week_otherwise(site: Site) -> None:
    cases: list[tuple[tuple[JobState | None, ...], float, bool]] = [
        ((JobState.PUBLISHED,), 0.9, False),
        ((JobState.PUBLISHED,), 1.1, True),
        ((JobState.CANCELLED,), 1.1, True),
        ((JobState.FAILED,), 6.9, False),
        ((JobState.FAILED,), 7.1, True),
        ((JobState.PUBLISHED, JobState.FAILED), 2, False),
        ((JobState.PUBLISHED, JobState.CANCELLED), 2, True),
        ((JobState.PUBLISHED, None), 2, False),  # In another ledger it may have failed.
        ((None,), 6.9, False),
        ((None,), 7.1, True),
        ((), 6.9, False),
        ((), 7.1, True),
    ]
    names = ("source.mp4.download", "source.mp4.parts", "staging.progress", "download.lock")
    folders = {}
    for case, (states, days, goes) in enumerate(cases):
        jobs = [f"job-{case}-{number}" for number in range(len(states))]
        for job, state in zip(jobs, states, strict=True):
            if state is not None:
                site.put(ended(job, state, days))
        for parent, files in ((site.scratch, (CHUNK,)), (site.scratch / SOURCES, names)):
            folders[leave(parent / f"{case:016x}", *jobs, days=days, files=files)] = goes
    done = site.keep()
    assert {folder: not folder.exists() for folder in folders} == folders
    assert {each["folder"] for each in done["folders_removed"]} == {str(path) for path, goes in folders.items() if goes}
    assert done["bytes_freed"] == sum(each["bytes"] for each in done["folders_removed"]) > 0


def test_files_of_a_paused_job_are_kept_as_those_of_a_failed_one(site: Site) -> None:
    paused = replace(ended("paused", JobState.CANCELLED, 2), error=JobError("upscaling", "paused", "Paused"))
    site.put(paused)
    site.put(ended("cancelled", JobState.CANCELLED, 2))
    kept = leave(site.scratch / "0000000000000001", "paused", days=2)
    gone = leave(site.scratch / "0000000000000002", "cancelled", days=2)
    site.keep()
    assert (kept.exists(), gone.exists()) == (True, False)
    site.keep(failed_days=1.9)
    assert not kept.exists()


def test_files_are_kept_from_the_end_of_their_job_on(site: Site) -> None:
    site.put(ended("job-1", JobState.FAILED, 1))
    folder = leave(site.scratch / KEY, "job-1", days=30)
    assert site.keep()["bytes_freed"] == 0
    assert folder.exists()


def test_jobs_that_began_elsewhere_keep_their_files_without_a_lock(site: Site) -> None:
    """As where the file system knows locks of one machine only: the ledger says that the job runs."""
    new = NewJob("ann", "/films/film.mp4", "v1", "/out/film.mp4")
    site.ledger.begin(new, ELSEWHERE)
    leave(site.scratch / KEY, new.job_id, days=30)
    leave(site.scratch / SOURCES / KEY, "job-0", new.job_id, days=30, files=("source.mp4",))
    done = site.keep(finished_hours=0, failed_days=0)
    assert (done["jobs_ended"], done["folders_removed"]) == ([], [])


def test_records_that_are_kept_long_enough_are_gone(site: Site) -> None:
    site.put(replace(ended("job-1", JobState.PUBLISHED, 400), expires_at=int(time.time() - 10)))
    site.put(replace(ended("job-2", JobState.PUBLISHED, 300), expires_at=int(time.time() + 1000)))
    site.keep()
    assert site.states("job-1", "job-2") == [JobState.PUBLISHED]


def test_without_lost_jobs_slurm_is_not_asked(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    programs, asked = tmp_path / "programs", tmp_path / "asked"
    programs.mkdir()
    for name in ("squeue", "scancel"):
        (programs / name).write_text(f"#!/bin/sh\necho {name} >> {asked}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    site.start("works", slurm_jobs=("17",))
    process, _, _ = site.start("lost")
    kill(process)
    assert site.keep()["slurm_jobs_cancelled"] == []
    assert not asked.exists()
    process, _, _ = site.start("again lost", slurm_jobs=("18",))
    kill(process)
    assert site.keep()["slurm_jobs_cancelled"] == []
    assert asked.read_text().split() == ["squeue"]


@pytest.mark.slurm
def test_slurm_jobs_of_lost_jobs_are_cancelled_but_not_those_that_others_use(site: Site, slurm: Any) -> None:  # noqa: F811
    def submit(name: str) -> str:
        command = ["sbatch", "--parsable", "--partition=cpu", f"--job-name={name}", "--wrap=sleep 600"]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=site.home).stdout.strip()

    def alive() -> set[str]:
        return {str(job.id) for job in slurm.squeue() if not job.ended}

    own, shared, foreign, unknown = (submit(f"superres-{name}") for name in ("cpu", "gpu", "cpu", "cpu"))
    somebodys = submit("simulation")  # As after a job's number was used again.
    site.start("works", slurm_jobs=(shared, foreign))
    process, _, _ = site.start("lost", slurm_jobs=(own, shared, somebodys, "999999"))
    kill(process)
    before = alive()
    assert site.keep(dry_run=True)["slurm_jobs_cancelled"] == [own]
    assert alive() == before
    assert site.keep()["slurm_jobs_cancelled"] == [own]
    assert eventually(lambda: own not in alive(), 20)
    assert alive() == before - {own}
    assert {shared, foreign, unknown, somebodys} <= alive()
    for job in before - {own}:
        slurm.run("scancel", job)


def test_the_command_refuses_a_negative_time(place: Place) -> None:
    run = Run(
        [str(Path(sys.executable).with_name("superres")), "housekeeping", "--keep-failed", "-1", "--json"],
        {**os.environ, "SUPERRES_HOME": str(place.folder / "home")},
        place.folder,
    )
    done = run.wait()
    assert (done.code, done.record["kind"]) == (2, "settings")
    assert "less than no time" in done.complaints[0]
