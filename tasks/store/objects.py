"""What the store knows about an object, and what names its content."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from tasks.aws import aws_client
from tasks.errors import SourceError, SuperResolutionError
from tasks.store.address import Address
from tasks.store.errors import code_of, typed_errors
from tasks.store.settings import StoreSettings

#: Checksums that are compared, as S3 calls them, best first. Not those of the XXH family, whose byte order S3 leaves
#: open: a good file must not be refused.
ALGORITHMS: Final = ("SHA512", "SHA256", "SHA1", "CRC64NVME", "CRC32C", "CRC32", "MD5")

_MD5: Final = re.compile(r"[0-9a-f]{32}(-\d+)?")


@dataclass(frozen=True)
class Checksum:
    """A checksum that the store keeps with an object."""

    algorithm: str
    """One of `ALGORITHMS`."""
    value: str
    """In Base64."""
    composite: bool
    """Whether it is the checksum of the parts' checksums."""


@dataclass(frozen=True)
class ObjectFacts:
    """One version of an object."""

    bytes: int
    etag: str
    """Without quotation marks."""
    version_id: str
    """Empty where the bucket keeps no versions."""
    last_modified: datetime
    metadata: dict[str, str] = field(default_factory=dict)
    checksum: Checksum | None = None
    etag_is_md5: bool = False
    """Whether the ETag is made of MD5 sums; not so with keys of KMS or of the customer."""

    @property
    def version(self) -> str:
        """What names the content: the version, or the ETag where there are none."""
        return self.version_id or self.etag

    @property
    def parts(self) -> int:
        """Parts it was uploaded in; 0 if it was sent whole."""
        count = self.etag.rpartition("-")[2]
        return int(count) if "-" in self.etag and count.isdigit() else 0

    @property
    def pin(self) -> dict[str, str]:
        """Arguments that make a call concern this very content or fail."""
        return {"IfMatch": f'"{self.etag}"'} | ({"VersionId": self.version_id} if self.version_id else {})


def head(settings: StoreSettings, address: Address, blame: type[SuperResolutionError] = SourceError) -> ObjectFacts:
    """Ask for the newest version of an object.

    Args:
        settings: How to reach the store.
        address: The object.
        blame: Class of the error if it is missing or cannot be read.

    Raises:
        SourceError: It or its bucket is missing, or may not be read.
        StoreError: The store cannot be reached.
    """
    facts = find(settings, address, blame)
    if facts is None:
        raise blame(f"cannot read {address}: there is no such object", "Check the address")
    return facts


def find(settings: StoreSettings, address: Address, blame: type[SuperResolutionError]) -> ObjectFacts | None:
    """As `head`, `None` if there is no such object in its bucket."""
    from botocore.exceptions import ClientError

    client = aws_client("s3", settings.aws)
    with typed_errors("read", address, blame):
        try:
            answer = client.head_object(Bucket=address.bucket, Key=address.key, ChecksumMode="ENABLED")
        except ClientError as error:
            if code_of(error) not in ("404", "NoSuchKey"):
                raise
            answer = None
    if answer is None:
        check_bucket(settings, address.bucket, blame)  # The same answer is given where the bucket is missing.
        return None
    etag = answer["ETag"].strip('"')
    return ObjectFacts(
        bytes=answer["ContentLength"],
        etag=etag,
        version_id=version_of(answer),
        last_modified=answer["LastModified"],
        metadata=answer.get("Metadata", {}),
        checksum=_checksum(answer, "-" in etag),
        etag_is_md5=etag_is_md5(answer, etag) and not address.bucket.endswith("--x-s3"),
    )


def check_bucket(settings: StoreSettings, bucket: str, blame: type[SuperResolutionError]) -> None:
    """Refuse a bucket that is missing. One that may not be asked about counts as there."""
    from botocore.exceptions import ClientError

    with typed_errors("reach", f"s3://{bucket}", blame):
        try:
            aws_client("s3", settings.aws).head_bucket(Bucket=bucket)
        except ClientError as error:
            if code_of(error) in ("404", "NoSuchBucket"):
                raise blame(f"there is no bucket {bucket}", "Check the name, or create it") from error
            if code_of(error) not in ("403", "AccessDenied"):
                raise


def version_of(answer: dict[str, Any]) -> str:
    """Version that an answer names; buckets without versions name none, or `null`."""
    version = str(answer.get("VersionId") or "")
    return "" if version == "null" else version


def etag_is_md5(answer: dict[str, Any], etag: str) -> bool:
    """Whether the ETag in an answer, without quotation marks, is made of MD5 sums."""
    return (
        bool(_MD5.fullmatch(etag))
        and answer.get("ServerSideEncryption") in (None, "AES256")
        and not answer.get("SSECustomerAlgorithm")
    )


def _checksum(answer: dict[str, Any], in_parts: bool) -> Checksum | None:
    for algorithm in ALGORITHMS:
        value, _, parts = str(answer.get(f"Checksum{algorithm}") or "").partition("-")
        if not value:
            continue
        kind = answer.get("ChecksumType")
        if kind or parts or not in_parts or algorithm == "CRC64NVME":
            return Checksum(algorithm, value, composite=bool(parts) or kind == "COMPOSITE")
        if not algorithm.startswith("CRC"):  # Stores that do not tell: only a CRC could be of the whole.
            return Checksum(algorithm, value, composite=True)
    return None
