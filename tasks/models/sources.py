"""Where weight files are downloaded from: a web server, an S3 bucket or a folder, from any byte on.

`SUPERRES_MODEL_MIRROR` names a mirror that is asked before the official source: a folder, an `http://` or `https://`
URL to which file names are appended, or `s3://bucket/prefix`. HTTP goes through the proxies that `HTTP_PROXY`,
`HTTPS_PROXY` and `NO_PROXY` name. S3 takes credentials, region and `AWS_ENDPOINT_URL` from wherever boto finds them.
"""

from __future__ import annotations

import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from tasks.errors import ModelError, SettingsError

#: Names the mirror.
MIRROR_VARIABLE: Final = "SUPERRES_MODEL_MIRROR"

_BLOCK: Final = 1 << 18
_TIMEOUT_SECONDS: Final = 60


class MissingError(OSError):
    """The source was reached and does not give the file: there is no point in asking again."""


@dataclass(frozen=True)
class Content:
    """A file that is being sent."""

    start: int
    """Byte it begins at; 0 where the source cannot begin later."""
    size: int | None
    """Bytes of the whole file, as far as the source tells."""
    read: Callable[[], bytes]
    """Gives the next block, empty at the end."""


@dataclass(frozen=True)
class Source:
    """One place that may have a file."""

    name: str
    """URL or path of the file."""
    open: Callable[[int], AbstractContextManager[Content]]
    """Sends it from a byte on while a block runs. Raises `OSError`, `MissingError` if trying again would be in vain."""
    patient: bool = False
    """Whether it is asked again when it could not be reached at all; another source may do as well."""

    def __str__(self) -> str:
        return self.name


def official(url: str) -> Source:
    """The file at an HTTP URL."""
    return Source(url, lambda start: _over_http(url, start), patient=True)


def mirror(file_name: str) -> Source | None:
    """The file in the mirror that the environment names, `None` if it names none.

    Raises:
        SettingsError: It is of no known kind.
    """
    base = os.environ.get(MIRROR_VARIABLE, "").rstrip("/")
    if not base:
        return None
    scheme, has_scheme, _ = base.partition("://")
    if not has_scheme:
        path = Path(base).expanduser() / file_name
        return Source(str(path), lambda start: _from_folder(path, start))
    if scheme in ("http", "https"):
        url = f"{base}/{urllib.parse.quote(file_name)}"
        return Source(url, lambda start: _over_http(url, start))
    if scheme == "s3":
        url = f"{base}/{file_name}"
        return Source(url, lambda start: _from_s3(url, start))
    raise SettingsError(
        f"{MIRROR_VARIABLE} is {base}, which is of no known kind", "Name a folder, an http(s) URL or s3://bucket/prefix"
    )


def check_mirror(file_name: str) -> str:
    """See whether the mirror can be reached; it need not have the file.

    Returns:
        Its name; empty where there is none.

    Raises:
        ModelError: It cannot.
        SettingsError: It is of no known kind.
    """
    source = mirror(file_name)
    if source is None:
        return ""
    base = os.environ[MIRROR_VARIABLE]
    try:
        if "://" not in base and not Path(base).expanduser().is_dir():
            raise OSError("there is no such folder")
        with suppress(MissingError), source.open(0):
            pass
    except OSError as error:
        raise ModelError(
            f"the mirror of models {base} cannot be reached ({error})", f"Correct {MIRROR_VARIABLE}"
        ) from error
    return base


@contextmanager
def _over_http(url: str, start: int) -> Iterator[Content]:
    request = urllib.request.Request(url, headers={"User-Agent": "media-super-resolution"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        # An opener of its own: that of `urlopen` keeps the proxies it found when it was first used.
        with urllib.request.build_opener().open(request, timeout=_TIMEOUT_SECONDS) as response:
            if response.status != 206:  # a server without ranges sends everything again
                start = 0
            yield Content(start, _total_size(response, start), lambda: response.read(_BLOCK))
    except urllib.error.HTTPError as error:
        raise (MissingError if error.code < 500 else OSError)(str(error)) from error
    except http.client.HTTPException as error:
        raise ConnectionError(repr(error)) from error


def _total_size(response: http.client.HTTPResponse, start: int) -> int | None:
    """Size of the whole file as the server states it."""
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start:
            raise ConnectionError("the server sent another part of the file than was asked for")
        return int(match[2])
    length = response.headers.get("Content-Length")
    return int(length) if length and length.isdigit() else None


@contextmanager
def _from_folder(path: Path, start: int) -> Iterator[Content]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise MissingError(error.strerror) from error
    with file:
        yield _of_file(file, start, path.stat().st_size)


@contextmanager
def _from_s3(url: str, start: int) -> Iterator[Content]:
    # Here: it takes half a second to load, and few have a mirror on S3.
    import s3fs
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        store = s3fs.S3FileSystem(
            config_kwargs={
                "connect_timeout": _TIMEOUT_SECONDS,
                "read_timeout": _TIMEOUT_SECONDS,
                "retries": {"max_attempts": 1},
            },
            skip_instance_cache=True,
        )
        store.retries = 1  # `weights.fetch` tries again, and goes on where it was.
        with store.open(url, "rb", cache_type="readahead", block_size=16 * _BLOCK) as file:
            yield _of_file(file, start, file.size)
    except (FileNotFoundError, PermissionError) as error:
        raise MissingError(error.strerror or str(error)) from error
    except (BotoCoreError, ClientError) as error:
        raise OSError(str(error)) from error


def _of_file(file: BinaryIO, start: int, size: int) -> Content:
    file.seek(start)
    return Content(start, size, lambda: file.read(_BLOCK))
