"""Links for people without credentials: to fetch one result, or to bring one video.

Whoever has a link can use it until it expires, so links are short-lived and never logged. A link also ends with the
credentials that signed it: those of a role may last for less than was asked for.
"""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from tasks.aws import aws_client
from tasks.errors import DestinationError, SettingsError, SourceError
from tasks.store.address import Address
from tasks.store.errors import typed_errors
from tasks.store.settings import StoreSettings

#: Long enough to begin a download; one under way is not cut off.
_LONGEST_DOWNLOAD: Final = 3600

#: Long enough to choose a file and to send it over a slow line.
_LONGEST_TICKET: Final = 12 * 3600

#: What S3 takes in one request.
_LARGEST_POST: Final = 5 << 30


@dataclass(frozen=True)
class Ticket:
    """Permission to bring one object: a form to be posted to `url` with these `fields` first and `file` last."""

    address: Address
    largest_bytes: int
    expires: datetime
    url: str = field(repr=False)
    fields: dict[str, str] = field(repr=False)


def download_url(
    settings: StoreSettings, address: Address, version_id: str, seconds: int = 900, file_name: str | None = None
) -> str:
    """A link to one version of an object.

    Args:
        settings: How to reach the store.
        address: The object.
        version_id: Its version; empty for whatever lies there when the link is used.
        seconds: For which it can be used; an hour at most.
        file_name: Under which browsers save it; its own by default.

    Raises:
        SettingsError: It would be valid for too long.
        StoreError: There are no credentials.
    """
    _check_seconds(seconds, _LONGEST_DOWNLOAD)
    name = file_name or address.name
    plain = "".join(char if char.isascii() and char.isprintable() and char not in '"\\%;' else "_" for char in name)
    asked = {
        "Bucket": address.bucket,
        "Key": address.key,
        "ResponseContentDisposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''"
        + urllib.parse.quote(name, safe=""),
    }
    if version_id:
        asked["VersionId"] = version_id
    with typed_errors("sign a link to", address, SourceError):
        return str(aws_client("s3", settings.aws).generate_presigned_url("get_object", Params=asked, ExpiresIn=seconds))


def upload_ticket(
    settings: StoreSettings, address: Address, *, largest_bytes: int, content_type: str, seconds: int = 3600
) -> Ticket:
    """Let somebody bring an object of at most `largest_bytes`.

    A form and not a link for PUT: S3 itself then holds the size within bounds, where a PUT must know it to the byte
    beforehand. A ticket can be used again until it expires, so give each an address of its own, and go on with the
    version that was found there.

    Raises:
        SettingsError: It would be valid for too long, or allow more than S3 takes at once.
        StoreError: There are no credentials.
    """
    _check_seconds(seconds, _LONGEST_TICKET)
    if not 0 < largest_bytes <= _LARGEST_POST:
        raise SettingsError(
            f"a ticket for {largest_bytes} bytes cannot be made",
            f"Allow 1 to {_LARGEST_POST} bytes; bring larger files with an S3 client",
        )
    if "${" in address.key:
        raise SettingsError(f"a ticket for {address} would let its user choose the name", "Choose a key without ${")
    fields = {"Content-Type": content_type}
    if settings.kms_key:
        fields["x-amz-server-side-encryption"] = "aws:kms"
        fields["x-amz-server-side-encryption-aws-kms-key-id"] = settings.kms_key
    expires = datetime.now(UTC) + timedelta(seconds=seconds)
    with typed_errors("sign a ticket for", address, DestinationError):
        form = aws_client("s3", settings.aws).generate_presigned_post(
            address.bucket,
            address.key,
            Fields=dict(fields),
            Conditions=[*({name: value} for name, value in fields.items()), ["content-length-range", 1, largest_bytes]],
            ExpiresIn=seconds,
        )
    return Ticket(address, largest_bytes, expires, form["url"], form["fields"])


def _check_seconds(seconds: int, longest: int) -> None:
    if not 0 < seconds <= longest:
        raise SettingsError(f"a link cannot be valid for {seconds} s", f"Choose 1 to {longest} s")
