"""Uploads: a finished file appears at its address whole, checked and only if nobody else put something there.

Until the upload is completed nothing can be seen at the address. Completing it is one conditional step, and what
appeared is then read back. The metadata say which job made the object from which content: so a job that was killed,
or that never heard the answer, sees that its work is done.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
import urllib.parse
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any, Final

from tasks.aws import aws_client
from tasks.errors import DestinationError, ScratchError, SettingsError, StoreError
from tasks.store.address import Address, parse
from tasks.store.digests import feed, new_hash
from tasks.store.errors import code_of, local_errors, typed_errors
from tasks.store.objects import ObjectFacts, etag_is_md5, find, version_of
from tasks.store.parts import PAUSES, Part, Progress, cut, part_size, read_part, side_by_side
from tasks.store.settings import StoreSettings

#: Bytes of a part, if the file is not huge. S3 allows 5 MiB.
PART_BYTES: int = 8 << 20

#: Names of metadata that say what made an object.
JOB_LABEL: Final = "superres-job"
DIGEST_LABEL: Final = "superres-digest"
SHA256_LABEL: Final = "superres-sha256"

#: Bytes that names and values of all metadata of an object may have together.
_METADATA_BYTES: Final = 2048

#: How S3 says that a body did not come as it was sent.
_DAMAGED: Final = {"BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody"}


@dataclass(frozen=True)
class Published:
    """An object that was published and read back."""

    uri: str
    version_id: str
    """Empty where the bucket keeps no versions."""
    etag: str
    digest: str
    """XXH3 (128 bits) of the content."""
    sha256: str
    """SHA-256 of the content, as `sha256sum` prints it."""
    bytes: int


@dataclass(frozen=True)
class _Content:
    """The file that is uploaded."""

    path: Path
    bytes: int
    modified: int
    digest: str
    sha256: str


@dataclass(frozen=True)
class _Upload:
    """A multipart upload that was begun."""

    id: str
    part_bytes: int


def check_destination(settings: StoreSettings, address: Address, overwrite: bool) -> str | None:
    """Refuse an address that could not be published at; one byte is uploaded and thrown away to find out.

    Returns:
        ETag of what lies there and may be replaced, `None` if nothing does. It is for `upload`.

    Raises:
        DestinationError: The bucket is missing, may not be written or read, its key cannot be used, or there is
            something already.
        StoreError: The store cannot be reached.
    """
    there = find(settings, address, DestinationError)
    if there and not overwrite:
        raise DestinationError(f"{address} exists already", "Choose another address, or allow it to be overwritten")
    client, place = aws_client("s3", settings.aws), {"Bucket": address.bucket, "Key": address.key}
    with typed_errors("write", address, DestinationError):
        upload_id = client.create_multipart_upload(**place, **settings.encryption)["UploadId"]
        try:
            # Beginning asks for kms:GenerateDataKey alone, a part for kms:Decrypt too.
            client.upload_part(**place, UploadId=upload_id, PartNumber=1, Body=b"0")
        finally:
            _abort(settings, address, upload_id)
    return there.etag if there else None


def upload(
    settings: StoreSettings,
    source: Path,
    address: Address,
    *,
    job: str,
    metadata: dict[str, str],
    state: Path,
    replaces: str | None = None,
    progress: Progress | None = None,
) -> Published:
    """Publish a file, and read it back. Repeated after a kill, it goes on where it was.

    An error leaves nothing behind: the upload is aborted, an object that reads back differently is removed.

    Args:
        settings: How to reach the store, and how the object is encrypted.
        source: The file.
        address: Where it is published.
        job: Name of the job; an object it made of the same content counts as published.
        metadata: Further metadata of the object. What S3 has no room for is left out, last first.
        state: File of the job that remembers the upload; it is gone when all went well.
        replaces: ETag of what may be replaced, as `check_destination` gave it; `None`: nothing may be there.
        progress: Is told how far it is, in the caller's thread; what it raises ends the upload.

    Raises:
        DestinationError: Something appeared or changed at the address meanwhile, or it may not be written.
        ScratchError: The file cannot be read, or the state not written.
        StoreError: The store cannot be reached, or kept something else.
    """
    content = _read(source)
    facts = find(settings, address, DestinationError)
    if facts is None or not _is_made_by(facts, job, content.digest):
        facts = _Publisher(settings, address, content, job, metadata, state, replaces, progress).publish()
    state.unlink(missing_ok=True)
    _read_back(settings, address, content, facts)
    return _published(address, facts, content.digest, content.sha256)


def unfinished_upload(state: Path) -> tuple[Address, str] | None:
    """The upload that a file of a job remembers, for `abort`: its address and its id."""
    try:
        record = json.loads(state.read_text())
        address = parse(record["uri"])
        return None if address is None else (address, str(record["upload_id"]))
    except (OSError, ValueError, TypeError, KeyError, SettingsError):
        return None


def abort(settings: StoreSettings, address: Address, upload_id: str) -> None:
    """Remove the parts of an upload that nobody will complete; nothing happens if there is none.

    Raises:
        DestinationError: That is not allowed, or there is no such bucket.
        StoreError: The store cannot be reached.
    """
    with typed_errors("abort an upload to", address, DestinationError):
        _abort(settings, address, upload_id)


def published_before(settings: StoreSettings, address: Address, job: str, digest: str) -> Published | None:
    """What lies at an address, if `job` made it of the content with XXH3 `digest`.

    Its content is not read: a job that was killed calls `upload` again, which reads it back and uploads nothing.

    Raises:
        DestinationError: It may not be read, or there is no such bucket.
        StoreError: The store cannot be reached.
    """
    facts = find(settings, address, DestinationError)
    if facts is None or not _is_made_by(facts, job, digest):
        return None
    return _published(address, facts, digest, facts.metadata.get(SHA256_LABEL, ""))


def _published(address: Address, facts: ObjectFacts, digest: str, sha256: str) -> Published:
    return Published(str(address), facts.version_id, facts.etag, digest, sha256, facts.bytes)


def _is_made_by(facts: ObjectFacts, job: str, digest: str) -> bool:
    return facts.metadata.get(JOB_LABEL) == _quote(job) and facts.metadata.get(DIGEST_LABEL) == digest


def _quote(value: str) -> str:
    """`value` as metadata can hold it; other than with percent signs, a header has no reliable encoding."""
    return urllib.parse.quote(value, safe="/:@!$&'()*+,;=-._~")


def _read(source: Path) -> _Content:
    with local_errors("read", source):
        status = source.stat()
        digest, sha256 = new_hash("XXH3"), new_hash("SHA256")
        feed(source, 0, status.st_size, digest, sha256)
    return _Content(source, status.st_size, status.st_mtime_ns, digest.digest().hex(), sha256.digest().hex())


@dataclass(frozen=True)
class _Publisher:
    """Brings one file to one address."""

    settings: StoreSettings
    address: Address
    content: _Content
    job: str
    metadata: dict[str, str]
    state: Path
    replaces: str | None
    progress: Progress | None

    @property
    def _client(self) -> Any:
        return aws_client("s3", self.settings.aws)

    @property
    def _place(self) -> dict[str, str]:
        return {"Bucket": self.address.bucket, "Key": self.address.key}

    def publish(self) -> ObjectFacts:
        with typed_errors("write", self.address, DestinationError):
            upload, listed = self._begun()
            try:
                return self._complete(upload, self._send(upload, listed))
            except BaseException:
                self._forget(upload)
                raise

    def _labels(self) -> dict[str, str]:
        """All metadata, as far as there is room."""
        own = {JOB_LABEL: self.job, DIGEST_LABEL: self.content.digest, SHA256_LABEL: self.content.sha256}
        labels, room = {}, _METADATA_BYTES
        for name, value in (own | self.metadata | own).items():
            quoted = _quote(value)
            room -= len(name) + len(quoted)
            if room < 0:
                break
            labels[name.lower()] = quoted
        return labels

    def _begun(self) -> tuple[_Upload, dict[int, dict[str, Any]]]:
        """The upload that an earlier attempt began, with the parts it has, or a new one."""
        asked = {"uri": str(self.address), "metadata": self._labels(), **self.settings.encryption}
        before = self._load()
        if before:
            upload = _Upload(before.pop("upload_id"), before.pop("part_bytes"))
            if before == asked:
                listed = self._listed(upload)
                if listed is not None:
                    return upload, listed
            elif before["uri"] == asked["uri"]:
                self._forget(upload)  # It would become something else.
        begun = self._client.create_multipart_upload(
            **self._place,
            **self.settings.encryption,
            Metadata=asked["metadata"],
            ContentType=self.address.content_type,
            ChecksumAlgorithm="SHA256",
        )
        upload = _Upload(begun["UploadId"], part_size(self.content.bytes, PART_BYTES))
        try:
            with local_errors("write", self.state):
                partial = self.state.with_name(f"{self.state.name}.partial")
                partial.write_text(json.dumps(asked | {"upload_id": upload.id, "part_bytes": upload.part_bytes}))
                os.replace(partial, self.state)
        except ScratchError:
            self._forget(upload)
            raise
        return upload, {}

    def _load(self) -> dict[str, Any]:
        try:
            state = json.loads(self.state.read_text())
            return state if {"upload_id", "part_bytes", "uri"} <= state.keys() else {}
        except (OSError, ValueError, AttributeError):
            return {}

    def _listed(self, upload: _Upload) -> dict[int, dict[str, Any]] | None:
        """Parts that the store has, by number; `None` if it knows of no such upload."""
        from botocore.exceptions import ClientError

        pages = self._client.get_paginator("list_parts").paginate(**self._place, UploadId=upload.id)
        try:
            return {part["PartNumber"]: part for page in pages for part in page.get("Parts", [])}
        except ClientError as error:
            if code_of(error) != "NoSuchUpload":
                raise
            return None

    def _send(self, upload: _Upload, listed: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
        """Send all parts that are missing; returns what completes the upload."""
        with self.content.path.open("rb") as file:

            def send(part: Part, stop: Event) -> dict[str, Any]:
                body = os.pread(file.fileno(), part.length, part.start)
                return self._send_part(upload, part, body, listed.get(part.number), stop)

            parts, sent = {}, 0
            cuts = cut(self.content.bytes, upload.part_bytes)
            with closing(side_by_side(send, cuts, upload.part_bytes)) as receipts:
                for part, receipt in receipts:
                    parts[part.number] = receipt
                    sent += part.length
                    if self.progress:
                        self.progress(sent, self.content.bytes)
            status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != (self.content.bytes, self.content.modified):
            raise StoreError(f"{self.content.path} changed while it was uploaded", "Start again when it is finished")
        return [parts[number] for number in sorted(parts)]

    def _send_part(
        self, upload: _Upload, part: Part, body: bytes, listed: dict[str, Any] | None, stop: Event
    ) -> dict[str, Any]:
        from botocore.exceptions import ClientError

        checksum = base64.b64encode(hashlib.sha256(body).digest()).decode()
        md5 = hashlib.md5(body, usedforsecurity=False).hexdigest()
        if listed and listed["Size"] == len(body) and (listed.get("ChecksumSHA256") == checksum or _md5(listed) == md5):
            return {"PartNumber": part.number, "ETag": listed["ETag"], "ChecksumSHA256": checksum}
        for pause in (*PAUSES, None):
            try:
                answer = self._client.upload_part(
                    **self._place, UploadId=upload.id, PartNumber=part.number, Body=body, ChecksumSHA256=checksum
                )
                # Compared here too: not every store compares, and what stands between may answer in its place.
                if answer.get("ChecksumSHA256", checksum) == checksum and _md5(answer) in (None, md5):
                    return {"PartNumber": part.number, "ETag": answer["ETag"], "ChecksumSHA256": checksum}
            except ClientError as error:
                if code_of(error) not in _DAMAGED:
                    raise
            if pause is None or stop.wait(pause):
                break
        raise StoreError(
            f"part {part.number} of {self.address} arrives in the store damaged", "Check network, proxy and endpoint"
        )

    def _complete(self, upload: _Upload, parts: list[dict[str, Any]]) -> ObjectFacts:
        from botocore.exceptions import BotoCoreError, ClientError

        condition = {"IfMatch": f'"{self.replaces}"'} if self.replaces else {"IfNoneMatch": "*"}
        try:
            answer = self._client.complete_multipart_upload(
                **self._place,
                **condition,
                UploadId=upload.id,
                MultipartUpload={"Parts": parts},
                MpuObjectSize=self.content.bytes,
            )
        except (ClientError, BotoCoreError) as error:
            code = code_of(error) if isinstance(error, ClientError) else ""
            refused = code in ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey")
            # The answer may have been lost though the work was done, or goes on: huge files take minutes. The call that
            # repeats it is refused then.
            for pause in (0.0,) if refused else (0.0, *PAUSES):
                time.sleep(pause)
                facts = find(self.settings, self.address, DestinationError)
                if facts and _is_made_by(facts, self.job, self.content.digest):
                    return facts
            if refused:
                was = "changed" if self.replaces else "appeared"
                raise DestinationError(
                    f"{self.address} {was} meanwhile", "Look whose it is, and choose another address or start again"
                ) from error
            raise
        return ObjectFacts(self.content.bytes, answer["ETag"].strip('"'), version_of(answer), datetime.now(UTC))

    def _forget(self, upload: _Upload) -> None:
        """Abort the upload. If that fails, the state stays: the next attempt continues it."""
        from botocore.exceptions import BotoCoreError, ClientError

        with suppress(ClientError, BotoCoreError):
            _abort(self.settings, self.address, upload.id)
            self.state.unlink(missing_ok=True)


def _abort(settings: StoreSettings, address: Address, upload_id: str) -> None:
    from botocore.exceptions import ClientError

    try:
        aws_client("s3", settings.aws).abort_multipart_upload(
            Bucket=address.bucket, Key=address.key, UploadId=upload_id
        )
    except ClientError as error:
        if code_of(error) != "NoSuchUpload":  # As when the first answer was lost.
            raise


def _md5(answer: dict[str, Any]) -> str | None:
    """MD5 of a part that an answer tells, `None` if its ETag is something else."""
    etag = str(answer["ETag"]).strip('"')
    return etag if etag_is_md5(answer, etag) else None


def _read_back(settings: StoreSettings, address: Address, content: _Content, facts: ObjectFacts) -> None:
    """Compare what was published with the file; remove it if it differs."""
    size = part_size(content.bytes, PART_BYTES)
    with typed_errors("read", address, DestinationError):
        client = aws_client("s3", settings.aws)
        # First the size: to ask for what lies beyond the end would look as if the object had changed.
        there = client.head_object(Bucket=address.bucket, Key=address.key, **facts.pin)
    same = there["ContentLength"] == content.bytes
    if same and content.bytes:
        with content.path.open("rb") as file:

            def compare(part: Part, stop: Event) -> bool:
                block = read_part(settings, address, facts, part, stop, DestinationError)
                return block == os.pread(file.fileno(), part.length, part.start)

            with closing(side_by_side(compare, cut(content.bytes, size), size)) as results:
                same = all(equal for _, equal in results)
    if same:
        return
    removed = _remove(settings, address, facts)
    raise StoreError(
        f"{address} reads back differently from {content.path}; it was {'removed' if removed else 'NOT removed'}",
        "Check network, proxy and endpoint, and start again"
        if removed
        else f"Remove version {facts.version} of it, and check network, proxy and endpoint",
    )


def _remove(settings: StoreSettings, address: Address, facts: ObjectFacts) -> bool:
    """Remove the version that `facts` describe, nothing else."""
    from botocore.exceptions import BotoCoreError, ClientError

    pin = {"VersionId": facts.version_id} if facts.version_id else facts.pin
    with suppress(ClientError, BotoCoreError):
        aws_client("s3", settings.aws).delete_object(Bucket=address.bucket, Key=address.key, **pin)
        return True
    return False
