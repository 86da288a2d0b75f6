"""Downloads: the file is what the store has, whatever happens on the way, or there is none."""

from __future__ import annotations

import base64
import hashlib
import os
import signal
import subprocess
import sys
import threading
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

import tasks.aws
from tasks.errors import ScratchError, SourceError, StoreError
from tasks.media.encoders import file_digest
from tasks.store.digests import new_hash
from tasks.store.download import download
from tasks.store.objects import head
from tests.fault_proxy import (
    Exchange,
    Fault,
    garbled_response,
    internal_error,
    passed_on,
    refused,
    reset_after,
    reset_before,
    shortened_response,
    slow_down,
    stalled,
    truncated_response,
)
from tests.store.conftest import PART, Store
from tests.waiting import eventually

LEFTOVERS = ("film.mp4.download", "film.mp4.parts")


def _is_clean(folder: Path) -> bool:
    return not any((folder / name).exists() for name in LEFTOVERS)


def _base64(algorithm: str, content: bytes) -> str:
    digest = new_hash(algorithm)
    digest.update(content)
    return base64.b64encode(digest.digest()).decode()


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 3 * PART])
def test_files_of_every_size_arrive(store: Store, tmp_path: Path, content: bytes, size: int) -> None:
    address = store.put(content[:size])
    facts = head(store.settings, address)
    assert (facts.bytes, facts.version_id, facts.version) == (size, "", facts.etag)
    seen: list[tuple[int, int]] = []
    done = download(store.settings, address, facts, tmp_path / "film.mp4", lambda *far: seen.append(far))
    assert (tmp_path / "film.mp4").read_bytes() == content[:size]
    assert done.digest == file_digest(tmp_path / "film.mp4")
    assert seen[-1] == (size, size)
    assert _is_clean(tmp_path)


@pytest.mark.parametrize(
    ("algorithm", "encrypted", "checked"),
    [
        ("SHA256", True, "sha256"),
        ("SHA1", True, "sha1"),
        ("CRC32", True, "crc32"),
        ("CRC32C", True, "crc32c"),
        ("CRC64NVME", True, "crc64nvme"),
        ("CRC64NVME", False, "md5"),
    ],
)
def test_the_best_that_the_store_knows_is_checked(
    store: Store, tmp_path: Path, content: bytes, algorithm: str, encrypted: bool, checked: str
) -> None:
    asked = {"ChecksumAlgorithm": algorithm}  # This store keeps checksums only of those who name it too.
    if encrypted:
        asked |= {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "key"}
    address = store.put(content, **{f"Checksum{algorithm}": _base64(algorithm, content)}, **asked)
    facts = head(store.settings, address)
    assert facts.etag_is_md5 is not encrypted
    assert download(store.settings, address, facts, tmp_path / "film.mp4").checked == checked
    wrong = store.put(content, "wrong.mp4", **{f"Checksum{algorithm}": _base64(algorithm, b"")}, **asked)
    if encrypted:  # This store keeps what it was told; had it looked, a damaged object would look like this.
        with pytest.raises(StoreError, match=f"differs from its {algorithm}"):
            download(store.settings, wrong, head(store.settings, wrong), tmp_path / "wrong.mp4")
        assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]


def test_with_a_key_of_kms_and_no_checksum_only_the_size_is_checked(store: Store, tmp_path: Path) -> None:
    address = store.put(b"content")
    facts = replace(head(store.settings, address), checksum=None, etag_is_md5=False)
    assert download(store.settings, address, facts, tmp_path / "film.mp4").checked == "size"


def _put_in_parts(store: Store, content: bytes, sizes: list[int], **create: str) -> None:
    place = {"Bucket": store.bucket, "Key": "films/film.mp4"}
    upload_id = store.client.create_multipart_upload(**place, **create)["UploadId"]
    parts, start = [], 0
    for number, size in enumerate(sizes, start=1):
        body = content[start : start + size]
        start += size
        etag = store.client.upload_part(**place, UploadId=upload_id, PartNumber=number, Body=body)["ETag"]
        parts.append({"PartNumber": number, "ETag": etag})
    store.client.complete_multipart_upload(**place, UploadId=upload_id, MultipartUpload={"Parts": parts})


@pytest.mark.parametrize(
    ("create", "checked"),
    [({}, "md5"), ({"ChecksumAlgorithm": "SHA256"}, "sha256"), ({"ChecksumAlgorithm": "CRC32"}, "md5")],
)
def test_checksums_of_checksums_of_parts_are_checked(
    store: Store, tmp_path: Path, content: bytes, create: dict[str, str], checked: str
) -> None:
    # Of a CRC in several parts, this store does not say of what it is, as others do.
    _put_in_parts(store, content, [100_000, 100_000, len(content) - 200_000], **create)
    facts = head(store.settings, store.address())
    assert facts.parts == 3
    assert download(store.settings, store.address(), facts, tmp_path / "film.mp4").checked == checked
    store.proxy.inject("GetObject", garbled_response)
    with pytest.raises(StoreError, match="differs from its"):
        download(store.settings, store.address(), facts, tmp_path / "again.mp4")


def test_parts_of_different_sizes_are_not_mistaken_for_damage(store: Store, tmp_path: Path, content: bytes) -> None:
    _put_in_parts(store, content, [1000, 100_000, len(content) - 101_000])
    facts = head(store.settings, store.address())
    assert download(store.settings, store.address(), facts, tmp_path / "film.mp4").checked == "size"


@pytest.mark.parametrize(
    "fault",
    [
        *(internal_error, slow_down, refused(503, "ServiceUnavailable"), reset_before, reset_after),
        *(truncated_response, shortened_response, stalled(1.3)),
    ],
)
def test_a_part_that_breaks_off_is_continued(store: Store, tmp_path: Path, content: bytes, fault: Fault) -> None:
    address = store.put(content)
    facts = head(store.settings, address)
    store.proxy.inject("GetObject", fault, times=2)
    download(store.settings, address, facts, tmp_path / "film.mp4")
    assert (tmp_path / "film.mp4").read_bytes() == content
    assert store.proxy.count("GetObject") == 5 + 2


@pytest.mark.parametrize("fault", [internal_error, reset_after, truncated_response, shortened_response, stalled(1.3)])
@pytest.mark.parametrize("operation", ["HeadObject", "HeadBucket"])
def test_asking_for_an_object_outlives_faults(store: Store, operation: str, fault: Fault) -> None:
    address = store.address("missing.mp4") if operation == "HeadBucket" else store.put(b"content")
    store.proxy.inject(operation, fault)
    if operation == "HeadBucket":
        with pytest.raises(SourceError, match="no such object"):
            head(store.settings, address)
    else:
        assert head(store.settings, address).bytes == 7


def test_a_store_that_stays_away_is_an_error_and_the_download_goes_on_later(
    store: Store, tmp_path: Path, content: bytes
) -> None:
    address = store.put(content)
    facts = head(store.settings, address)
    target = tmp_path / "film.mp4"
    store.proxy.inject(lambda call: call.headers.get("range", "").startswith(f"bytes={PART}-"), slow_down, times=99)
    with pytest.raises(StoreError, match=r"cannot read s3://.* too busy .*Try again later"):
        download(store.settings, address, facts, target)
    assert not target.exists()
    store.proxy.clear()
    download(store.settings, address, facts, target)
    assert target.read_bytes() == content
    assert store.proxy.count("GetObject") < 5, "finished parts are not read again"
    assert _is_clean(tmp_path)


def test_a_body_that_never_comes_is_an_error(store: Store, tmp_path: Path, content: bytes) -> None:
    def empty(exchange: Exchange) -> None:
        answer = exchange.forward()
        exchange.reply(replace(answer, body=b""))

    address = store.put(content)
    facts = head(store.settings, address)
    store.proxy.inject("GetObject", empty, times=1000)
    with pytest.raises(StoreError, match=r"did not come .the answer was too short"):
        download(store.settings, address, facts, tmp_path / "film.mp4")


def test_a_wrong_body_is_found_and_nothing_is_kept_of_it(store: Store, tmp_path: Path, content: bytes) -> None:
    address = store.put(content)
    facts = head(store.settings, address)
    store.proxy.inject("GetObject", garbled_response)
    with pytest.raises(StoreError, match="differs from its CRC32"):
        download(store.settings, address, facts, tmp_path / "film.mp4")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_body_that_says_so_is_asked_for_again(store: Store, tmp_path: Path, content: bytes) -> None:
    # Of a whole object at once, this store tells the checksum, and the client compares.
    address = store.put(content[:PART])
    store.proxy.inject("GetObject", garbled_response)
    download(store.settings, address, head(store.settings, address), tmp_path / "film.mp4")
    assert (tmp_path / "film.mp4").read_bytes() == content[:PART]
    assert store.proxy.count("GetObject") == 2


def test_a_store_that_ignores_ranges_and_conditions_is_not_believed(
    store: Store, tmp_path: Path, content: bytes
) -> None:
    def whole(exchange: Exchange) -> None:
        for name in ("range", "if-match"):
            exchange.call.headers.pop(name)
        passed_on(exchange)

    address = store.put(content)
    facts = head(store.settings, address)
    store.proxy.inject("GetObject", whole, times=1000)
    with pytest.raises(StoreError, match="another part than asked for"):
        download(store.settings, address, facts, tmp_path / "film.mp4")
    with pytest.raises(StoreError, match="another version"):
        download(store.settings, address, replace(facts, etag="0" * 32), tmp_path / "film.mp4")


@pytest.mark.parametrize("versioned", [False, True])
def test_a_source_that_changes_under_way_is_refused_unless_its_version_is_kept(
    store: Store, tmp_path: Path, content: bytes, versioned: bool
) -> None:
    if versioned:
        store.keep_versions()
    address = store.put(content)
    facts = head(store.settings, address)
    assert bool(facts.version_id) == versioned

    def overwrite(done: int, total: int) -> None:
        if not overwritten:
            overwritten.append(store.put(bytes(len(content))))

    overwritten: list[object] = []
    # What is asked for after the first part must wait for it: else all could be read before the object changes.
    first = threading.Event()

    def after_the_first(exchange: Exchange) -> None:
        if not exchange.call.headers["range"].startswith("bytes=0-"):
            first.wait(10)
        passed_on(exchange)

    def progress(done: int, total: int) -> None:
        overwrite(done, total)
        first.set()

    store.proxy.inject("GetObject", after_the_first, times=5)
    if versioned:
        download(store.settings, address, facts, tmp_path / "film.mp4", progress)
        assert (tmp_path / "film.mp4").read_bytes() == content
    else:
        with pytest.raises(SourceError, match="changed meanwhile"):
            download(store.settings, address, facts, tmp_path / "film.mp4", progress)
        assert list(tmp_path.iterdir()) == []


def test_what_is_missing_or_denied_is_named(store: Store, tmp_path: Path) -> None:
    missing = store.address("missing.mp4")
    with pytest.raises(SourceError, match=r"films?|missing.mp4: there is no such object"):
        head(store.settings, missing)
    with pytest.raises(SourceError, match="there is no bucket nowhere-at-all"):
        head(store.settings, replace(missing, bucket="nowhere-at-all"))
    address = store.put(b"content")
    facts = head(store.settings, address)
    store.proxy.inject("HeadObject", refused(403, ""))
    with pytest.raises(SourceError, match=r"denied.*s3:ListBucket"):
        head(store.settings, address)
    for status, code, message, error, said in (
        (403, "AccessDenied", "", SourceError, "access is denied"),
        (403, "AccessDenied", "not authorized to perform: kms:Decrypt", SourceError, "encryption key"),
        (400, "KMS.DisabledException", "", SourceError, "encryption key"),
        (403, "InvalidObjectState", "", SourceError, "archived"),
        (404, "NoSuchKey", "", SourceError, "no such object"),
        (403, "SignatureDoesNotMatch", "", StoreError, "credentials"),
        (400, "ExpiredToken", "", StoreError, "credentials"),
        (400, "Strange", "", StoreError, "Strange"),
    ):
        store.proxy.inject("GetObject", refused(status, code, message))
        with pytest.raises(error, match=said) as caught:
            download(store.settings, address, facts, tmp_path / "film.mp4")
        assert str(address) in str(caught.value)


def test_a_store_that_cannot_be_reached_or_entered_is_named(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tasks.aws, "_ATTEMPTS", 1)
    nowhere = replace(store.settings, aws=replace(store.settings.aws, endpoint_url="http://127.0.0.1:9"))
    with pytest.raises(StoreError, match="cannot be reached"):
        head(nowhere, store.address())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    with pytest.raises(StoreError, match="there are no credentials"):
        head(replace(nowhere, aws=replace(nowhere.aws, region="us-west-2")), store.address())


def test_there_must_be_room_for_it(store: Store, tmp_path: Path) -> None:
    address = store.put(b"content")
    facts = replace(head(store.settings, address), bytes=1 << 60)
    with pytest.raises(ScratchError, match=r"no room for s3://.* GB are needed"):
        download(store.settings, address, facts, tmp_path / "film.mp4")
    with pytest.raises(ScratchError, match="cannot write"):
        download(store.settings, address, head(store.settings, address), tmp_path / "missing" / "film.mp4")


def test_a_caller_can_stop_a_download_and_no_thread_is_left(store: Store, tmp_path: Path, content: bytes) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    address = store.put(content)
    facts = head(store.settings, address)
    with pytest.raises(KeyboardInterrupt):
        download(store.settings, address, facts, tmp_path / "film.mp4", stop)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("store")]
    assert not (tmp_path / "film.mp4").exists()


_DOWNLOAD = """
import sys
from pathlib import Path
from tasks.aws import AwsSettings
from tasks.store import download
from tasks.store.address import parse
from tasks.store.objects import head
from tasks.store.settings import StoreSettings
endpoint, address, target, part = sys.argv[1:]
download.PART_BYTES = int(part)
settings, address = StoreSettings(AwsSettings("eu-central-1", endpoint)), parse(address)
download.download(settings, address, head(settings, address), Path(target))
"""


def test_a_killed_download_goes_on_and_reads_no_finished_part_again(
    store: Store, tmp_path: Path, content: bytes
) -> None:
    address = store.put(content)
    target = tmp_path / "film.mp4"
    last = f"bytes={4 * PART}-"
    store.proxy.inject(lambda call: call.headers.get("range", "").startswith(last), stalled(30))
    command = [sys.executable, "-c", _DOWNLOAD, store.settings.aws.endpoint_url, str(address), str(target), str(PART)]
    process = subprocess.Popen(command)
    try:
        eventually(lambda: _lines(tmp_path / "film.mp4.parts") == 5)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not target.exists()
    with (tmp_path / "film.mp4.download").open("r+b") as file:  # As a crash of the machine could leave it.
        os.pwrite(file.fileno(), b"damage", 2 * PART)
    store.proxy.clear()
    seen: list[int] = []
    download(store.settings, address, head(store.settings, address), target, lambda done, total: seen.append(done))
    assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(content).digest()
    ranges = sorted(call.headers["range"] for call in store.proxy.calls if call.operation == "GetObject")
    assert ranges == [f"bytes={2 * PART}-{3 * PART - 1}", f"{last}{len(content) - 1}"]
    assert seen[0] > 3 * PART, "what was there counts"


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_nothing_is_continued_of_another_version(store: Store, tmp_path: Path, content: bytes) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    address = store.put(content)
    with pytest.raises(KeyboardInterrupt):
        download(store.settings, address, head(store.settings, address), tmp_path / "film.mp4", stop)
    store.put(content[::-1])
    download(store.settings, address, head(store.settings, address), tmp_path / "film.mp4")
    assert (tmp_path / "film.mp4").read_bytes() == content[::-1]


def test_nothing_is_continued_of_a_damaged_record(store: Store, tmp_path: Path, content: bytes) -> None:
    address = store.put(content)
    (tmp_path / "film.mp4.download").write_bytes(bytes(len(content)))
    for record in ("", "x", '["s3://other"]\n1 00\n', "\x00\n1\n"):
        (tmp_path / "film.mp4.parts").write_text(record)
        download(store.settings, address, head(store.settings, address), tmp_path / "film.mp4")
        assert zlib.crc32((tmp_path / "film.mp4").read_bytes()) == zlib.crc32(content)
