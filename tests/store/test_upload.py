"""Uploads: what appears is the file, once and whole, or nothing does and nothing is left."""

from __future__ import annotations

import base64
import hashlib
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import DestinationError, ScratchError, StoreError, SuperResolutionError
from tasks.media.encoders import file_digest
from tasks.store.address import Address
from tasks.store.download import download
from tasks.store.objects import head
from tasks.store.parts import MOST_PARTS, cut, part_size
from tasks.store.upload import Published, check_destination, published_before, upload
from tests.fault_proxy import (
    Call,
    Exchange,
    Fault,
    Match,
    garbled_response,
    internal_error,
    passed_on,
    refused,
    reset_after,
    reset_before,
    serialised,
    shortened_response,
    slow_down,
    stalled,
    truncated_request,
    truncated_response,
)
from tests.store.conftest import PART, Store
from tests.waiting import eventually

FAULTS = {
    "internal error": internal_error,
    "slow down": slow_down,
    "reset before": reset_before,
    "reset after": reset_after,
    "truncated request": truncated_request,
    "truncated response": truncated_response,
    "shortened response": shortened_response,
    "stall": stalled(1.3),
}

no_such_upload = refused(404, "NoSuchUpload")
precondition_failed = refused(412, "PreconditionFailed")


def _upload(store: Store, film: Path, address: Address | None = None, **other: Any) -> Published:
    arguments = {"job": "job-1", "metadata": {}, "state": film.parent / "upload.json"} | other
    return upload(store.settings, film, address or store.address(), **arguments)


def _is_clean(store: Store, film: Path) -> bool:
    return store.unfinished() == 0 and [path.name for path in film.parent.iterdir()] == ["film.mp4"]


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, 3 * PART])
def test_files_of_every_size_are_published(
    store: Store, film: Path, content: bytes, size: int, versioned: bool
) -> None:
    if versioned:
        store.keep_versions()
    film.write_bytes(content[:size])
    seen: list[tuple[int, int]] = []
    published = _upload(store, film, progress=lambda *far: seen.append(far))
    assert store.get(store.address()) == content[:size]
    facts = head(store.settings, store.address())
    assert published == Published(
        str(store.address()),
        facts.version_id,
        facts.etag,
        file_digest(film),
        hashlib.sha256(content[:size]).hexdigest(),
        size,
    )
    assert bool(published.version_id) == versioned
    assert seen[-1] == (size, size)
    assert _is_clean(store, film)


def test_an_object_says_where_it_comes_from(store: Store, film: Path) -> None:
    metadata = {
        "superres-source": "s3://archive/Düne  1984.mp4",
        "superres-model": "0" * 64,
        "superres-long": "ä" * 500,
    }
    published = _upload(store, film, metadata=metadata)
    answer = store.client.head_object(Bucket=store.bucket, Key="films/film.mp4")
    assert answer["ContentType"] == "video/mp4"
    assert answer["Metadata"] == {
        "superres-job": "job-1",
        "superres-digest": published.digest,
        "superres-sha256": published.sha256,
        "superres-source": "s3://archive/D%C3%BCne%20%201984.mp4",
        "superres-model": "0" * 64,
    }, "what there is no room for is left out"


def test_a_caller_cannot_take_the_name_of_another_job(store: Store, film: Path) -> None:
    _upload(store, film, metadata={"superres-job": "job-2"})
    assert head(store.settings, store.address()).metadata["superres-job"] == "job-1"


@pytest.mark.parametrize("missing", ["film", "folder"])
def test_files_that_cannot_be_used_leave_nothing_in_the_store(store: Store, film: Path, missing: str) -> None:
    if missing == "film":
        film = film.with_name("missing.mp4")
    with pytest.raises(ScratchError, match="missing"):
        _upload(store, film, state=film.parent / ("missing" if missing == "folder" else ".") / "upload.json")
    assert store.unfinished() == 0
    assert store.get(store.address()) is None


def test_a_key_of_kms_encrypts_it(store: Store, film: Path, content: bytes, tmp_path: Path) -> None:
    store.settings = replace(store.settings, kms_key="alias/films")
    assert check_destination(store.settings, store.address(), overwrite=False) is None
    _upload(store, film)
    answer = store.client.head_object(Bucket=store.bucket, Key="films/film.mp4")
    assert (answer["ServerSideEncryption"], answer["SSEKMSKeyId"]) == ("aws:kms", "alias/films")
    facts = head(store.settings, store.address())
    assert not facts.etag_is_md5
    assert download(store.settings, store.address(), facts, tmp_path / "back.mp4").checked == "sha256"
    assert (tmp_path / "back.mp4").read_bytes() == content


def test_parts_carry_the_checksum_of_what_was_read(store: Store, film: Path, content: bytes) -> None:
    _upload(store, film)
    parts = {call.query["partNumber"]: call for call in store.proxy.calls if call.operation == "UploadPart"}
    assert len(parts) == 5
    for number, part in parts.items():
        start = (int(number) - 1) * PART
        digest = base64.b64encode(hashlib.sha256(content[start : start + PART]).digest()).decode()
        assert part.headers["x-amz-checksum-sha256"] == digest


def test_parts_grow_so_that_there_are_never_too_many() -> None:
    mebibyte = 1 << 20
    for total in (0, 1, 8 * mebibyte, 80_000 * mebibyte, 80_000 * mebibyte + 1, 500 * 10**9, 50 * 10**12):
        size = part_size(total, 8 * mebibyte)
        assert size % mebibyte == 0
        assert -(-total // size) <= MOST_PARTS
        assert size == 8 * mebibyte or -(-total // (size - mebibyte)) > MOST_PARTS, "no larger than need be"
    parts = cut(100, 30)
    assert [(part.number, part.start, part.length) for part in parts] == [
        (1, 0, 30),
        (2, 30, 30),
        (3, 60, 30),
        (4, 90, 10),
    ]


OPERATIONS = {
    "HeadObject": "check",
    "CreateMultipartUpload": "upload",
    "UploadPart": "upload",
    "CompleteMultipartUpload": "upload",
    "GetObject": "upload",
    "AbortMultipartUpload": "check",
    "ListParts": "resume",
    "DeleteObject": "differs",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_call_outlives_every_fault_or_ends_with_a_clean_error(
    store: Store, film: Path, content: bytes, operation: str, fault: str
) -> None:
    address, scene = store.address(), OPERATIONS[operation]
    if scene == "resume":
        _leave_unfinished(store, film)
    if scene == "differs":
        store.proxy.inject("GetObject", garbled_response)
    store.proxy.inject(operation, FAULTS[fault])
    try:
        if scene == "check":
            assert check_destination(store.settings, address, overwrite=False) is None
            assert store.unfinished() <= (fault in ("reset after", "stall")), "one that nobody knows the name of"
        else:
            _upload(store, film)
            assert scene != "differs"
            assert store.get(address) == content
    except SuperResolutionError as error:
        assert scene == "differs" or "truncated" in fault or "shortened" in fault, error
        assert store.get(address) in (None, content), "no wrong object"
        if scene == "differs":
            assert store.get(address) is None
    assert store.proxy.count(operation) >= 1
    assert not (film.parent / "upload.json").exists() or store.unfinished()


def _leave_unfinished(store: Store, film: Path) -> None:
    """An upload with some parts, as one that was killed leaves it behind."""

    class Killed(BaseException):
        pass

    def kill(done: int, total: int) -> None:
        raise Killed

    # Nothing can be aborted, as if there were no time to.
    store.proxy.inject("AbortMultipartUpload", refused(403, "AccessDenied"))
    with pytest.raises(Killed):
        _upload(store, film, progress=kill)
    assert store.unfinished() == 1
    store.proxy.clear()


@pytest.mark.parametrize("keyed", [False, True])
def test_a_proxy_that_truncates_bodies_never_leads_to_a_wrong_object(store: Store, film: Path, keyed: bool) -> None:
    if keyed:  # The ETag tells nothing then, and this store does not compare checksums: what is left is reading back.
        store.settings = replace(store.settings, kms_key="key")
    store.proxy.inject("UploadPart", truncated_request, times=1000)
    with pytest.raises(StoreError, match="reads back differently" if keyed else r"part \d of s3://.* damaged"):
        _upload(store, film)
    assert store.get(store.address()) is None
    assert _is_clean(store, film)


def test_a_store_that_finds_a_part_damaged_gets_it_again(store: Store, film: Path, content: bytes) -> None:
    store.proxy.inject("UploadPart", refused(400, "BadDigest"), times=3)
    _upload(store, film)
    assert store.get(store.address()) == content


@pytest.mark.parametrize("versioned", [False, True])
def test_what_reads_back_differently_is_removed_and_nothing_else(
    store: Store, film: Path, content: bytes, versioned: bool
) -> None:
    if versioned:
        store.keep_versions()
    store.put(b"older")
    older = head(store.settings, store.address())
    store.proxy.inject("GetObject", garbled_response)
    with pytest.raises(StoreError, match=r"reads back differently .*; it was removed\. .* start again"):
        _upload(store, film, replaces=older.etag)
    assert store.get(store.address()) == (b"older" if versioned else None)
    assert _is_clean(store, film)


@pytest.mark.parametrize("versioned", [False, True])
def test_what_replaced_a_wrong_object_is_not_removed_with_it(store: Store, film: Path, versioned: bool) -> None:
    def replaced(exchange: Exchange) -> None:
        store.put(b"somebody else's")
        passed_on(exchange)

    if versioned:
        store.keep_versions()
    store.proxy.inject("GetObject", garbled_response)
    store.proxy.inject("DeleteObject", replaced)
    with pytest.raises(StoreError, match="it was removed" if versioned else "NOT removed"):
        _upload(store, film)
    assert store.get(store.address()) == b"somebody else's"


def test_a_read_back_that_breaks_off_leaves_the_object_for_the_next_attempt(store: Store, film: Path) -> None:
    store.proxy.inject("GetObject", internal_error, times=99)
    with pytest.raises(StoreError, match="failed again and again"):
        _upload(store, film)
    store.proxy.clear()
    _upload(store, film)
    assert store.proxy.count("UploadPart") == 0
    assert store.proxy.count("GetObject") == 5, "it is read back all the same"


def _done_unheard(exchange: Exchange) -> None:
    exchange.forward()
    stalled(1.3)(exchange)


@pytest.mark.parametrize("lost", [reset_after, _done_unheard])
@pytest.mark.parametrize("repeated", [passed_on, no_such_upload, precondition_failed])
def test_an_upload_whose_answer_was_lost_is_known_for_ones_own(
    store: Store, film: Path, content: bytes, lost: Fault, repeated: Fault
) -> None:
    # This store completes an upload twice with the same answer; S3 may say either that it is gone or that it is there.
    store.proxy.inject("CompleteMultipartUpload", lost)
    store.proxy.inject("CompleteMultipartUpload", repeated, times=99)
    published = _upload(store, film)
    assert published.etag == head(store.settings, store.address()).etag
    assert store.get(store.address()) == content
    assert _is_clean(store, film)


def test_somebody_elses_object_is_not_taken_for_ones_own(store: Store, film: Path) -> None:
    _upload(store, film, job="job-2")
    with pytest.raises(DestinationError, match=r"films/film.mp4 appeared meanwhile"):
        _upload(store, film)
    assert published_before(store.settings, store.address(), "job-1", file_digest(film)) is None
    assert published_before(store.settings, store.address(), "job-2", "0" * 32) is None
    assert published_before(store.settings, store.address("other.mp4"), "job-2", file_digest(film)) is None
    assert _is_clean(store, film)


def test_a_job_that_was_killed_after_publishing_knows_it(store: Store, film: Path) -> None:
    store.keep_versions()
    published = _upload(store, film)
    assert published_before(store.settings, store.address(), "job-1", published.digest) == published
    assert _upload(store, film) == published
    assert store.versions(store.address()) == 1


@pytest.mark.parametrize("versioned", [False, True])
def test_of_two_that_publish_at_once_exactly_one_wins(store: Store, film: Path, versioned: bool) -> None:
    # S3 decides such races; this store looks first and writes later, so the proxy lets one call in at a time.
    if versioned:
        store.keep_versions()
    store.proxy.inject("CompleteMultipartUpload", serialised(), times=2)
    ready = threading.Barrier(2)
    contents = {}

    def publish(job: str) -> str:
        path = film.with_name(f"{job}.mp4")
        path.write_bytes(contents.setdefault(job, job.encode() * PART))
        ready.wait()
        try:
            _upload(store, path, job=job, state=film.with_name(f"{job}.json"))
            return job
        except DestinationError as error:
            assert "appeared meanwhile" in str(error)
            return ""

    with ThreadPoolExecutor() as pool:
        winners = [job for job in pool.map(publish, ["one", "two"]) if job]
    assert len(winners) == 1
    assert store.get(store.address()) == contents[winners[0]]
    assert store.versions(store.address()) == 1
    assert store.unfinished() == 0


@pytest.mark.parametrize(("meanwhile", "problem"), [(None, ""), ("changed", "changed meanwhile"), ("gone", "changed")])
def test_only_what_was_there_at_the_check_is_replaced(
    store: Store, film: Path, content: bytes, meanwhile: str | None, problem: str
) -> None:
    def compared(exchange: Exchange) -> None:
        """`If-Match` where an upload is completed: S3 compares, this store does not."""
        there = store.client.list_objects_v2(Bucket=store.bucket).get("Contents", [])
        if not there:
            refused(404, "NoSuchKey")(exchange)
        elif there[0]["ETag"] != exchange.call.headers["if-match"]:
            precondition_failed(exchange)
        else:
            passed_on(exchange)

    address = store.put(b"older")
    with pytest.raises(DestinationError, match=r"exists already.*overwritten"):
        check_destination(store.settings, address, overwrite=False)
    replaces = check_destination(store.settings, address, overwrite=True)
    assert replaces == head(store.settings, address).etag
    if meanwhile == "changed":
        store.put(b"newer")
    elif meanwhile == "gone":
        store.client.delete_object(Bucket=store.bucket, Key=address.key)
    store.proxy.inject("CompleteMultipartUpload", compared, times=9)
    if meanwhile is None:
        _upload(store, film, replaces=replaces)
        assert store.get(address) == content
    else:
        with pytest.raises(DestinationError, match=problem):
            _upload(store, film, replaces=replaces)
        assert store.get(address) == (b"newer" if meanwhile == "changed" else None)
    assert _is_clean(store, film)


def test_without_leave_to_replace_nothing_may_be_there(store: Store, film: Path) -> None:
    _upload(store, film)
    completed = [call for call in store.proxy.calls if call.operation == "CompleteMultipartUpload"]
    assert completed[0].headers["if-none-match"] == "*"


_UPLOAD = """
import sys
from pathlib import Path
from tasks.aws import AwsSettings
from tasks.store import upload
from tasks.store.address import parse
from tasks.store.settings import StoreSettings
endpoint, address, film, part = sys.argv[1:]
upload.PART_BYTES, film = int(part), Path(film)
settings = StoreSettings(AwsSettings("eu-central-1", endpoint))
upload.upload(settings, film, parse(address), job="job-1", metadata={}, state=film.parent / "upload.json")
"""


def _kill_at(store: Store, film: Path, match: Match, fault: Fault, reached: Any) -> None:
    """Run an upload in a process of its own, and kill it when it hangs in a call."""
    store.proxy.inject(match, fault)
    command = [
        sys.executable,
        "-c",
        _UPLOAD,
        store.settings.aws.endpoint_url,
        str(store.address()),
        str(film),
        str(PART),
    ]
    process = subprocess.Popen(command)
    try:
        eventually(reached)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    store.proxy.clear()


def _listed(store: Store) -> int:
    uploads = store.client.list_multipart_uploads(Bucket=store.bucket).get("Uploads", [])
    place = {"Bucket": store.bucket, "Key": "films/film.mp4"}
    return sum(len(store.client.list_parts(**place, UploadId=each["UploadId"]).get("Parts", [])) for each in uploads)


def test_a_killed_upload_goes_on_and_sends_no_finished_part_again(store: Store, film: Path, content: bytes) -> None:
    def second(call: Call) -> bool:
        return call.operation == "UploadPart" and call.query["partNumber"] == "2"

    _kill_at(store, film, second, stalled(30), lambda: _listed(store) == 4)
    _upload(store, film)
    assert store.get(store.address()) == content
    assert [call.query["partNumber"] for call in store.proxy.calls if call.operation == "UploadPart"] == ["2"]
    assert store.proxy.count("CreateMultipartUpload") == 0
    assert _is_clean(store, film)


def test_an_upload_killed_while_it_was_completed_is_done(store: Store, film: Path, content: bytes) -> None:
    def done_unheard(exchange: Exchange) -> None:
        exchange.forward()
        stalled(30)(exchange)

    _kill_at(store, film, "CompleteMultipartUpload", done_unheard, lambda: store.get(store.address()))
    _upload(store, film)
    assert store.get(store.address()) == content
    assert store.proxy.count("UploadPart") == 0
    assert _is_clean(store, film)


def test_an_unfinished_upload_of_something_else_is_thrown_away(store: Store, film: Path, content: bytes) -> None:
    _leave_unfinished(store, film)
    film.write_bytes(content[::-1])
    published = _upload(store, film)
    assert store.get(store.address()) == content[::-1]
    assert head(store.settings, store.address()).metadata["superres-digest"] == published.digest
    assert _is_clean(store, film)


@pytest.mark.parametrize("state", ["", "{}", "[]", "null", "\x00"])
def test_a_damaged_state_begins_anew(store: Store, film: Path, content: bytes, state: str) -> None:
    (film.parent / "upload.json").write_text(state)
    _upload(store, film)
    assert store.get(store.address()) == content


def test_an_upload_that_the_store_forgot_begins_anew(store: Store, film: Path, content: bytes) -> None:
    _leave_unfinished(store, film)
    (unfinished,) = store.client.list_multipart_uploads(Bucket=store.bucket)["Uploads"]
    store.client.abort_multipart_upload(Bucket=store.bucket, Key=unfinished["Key"], UploadId=unfinished["UploadId"])
    _upload(store, film)
    assert store.get(store.address()) == content


def test_a_part_that_was_listed_with_another_content_is_sent_again(store: Store, film: Path, content: bytes) -> None:
    _leave_unfinished(store, film)
    (unfinished,) = store.client.list_multipart_uploads(Bucket=store.bucket)["Uploads"]
    store.client.upload_part(
        Bucket=store.bucket, Key=unfinished["Key"], UploadId=unfinished["UploadId"], PartNumber=2, Body=bytes(PART)
    )
    _upload(store, film)
    assert store.get(store.address()) == content


def test_a_file_that_changes_under_way_is_not_published(store: Store, film: Path, content: bytes) -> None:
    def change(done: int, total: int) -> None:
        with film.open("r+b") as file:
            file.write(b"changed")

    with pytest.raises(StoreError, match="changed while it was uploaded"):
        _upload(store, film, progress=change)
    assert store.get(store.address()) is None
    assert _is_clean(store, film)


def test_a_caller_can_stop_an_upload_and_nothing_is_left(store: Store, film: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _upload(store, film, progress=stop)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("store")]
    assert store.get(store.address()) is None
    assert _is_clean(store, film)


def test_a_destination_that_cannot_be_written_is_refused_before_any_work(store: Store) -> None:
    address = store.address()
    assert check_destination(store.settings, address, overwrite=True) is None
    assert store.unfinished() == 0
    assert store.get(address) is None
    with pytest.raises(DestinationError, match="there is no bucket nowhere-at-all"):
        check_destination(store.settings, replace(address, bucket="nowhere-at-all"), overwrite=False)
    for operation, status, code, message, said in (
        ("HeadObject", 403, "", "", "access is denied"),
        ("CreateMultipartUpload", 403, "AccessDenied", "", "access is denied"),
        ("CreateMultipartUpload", 400, "KMS.DisabledException", "", "KMS key"),
        ("CreateMultipartUpload", 400, "KMS.NotFoundException", "", "KMS key"),
        ("UploadPart", 403, "AccessDenied", "not authorized to perform: kms:Decrypt", "KMS key"),
        ("AbortMultipartUpload", 403, "AccessDenied", "", "s3:AbortMultipartUpload"),
    ):
        store.proxy.inject(operation, refused(status, code, message))
        with pytest.raises(DestinationError, match=said):
            check_destination(store.settings, address, overwrite=False)


def test_no_message_shows_a_secret(store: Store, film: Path) -> None:
    for fault in (refused(403, "SignatureDoesNotMatch", "a-signature"), refused(403, "AccessDenied", "a-signature")):
        store.proxy.inject("UploadPart", fault, times=5)
        with pytest.raises(SuperResolutionError) as caught:
            _upload(store, film)
        assert "a-s" not in str(caught.value)
        store.proxy.clear()
