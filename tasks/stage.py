"""Stage: bring the source within reach of all workers.

A local path is used where it lies, and so is an object that a Lustre data repository association shows on the mount.
Any other object is downloaded into scratch, into a folder that its name and version name, so that it is done once
for all jobs on it and continued where it was interrupted.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import xxhash
from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.errors import DestinationError, FrameError, ModelError, SettingsError, SourceError
from tasks.failures import at
from tasks.progress import TransferNote
from tasks.scratch import SOURCES, give_up, hold, note_job
from tasks.store.address import parse, uri_of
from tasks.store.settings import StoreSettings

#: Errors that another attempt with the same source would meet again.
_LASTING: Final = (SourceError, FrameError, SettingsError, ModelError, DestinationError)


@dataclass(frozen=True)
class Source:
    """What a job begins with."""

    uri: str
    """Absolute path, or `s3://` URI."""
    version: str
    """Changes whenever the content does: version id or entity tag of an object, size and time of a file."""
    bytes: int
    facts: Any = None
    """Of an object; see `tasks.store.head`."""

    @property
    def is_stored(self) -> bool:
        """Whether it is an object in S3."""
        return self.facts is not None

    def folder(self, scratch: Path) -> Path:
        """Where it is staged."""
        return scratch / SOURCES / xxhash.xxh3_128_hexdigest(f"{self.uri}\n{self.version}".encode())[:16]


def look_at(source: str, store: StoreSettings) -> Source:
    """See whether a source is there, without reading it.

    Raises:
        SourceError: It is missing, or must not be read.
        StoreError: The store cannot be reached.
    """
    uri, address = uri_of(source), parse(source)
    if address is not None:
        from tasks.store.objects import head

        facts = head(store, address)
        return Source(uri, facts.version, facts.bytes, facts)
    try:
        status = Path(uri).stat()
    except OSError as error:
        raise SourceError(f"{uri} cannot be read ({error.strerror})", "Check the path and its permissions") from error
    return Source(uri, f"{status.st_size}-{status.st_mtime_ns}", status.st_size)


def on_mount(source: Source, store: StoreSettings) -> Path | None:
    """The file under which a data repository association shows an object, if it shows this version of it."""
    address = parse(source.uri)
    path = store.mount_of(address) if address is not None else None
    try:
        # Time is not compared: Lustre keeps that of the import, not of the object.
        return path if path is not None and path.stat().st_size == source.bytes else None
    except OSError:
        return None


@contextmanager
def held(source: Source, scratch: Path, job_id: str) -> Iterator[None]:
    """Keep the staged file of an object for a job while the block runs.

    It is removed afterwards, unless other jobs hold it, or the block ends with an error that another attempt may mend.

    Raises:
        ScratchError: Scratch cannot be written.
    """
    folder = source.folder(scratch)
    with hold(folder, fcntl.LOCK_SH) as lock:
        note_job(folder, job_id)
        try:
            yield
        except _LASTING:
            give_up(folder, lock)
            raise
        give_up(folder, lock)


def staged_path(source: Source, scratch: Path) -> Path:
    """Where workers read a staged object. Nothing of its name is part of it but the ending."""
    return source.folder(scratch) / f"source{Path(source.uri).suffix.lower()}"


def staging_note(source: Source, scratch: Path) -> Path:
    """Where the progress of a download is written."""
    return source.folder(scratch) / "staging.progress"


@task(name="stage", task_run_name="stage", tags={"pool:cpu"}, cache_policy=NO_CACHE)
def stage(source: Source, scratch: str, store: StoreSettings) -> str:
    """Download an object into scratch, checked against what the store knows of its content; see `tasks.store.download`.

    Returns:
        The path under which workers read it.
    """
    from tasks.store.download import download

    address = parse(source.uri)
    assert address is not None
    target = staged_path(source, Path(scratch))
    with at("stage"), (target.parent / "download.lock").open("a+") as lock:  # Two jobs may begin with the same source.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            download(store, address, source.facts, target, TransferNote(staging_note(source, Path(scratch))).write)
    return str(target)
