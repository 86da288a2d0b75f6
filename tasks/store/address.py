"""Where a video lies: a path of this machine, or an object named as `s3://bucket/key`."""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from tasks.errors import SettingsError

#: S3's limit, in bytes of UTF-8.
_LONGEST_KEY: Final = 1024

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET: Final = re.compile(r"(?!\d+\.\d+\.\d+\.\d+$)(?!.*\.\.)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")

#: What browsers and players are told an object is. Not from `mimetypes`, which answers differently on every machine.
_CONTENT_TYPES: Final = {
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".mov": "video/quicktime",
    ".mkv": "video/x-matroska",
    ".webm": "video/webm",
    ".avi": "video/x-msvideo",
    ".ts": "video/mp2t",
    ".mts": "video/mp2t",
    ".m2ts": "video/mp2t",
    ".mpg": "video/mpeg",
    ".mpeg": "video/mpeg",
    ".mxf": "application/mxf",
}


@dataclass(frozen=True)
class Address:
    """An object of S3; `str()` gives it as a URI."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    @property
    def name(self) -> str:
        """What follows the last slash."""
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """Ending of the name with its dot, in lower case."""
        return PurePosixPath(self.name).suffix.lower()

    @property
    def content_type(self) -> str:
        return _CONTENT_TYPES.get(self.suffix, "application/octet-stream")


def parse(text: str) -> Address | None:
    """The object that `text` names, `None` if it names a local path.

    Raises:
        SettingsError: It is of another scheme, or no object can be called so.
    """
    scheme = scheme_of(text)
    if scheme in ("", "file"):
        return None
    bucket, key = split(text)
    parts = key.split("/")
    if not parts[-1]:
        raise SettingsError(f"{text!r} names no object", "Give a whole key, as in s3://bucket/folder/film.mp4")
    if "." in parts or ".." in parts:
        raise SettingsError(f"{text!r} has a part that is only dots", "Give the key without it")
    return Address(bucket, key)


def split(text: str) -> tuple[str, str]:
    """Bucket and key, or beginning of keys, of an `s3://` URI.

    Raises:
        SettingsError: It is of another scheme, or they break the rules of S3.
    """
    if scheme_of(text) != "s3":
        raise SettingsError(f"{text!r} is of no known kind", "Give a path, file:///path or s3://bucket/key")
    bucket, _, key = text.partition("://")[2].partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise SettingsError(
            f"{text!r} names a bucket that cannot exist",
            "Bucket names have 3 to 63 lower-case letters, digits, dots and hyphens",
        )
    try:
        length = len(key.encode())
    except UnicodeEncodeError as error:
        raise SettingsError(f"the key of {text!r} is not valid text", "Rename the object") from error
    if length > _LONGEST_KEY or _CONTROL.search(key):
        raise SettingsError(
            f"the key of {text!r} is too long or has control characters", f"Use at most {_LONGEST_KEY} printable bytes"
        )
    return bucket, key


def local_path(text: str) -> Path:
    """The path that `text` names, as such or as a `file://` URI.

    Raises:
        SettingsError: The URI names another machine.
    """
    if scheme_of(text) != "file":
        return Path(text).expanduser()
    host, _, path = text.partition("://")[2].partition("/")
    if host not in ("", "localhost"):
        raise SettingsError(f"{text!r} lies on another machine", "Give file:///path of this one")
    return Path("/" + urllib.parse.unquote(path))


def uri_of(text: str) -> str:
    """The one spelling of a name: an `s3://` URI, or an absolute path without links.

    Raises:
        SettingsError: It is a URI of another scheme, or no possible one.
    """
    address = parse(text)
    return str(address) if address else str(local_path(text).resolve())


def scheme_of(text: str) -> str:
    """Scheme of a URI in lower case, empty for a path."""
    match = _SCHEME.match(text)
    return match[1].lower() if match else ""
