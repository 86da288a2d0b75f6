"""Kill a job between its upload, its record and its cleanup, or a worker in the middle of a transfer: nothing is done
twice, nothing is left half done.

The proxy before AWS holds an answer back, so that the moment of a kill is no matter of chance.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pytest

from infra.prefect_server import ensure_api
from tasks.aws import AwsSettings, aws_client
from tasks.ledger import LedgerSettings, open_ledger
from tasks.ledger.dynamodb import create_table
from tasks.ledger.record import JobRecord, JobState
from tasks.owner import this_user
from tasks.scratch import find_leftovers
from tests.aws import running_aws
from tests.fault_proxy import Call, Exchange, FaultProxy, Match, running_proxy, serialised
from tests.flows.clouds import TABLE, save_blocks
from tests.flows.jobs import PATIENCE, Place, Run, make_film

pytestmark = pytest.mark.chaos

#: Seconds after which nothing of a killed command may be left, and within which an interrupted one ends.
_GONE: Final = 20.0
_PROMPT: Final = 10.0

LASTING: Final = 10**6


@dataclass
class Site:
    """A home whose blocks `cloud` lead through a proxy, and a film."""

    place: Place
    aws: AwsSettings
    proxy: FaultProxy
    film: Path
    jobs: int = 0

    def new(self) -> tuple[str, str]:
        """A video of its own, and the name of its result."""
        self.jobs += 1
        self.proxy.clear()
        aws_client("s3", self.aws).upload_file(str(self.film), "videos", f"film-{self.jobs}.mp4")
        return f"s3://videos/film-{self.jobs}.mp4", f"film-{self.jobs}.mp4"

    def start(self, source: str, name: str) -> Run:
        return self.place.start(source, f"s3://results/{name}", "--store", "cloud", "--ledger", "cloud")

    def record(self, source: str) -> JobRecord | None:
        """The record of the job on a video."""
        ledger = open_ledger(LedgerSettings(table=TABLE, aws=self.aws))
        return next((record for record in ledger.by_owner(this_user()) if record.source == source), None)

    def left_of(self, record: JobRecord) -> bool:
        """Whether anything of a job is left in scratch."""
        return any(record.job_id in leftover.job_ids for leftover in find_leftovers(self.place.scratch))

    def versions(self, name: str) -> list[str]:
        """Versions of a result."""
        listed = aws_client("s3", self.aws).list_object_versions(Bucket="results", Prefix=name)
        return [version["VersionId"] for version in listed.get("Versions", [])]

    def check_published(self, source: str, name: str) -> JobRecord:
        """Check that a job is published once, and no upload is left."""
        record = self.record(source)
        assert record is not None
        assert (record.state, record.error) == (JobState.PUBLISHED, None)
        assert record.output is not None
        assert self.versions(name) == [record.output["version_id"]]
        s3 = aws_client("s3", self.aws)
        assert s3.head_object(Bucket="results", Key=name)["ContentLength"] == record.output["bytes"]
        assert "Uploads" not in s3.list_multipart_uploads(Bucket="results")
        return record


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("publish")
    place = Place(folder / "place")
    with running_aws() as aws, running_proxy(aws.endpoint_url) as proxy:
        s3 = aws_client("s3", aws)
        for bucket in ("videos", "results"):
            s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": aws.region})
            s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
        create_table(aws, TABLE)
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("PREFECT_API_URL", raising=False)  # The commands have a server of their own.
            with ensure_api(home=place.folder / "home" / "prefect"):
                save_blocks(replace(aws, endpoint_url=proxy.url))
        yield Site(place, aws, proxy, make_film(folder / "tiny.mp4", 6, "32x32"))
        proxy.clear()
        place.clear_away()


class Moment:
    """A call that is held up, for the test to do something meanwhile.

    Args:
        done: Whether the service does what is asked before the call is held up.
        heard: Whether the client hears of it too.
    """

    def __init__(self, *, done: bool = False, heard: bool = False) -> None:
        self._done, self._heard = done, heard
        self._came, self._over = threading.Event(), threading.Event()

    def __call__(self, exchange: Exchange) -> None:
        answer = exchange.forward() if self._done or self._over.is_set() else None
        if answer is not None and (self._heard or self._over.is_set()):
            exchange.reply(answer)
        self._came.set()
        if answer is None or not self._heard:
            self._over.wait(PATIENCE)
            exchange.reset()

    def wait(self, run: Run) -> None:
        """Wait until the call comes."""
        run.wait_until(self._came.is_set, "the call")

    def let_go(self) -> None:
        """Let it go, and all that follow."""
        self._over.set()


def to_bucket(operation: str, bucket: str) -> Match:
    return lambda call: call.operation == operation and call.path.startswith(f"/{bucket}/")


def that_uploads(call: Call) -> bool:
    """A part of the result, not the byte that finds out whether there could be one."""
    return call.operation == "UploadPart" and "x-amz-checksum-sha256" in call.headers


def that_publishes(call: Call) -> bool:
    return call.operation == "PutItem" and b'"state": {"S": "published"}' in call.body


@pytest.mark.parametrize(
    ("match", "moment", "attempts"),
    [
        ("CompleteMultipartUpload", Moment(), 2),
        ("CompleteMultipartUpload", Moment(done=True), 2),
        (that_publishes, Moment(), 2),
        (that_publishes, Moment(done=True), 1),
        (that_publishes, Moment(done=True, heard=True), 1),
    ],
    ids=["before upload", "after upload", "before record", "after record", "before cleanup"],
)
def test_a_job_killed_while_it_publishes_is_published_once(
    site: Site, match: Match, moment: Moment, attempts: int
) -> None:
    source, name = site.new()
    site.proxy.inject(match, moment)
    run = site.start(source, name)
    moment.wait(run)
    run.kill()
    run.wait_for_orphans(_GONE)
    moment.let_go()
    before = site.versions(name)
    site.proxy.clear()
    finished = site.start(source, name).wait()
    assert finished.code == 0, finished.stderr
    assert bool(finished.record.get("skipped")) == (attempts == 1)
    record = site.check_published(source, name)
    assert record.attempt == attempts
    assert site.versions(name) == before or not before
    # A command that finds the work done does not stage the source, so it removes none: housekeeping does.
    assert site.left_of(record) == (attempts == 1)


@pytest.mark.parametrize("match", [to_bucket("GetObject", "videos"), that_uploads], ids=["stage", "publish"])
def test_a_job_survives_the_death_of_the_worker_that_transfers(site: Site, match: Match) -> None:
    source, name = site.new()
    moment = Moment()
    site.proxy.inject(match, moment)
    run = site.start(source, name)
    moment.wait(run)
    for worker in run.workers("cpu"):
        worker.kill()
    moment.let_go()
    finished = run.wait()
    assert finished.code == 0, finished.stderr
    record = site.check_published(source, name)
    assert (record.attempt, finished.record["frames_out"]) == (1, 6)
    assert not site.left_of(record)


def test_of_two_commands_at_the_same_moment_one_works_and_the_other_is_refused(site: Site) -> None:
    source, name = site.new()
    moment = Moment()
    site.proxy.inject("PutItem", serialised(), LASTING)
    site.proxy.inject(to_bucket("GetObject", "videos"), moment, LASTING)
    twins = [site.start(source, name) for _ in range(2)]
    refused = _first_to_end(twins)
    worked = next(run for run in twins if run is not refused)
    assert worked.is_alive
    moment.let_go()
    told = refused.wait()
    assert told.code == 14
    assert told.record["kind"] == "ledger"
    assert len(told.complaints) == 1
    assert f" process {worked.pid}). Wait for it or cancel it first." in told.complaints[0]
    finished = worked.wait()
    assert finished.code == 0, finished.stderr
    assert site.check_published(source, name).attempt == 1


def _first_to_end(runs: list[Run]) -> Run:
    for _ in runs[0].looks():
        for run in runs:
            if not run.is_alive:
                return run
    return runs[0]


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_stopped_leaves_a_cancelled_record(site: Site, how: signal.Signals, code: int) -> None:
    source, name = site.new()
    moment = Moment()
    site.proxy.inject(to_bucket("GetObject", "videos"), moment, LASTING)
    run = site.start(source, name)
    moment.wait(run)
    if how == signal.SIGINT:
        run.interrupt()
    else:
        os.kill(run.pid, how)
    finished = run.wait(_PROMPT + _GONE)
    moment.let_go()
    assert finished.code == code, finished.stderr
    run.wait_for_orphans(_GONE)
    record = site.record(source)
    assert record is not None
    assert record.error is not None
    assert (record.state, record.error.kind, record.error.phase) == (JobState.CANCELLED, "cancelled", "staging")
    assert site.versions(name) == []
    again = site.start(source, name).wait()
    assert again.code == 0, again.stderr
    assert site.check_published(source, name).attempt == 2
