"""Finding videos below a folder or a prefix, with one code for both: fsspec."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from tasks.aws import AwsSettings, _session_of_block
from tasks.errors import SettingsError, SourceError
from tasks.store.address import local_path, parse, scheme_of, split
from tasks.store.errors import typed_errors
from tasks.store.objects import check_bucket
from tasks.store.settings import StoreSettings

#: Endings of files that are taken for videos.
VIDEO_SUFFIXES: Final = frozenset(
    f".{suffix}"
    for suffix in (
        *("mp4", "mov", "mkv", "avi", "mpg", "mpeg", "m2ts", "ts", "mts"),
        *("webm", "wmv", "flv", "vob", "m4v", "mxf", "dv", "3gp", "ogv"),
    )
)

#: Seconds without a byte after which a listing is asked for again, and how often.
_TIMEOUT_SECONDS: Final = 10
_ATTEMPTS: Final = 8


@dataclass(frozen=True)
class Found:
    """A file that looks like a video by its name."""

    uri: str
    """Path or `s3://` URI."""
    bytes: int
    version: str
    """Changes when the content does: the ETag, or size and time of change of a local file."""
    name: str
    """Relative to where the search began, with slashes."""


def find_videos(settings: StoreSettings, where: str) -> Iterator[Found]:
    """All videos below a folder or an `s3://bucket/prefix`, sorted by name.

    Left out: what is hidden, what is being written (`.partial` in its name), links in folders, and objects that
    `address.parse` does not take.

    Raises:
        SettingsError: `where` is of no known kind.
        SourceError: It is missing or may not be read.
        StoreError: The store cannot be reached.
    """
    found = _in_store(settings, where) if scheme_of(where) not in ("", "file") else _in_folder(local_path(where))
    return iter(sorted((video for video in found if _is_wanted(video.name)), key=lambda video: video.name))


def _is_wanted(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in VIDEO_SUFFIXES and not any(
        part.startswith(".") or ".partial" in part for part in path.parts
    )


def _in_folder(folder: Path) -> Iterator[Found]:
    import fsspec

    start = folder.absolute()
    try:
        if not start.exists():
            raise SourceError(f"{folder} does not exist", "Check the path")
        # A folder that may not be read is an error: to leave its videos out in silence would be worse.
        for path, facts in fsspec.filesystem("file").find(str(start), detail=True, on_error="raise").items():
            if facts["type"] == "file":  # Links are of type `other`, wherever they point.
                status = Path(path).stat(follow_symlinks=False)
                version = f"{status.st_size}-{status.st_mtime_ns}"
                yield Found(path, status.st_size, version, _relative(path, str(start)))
    except OSError as error:
        raise SourceError(f"cannot list {folder} ({error.strerror or error})", "Check permissions") from error


def _in_store(settings: StoreSettings, where: str) -> Iterator[Found]:
    bucket, prefix = split(where)
    start = f"{bucket}/{prefix}".rstrip("/")
    check_bucket(settings, bucket, SourceError)  # A listing of a missing bucket is merely empty.
    with typed_errors("list", where, SourceError):
        try:
            for path, facts in _file_system(settings.aws).find(start, detail=True).items():
                uri = f"s3://{path}"
                if facts["type"] == "file" and _is_address(uri):
                    yield Found(uri, facts["size"], facts["ETag"].strip('"'), _relative(path, start))
        except PermissionError as error:
            raise SourceError(f"cannot list {where}: access is denied", "Allow s3:ListBucket") from error
        except OSError as error:
            raise SourceError(f"cannot list {where} ({error.strerror or error})", "Check the address") from error


def _relative(path: str, start: str) -> str:
    return path.removeprefix(start).lstrip("/") or PurePosixPath(path).name


def _is_address(uri: str) -> bool:
    try:
        return parse(uri) is not None
    except SettingsError:
        return False


def _file_system(settings: AwsSettings) -> Any:
    # Here: it takes half a second to load.
    import s3fs

    secrets: dict[str, Any] = {}
    if settings.credentials:
        frozen = _session_of_block(settings.credentials).get_credentials().get_frozen_credentials()
        secrets = {"key": frozen.access_key, "secret": frozen.secret_key, "token": frozen.token}
    return s3fs.S3FileSystem(
        **secrets,
        endpoint_url=settings.endpoint_url or None,
        client_kwargs={"region_name": settings.region} if settings.region else {},
        config_kwargs={
            "connect_timeout": _TIMEOUT_SECONDS,
            "read_timeout": _TIMEOUT_SECONDS,
            "retries": {"mode": "standard", "max_attempts": _ATTEMPTS},
            "s3": {"addressing_style": "path"} if settings.endpoint_url else {},
        },
        skip_instance_cache=True,
        use_listings_cache=False,
    )
