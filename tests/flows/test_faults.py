"""Whole jobs while AWS fails: short faults are outlived, lasting ones end in a record that says so.

Whatever fails, nothing partial or wrong is ever seen at the destination, and the same job ends right once the fault is
over. The faults are those of `tests.fault_proxy`; calls are hit at moments that chance chooses, `CHAOS_SEED` repeats
them.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest

from tasks import track
from tasks.errors import FrameError, LedgerError, SuperResolutionError
from tasks.ledger.record import JobRecord, JobState
from tests.fault_proxy import (
    Call,
    Exchange,
    Fault,
    FaultProxy,
    Match,
    garbled_response,
    internal_error,
    passed_on,
    refused,
    reset_after,
    reset_before,
    running_proxy,
    shortened_response,
    slow_down,
    stalled,
    throttled,
    truncated_request,
    truncated_response,
)
from tests.flows.clouds import Cloud, hurry, hurry_workers, running_cloud, save_blocks
from tests.flows.jobs import make_film
from tests.flows.test_end_to_end import scratched_in_the_middle

pytestmark = pytest.mark.chaos

#: More calls than any job makes.
LASTING: Final = 10**6

#: Seconds that an answer does not come: longer than clients wait.
STALL: Final = 30.0

#: Calls of S3 that a job makes.
STORE: Final = (
    "HeadObject",
    "HeadBucket",
    "CreateMultipartUpload",
    "UploadPart",
    "AbortMultipartUpload",
    "GetObject",
    "CompleteMultipartUpload",
)


@dataclass
class Place:
    """A cloud behind a proxy, and what an undisturbed job makes of the film there."""

    cloud: Cloud
    proxy: FaultProxy
    film: Path
    calls: Counter[str]
    """Those of an undisturbed job."""
    whole: bytes
    """Its result."""
    seconds: float
    """How long it took."""
    jobs: int = 0

    def new(self) -> tuple[str, str]:
        """A video of its own, and the name of its result."""
        self.jobs += 1
        self.proxy.clear()
        return self.cloud.put(f"film-{self.jobs}.mp4", self.film), f"film-{self.jobs}.mp4"

    def record(self, source: str) -> JobRecord | None:
        """The record of the job on a video."""
        found = [record for record in self.cloud.ledger.by_owner("ann") if record.source == source]
        assert len(found) <= 1
        return found[0] if found else None

    def versions(self, name: str) -> list[bytes]:
        """All that was ever seen at a destination."""
        return [
            self.cloud.s3.get_object(Bucket="results", Key=name, VersionId=version)["Body"].read()
            for version in self.cloud.versions(name)
        ]

    def check_published(self, source: str, name: str, result: dict[str, Any], *, lost: int = 0) -> JobRecord:
        """Check that a job ended right and left nothing behind.

        Args:
            source: The video.
            name: Of the result.
            result: What the flow returned.
            lost: Uploads that were begun without anybody hearing their ids.
        """
        record = self.record(source)
        assert record is not None
        assert record.error is None
        assert (record.state, record.result) == (JobState.PUBLISHED, result)
        assert self.versions(name) == [self.whole]
        assert record.output is not None
        assert record.output["version_id"] == self.cloud.versions(name)[0]
        assert self.left_in_scratch() == []
        assert self.unfinished(name) <= lost
        return record

    def unfinished(self, name: str) -> int:
        """Uploads to a destination that were begun and neither completed nor aborted."""
        return sum(upload["Key"] == name for upload in self.cloud.unfinished_uploads())

    def check_again(self, source: str, name: str, *, lost: int = 0) -> JobRecord:
        """Check that the job ends right now that nothing fails."""
        self.proxy.clear()
        result = self.cloud.upscale(source, name)
        assert "skipped" not in result
        return self.check_published(source, name, result, lost=lost)

    def left_in_scratch(self) -> list[Path]:
        return [path for path in (self.cloud.folder / "scratch").rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch, running_cloud(folder) as cloud:
        hurry(patch.setattr)
        patch.setattr(track, "_AGAIN_SECONDS", 0.2)
        patch.setattr(track, "_LAST_SECONDS", 2.0)
        with running_proxy(cloud.aws.endpoint_url) as proxy:
            save_blocks(replace(cloud.aws, endpoint_url=proxy.url))
            film = make_film(folder / "tiny.mp4", 6, "32x32")
            cloud.upscale(cloud.put("first.mp4", film), "first.mp4")
            hurry_workers()
            place = Place(cloud, proxy, film, Counter(), b"", 0.0)
            source, name = place.new()
            began = time.monotonic()
            result = cloud.upscale(source, name)
            place.seconds = time.monotonic() - began
            place.calls = Counter(call.operation for call in proxy.calls)
            (place.whole,) = place.versions(name)
            place.check_published(source, name, result)
            yield place
            proxy.clear()


def later(operation: str, skipped: int) -> Match:
    """The calls of an operation after the first ones."""
    seen = Counter[str]()

    def match(call: Call) -> bool:
        if call.operation != operation:
            return False
        seen[operation] += 1
        return seen[operation] > skipped

    return match


def test_a_job_makes_these_calls_and_reads_nothing_from_the_ledger(place: Place) -> None:
    assert set(place.calls) == {*STORE, "PutItem", "PutMetricData"}


@pytest.mark.parametrize(
    "fault",
    [
        internal_error,
        slow_down,
        throttled,
        reset_before,
        reset_after,
        truncated_response,
        stalled(STALL),
    ],
    ids=["500", "503", "throttled", "reset before", "reset after", "truncated", "stalled"],
)
def test_a_short_fault_of_each_call_is_outlived(place: Place, chance: Random, fault: Fault) -> None:
    source, name = place.new()
    for operation, count in place.calls.items():
        hit = refused(503, "ThrottlingException") if fault is throttled and operation in STORE else fault
        place.proxy.inject(later(operation, chance.randrange(count)), hit)
    result = place.cloud.upscale(source, name)
    # The store began an upload, the client does not know and begins another: a rule of the bucket removes the first.
    place.check_published(source, name, result, lost=int(fault in (reset_after, truncated_response)))


@pytest.mark.parametrize("operation", [*STORE, "PutItem"])
def test_no_spoilt_body_becomes_a_wrong_result(place: Place, chance: Random, operation: str) -> None:
    source, name = place.new()
    fault = chance.choice([truncated_request, shortened_response, garbled_response])
    print(fault)
    place.proxy.inject(later(operation, chance.randrange(place.calls[operation])), fault)
    lost = int(operation == "CreateMultipartUpload" and fault is not truncated_request)
    try:
        result = place.cloud.upscale(source, name)
    except SuperResolutionError:
        record = place.record(source)
        assert record is None or record.state == JobState.FAILED
        assert place.versions(name) in ([], [place.whole])
        place.check_again(source, name, lost=lost)
    else:
        place.check_published(source, name, result, lost=lost)


@pytest.mark.parametrize(
    ("operation", "skipped", "fault", "phase"),
    [
        ("HeadObject", 1, internal_error, "staging"),
        ("HeadBucket", 0, reset_before, "staging"),
        ("CreateMultipartUpload", 0, slow_down, "staging"),
        ("UploadPart", 1, stalled(STALL), "staging"),
        ("GetObject", 0, truncated_response, "stage"),
        ("HeadObject", 3, slow_down, "publish"),
        ("CreateMultipartUpload", 3, internal_error, "publish"),
        ("UploadPart", 3, reset_before, "publish"),
        ("CompleteMultipartUpload", 0, internal_error, "publish"),
        ("GetObject", 1, garbled_response, "publish"),
    ],
)
def test_a_lasting_fault_of_the_store_fails_the_job_with_the_reason(
    place: Place, operation: str, skipped: int, fault: Fault, phase: str
) -> None:
    source, name = place.new()
    place.proxy.inject(later(operation, skipped), fault, LASTING)
    with pytest.raises(SuperResolutionError) as failure:
        place.cloud.upscale(source, name)
    record = place.record(source)
    assert record is not None
    assert record.error is not None
    assert (record.state, record.error.phase, record.error.kind) == (JobState.FAILED, phase, "store")
    assert record.error.message == str(failure.value)
    assert record.error.node
    assert place.versions(name) in ([], [place.whole])
    assert place.unfinished(name) == 0
    assert place.check_again(source, name).attempt == 2


def test_a_frame_that_cannot_be_decoded_is_named_with_its_place(place: Place, tmp_path: Path) -> None:
    damage = scratched_in_the_middle(place.cloud.film, tmp_path)
    source = place.cloud.put("scratched.mp4", damage.path)
    with pytest.raises(FrameError):
        place.cloud.upscale(source, "scratched.mp4", scratch=str(tmp_path / "scratch"))
    record = place.record(source)
    assert record is not None
    assert record.error is not None
    assert (record.state, record.error.phase, record.error.kind) == (JobState.FAILED, "extract", "frame")
    assert record.error.first_frame == record.error.last_frame == damage.first
    assert record.error.node
    assert place.versions("scratched.mp4") == []


def test_a_store_that_is_away_from_the_beginning_fails_the_job_with_the_reason(place: Place) -> None:
    source, name = place.new()
    place.proxy.inject(lambda call: "x-amz-target" not in call.headers, reset_before, LASTING)
    with pytest.raises(SuperResolutionError):
        place.cloud.upscale(source, name)
    record = place.record(source)
    assert record is not None
    assert record.error is not None
    assert (record.state, record.error.kind) == (JobState.FAILED, "store")


def test_a_result_whose_upload_was_answered_by_silence_is_published_once(place: Place) -> None:
    source, name = place.new()
    place.proxy.inject("CompleteMultipartUpload", reset_after, LASTING)
    place.check_published(source, name, place.cloud.upscale(source, name))


def test_a_ledger_that_is_away_from_the_beginning_fails_the_job_before_any_work(place: Place) -> None:
    source, name = place.new()
    place.proxy.inject("PutItem", internal_error, LASTING)
    with pytest.raises(LedgerError, match="table superres-jobs of DynamoDB, failed a call of PutItem"):
        place.cloud.upscale(source, name)
    assert place.record(source) is None
    assert place.proxy.count("GetObject") == place.proxy.count("CreateMultipartUpload") == 0
    place.check_again(source, name)


def test_a_ledger_that_is_away_at_the_end_fails_the_job_and_the_next_run_ends_right(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, name = place.new()
    place.proxy.inject(later("PutItem", 2), reset_before, LASTING)
    with pytest.raises(LedgerError, match="cannot be reached") as failure:
        place.cloud.upscale(source, name)
    record = place.record(source)
    assert record is not None
    assert not record.ended
    assert any(f"record of job {record.job_id} could not be ended" in note for note in failure.value.__notes__)
    assert place.versions(name) == [place.whole]
    monkeypatch.setattr("tasks.ledger.ledger.is_gone", lambda holder: holder == record.holder)
    again = place.check_again(source, name)
    assert (again.attempt, [step.state for step in again.history if step.attempt == 2][-1]) == (2, JobState.PUBLISHED)
    assert place.proxy.count("CompleteMultipartUpload") == 0


def test_a_ledger_that_cannot_be_read_and_metrics_that_hang_fail_and_slow_nothing(place: Place) -> None:
    source, name = place.new()
    for operation in ("GetItem", "Query"):
        place.proxy.inject(operation, stalled(STALL), LASTING)
    place.proxy.inject("PutMetricData", stalled(STALL), LASTING)
    began = time.monotonic()
    result = place.cloud.upscale(source, name)
    took = time.monotonic() - began
    print(f"{took:.1f} s, {place.seconds:.1f} s undisturbed")
    assert place.proxy.count("PutMetricData")
    # Clients of metrics give up after two seconds, once at the end.
    assert took < place.seconds + 6
    place.check_published(source, name, result)
    assert place.cloud.upscale(source, name)["skipped"]


def test_a_ledger_that_takes_its_time_does_not_hold_the_chunks_up(place: Place) -> None:
    source, name = place.new()
    published = threading.Event()
    early = []

    def held_up(exchange: Exchange) -> None:
        if not published.wait(STALL):
            early.append(exchange.call)
        passed_on(exchange)

    def seen(exchange: Exchange) -> None:
        passed_on(exchange)
        published.set()

    place.proxy.inject("CompleteMultipartUpload", seen)
    place.proxy.inject(later("PutItem", 1), held_up, LASTING)
    record = place.check_published(source, name, place.cloud.upscale(source, name))
    assert early == []
    assert [step.state for step in record.history] == list(JobState)[:7]
