"""Where results go: a file on a file system that all nodes share, or an object in S3. Both are all or nothing.

A destination is checked before any work, and once more when the result is ready. The result is read back from where it
was put before anybody is told that it is there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from tasks.errors import DestinationError, StoreError
from tasks.media.encoders import file_digest
from tasks.store.address import Address, local_path, parse
from tasks.store.listing import VIDEO_SUFFIXES
from tasks.store.settings import StoreSettings

#: Called with bytes done and bytes in all.
Transferred = Callable[[int, int], None]


@dataclass(frozen=True)
class Output:
    """A published result."""

    uri: str
    digest: str
    """XXH3 of the content, 128 bits, as hex digits."""
    bytes: int
    version_id: str = ""
    """Of the object, in buckets that keep versions."""
    etag: str = ""


class Destination(Protocol):
    """A place for one result."""

    @property
    def uri(self) -> str:
        """Absolute path, or `s3://` URI."""

    @property
    def file_name(self) -> PurePosixPath:
        """Its last part; the ending names the container."""

    def check(self, source: Path | None, *, overwrite: bool) -> None:
        """Refuse what must not or cannot be written.

        Args:
            source: The video on this machine, which the result must not replace.
            overwrite: Whether something that lies there may be replaced.

        Raises:
            DestinationError: What is wrong.
        """

    def check_space(self, needed: int) -> None:
        """Refuse a place that has no room for `needed` bytes."""

    def found(self) -> Output | None:
        """What lies there now, if its digest is known.

        Raises:
            SuperResolutionError: The store cannot be asked, so nobody knows.
        """

    def keeps(self, output: Mapping[str, Any]) -> bool:
        """Whether what was published there once lies there still, judged without reading it.

        Raises:
            SuperResolutionError: The store cannot be asked.
        """

    def put(
        self, result: Path, digest: str, *, overwrite: bool, notes: Mapping[str, str], progress: Transferred
    ) -> Output:
        """Let a file appear there, whole and read back, or not at all.

        Args:
            result: The file, in the job's folder, where an interrupted transfer is remembered too.
            digest: See `Output.digest`.
            overwrite: Whether something that lies there may be replaced.
            notes: What is kept beside an object: source, job, model.
            progress: Told how far the transfer is.

        Raises:
            DestinationError: Something appeared there meanwhile, or it cannot be written.
            StoreError: The store failed for too long, or gives something else back.
        """


def destination_of(where: str, store: StoreSettings) -> LocalFile | StoredObject:
    """The destination that a path or an `s3://` URI names.

    Raises:
        SettingsError: It is a URI of another kind, or no possible one.
    """
    address = parse(where)
    return LocalFile.at(where) if address is None else StoredObject(address, store)


def result_name(name: str, container: str) -> str:
    """The name of a video's result; those of two videos differ, also where their names differ only in the ending.

    `film.avi` becomes `film.avi.mp4`; `film.mp4` stays as it is, unless it could then be the result of some `film`. It
    is the rule of `infra/aws/lambda` too.

    Args:
        name: Of the video, relative to the library.
        container: Ending of the result.
    """
    path = PurePosixPath(name)
    if path.suffix == f".{container}" and PurePosixPath(path.stem).suffix.lower() not in VIDEO_SUFFIXES:
        return name
    return f"{name}.{container}"


def result_in(destination: str, source: str, container: str) -> str:
    """The destination itself, or for a folder or prefix the file or object in it that is named as the source.

    Args:
        destination: Path or URI; one that ends in a slash is a folder, and so is a folder that is there, unless its
            name is that of a video.
        source: Path or URI of the video.
        container: Ending of the result, for destinations that are folders.
    """
    if not destination.endswith("/"):
        path = local_path(destination) if parse(destination) is None else None
        if path is None or path.suffix.lower() in VIDEO_SUFFIXES or not path.is_dir():
            return destination
    return f"{destination.rstrip('/')}/{result_name(PurePosixPath(source).name, container)}"


@dataclass(frozen=True)
class LocalFile:
    """A file on a file system that all nodes share."""

    path: Path

    @classmethod
    def at(cls, where: str) -> LocalFile:
        """A link at the path itself is replaced, not followed."""
        path = local_path(where)
        return cls(path.parent.resolve() / path.name)

    @property
    def uri(self) -> str:
        return str(self.path)

    @property
    def file_name(self) -> PurePosixPath:
        return PurePosixPath(self.path.name)

    def check(self, source: Path | None, *, overwrite: bool) -> None:
        path = self.path
        try:
            exists = path.exists()
        except OSError as error:
            raise DestinationError(f"{path} is no possible name ({error.strerror})", "Choose another name") from error
        if exists and source is not None and path.samefile(source):
            raise DestinationError(f"the destination is the source itself ({path})", "Choose another name")
        if path.is_dir():
            raise DestinationError(f"{path} is a folder", "Add a file name")
        if exists and not overwrite:
            raise DestinationError(f"{path} exists already", "Choose another name, or add --overwrite to replace it")
        if not path.parent.is_dir():
            raise DestinationError(f"the folder {path.parent} does not exist", "Create it first")
        try:
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise DestinationError(
                f"cannot write into {path.parent} ({error.strerror})", "Choose another folder or change its permissions"
            ) from error

    def check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if free < needed:
            raise DestinationError(
                f"{self.path.parent} has {free / 1e9:.2f} GB free, the result may take {needed / 1e9:.2f} GB",
                "Free some space",
            )

    def found(self) -> Output | None:
        try:
            return Output(self.uri, file_digest(self.path), self.path.stat().st_size)
        except OSError:
            return None

    def keeps(self, output: Mapping[str, Any]) -> bool:
        try:
            return self.path.stat().st_size == output["bytes"]
        except OSError:
            return False

    def put(
        self, result: Path, digest: str, *, overwrite: bool, notes: Mapping[str, str], progress: Transferred
    ) -> Output:
        """Link or copy the file beside its name, check the copy, and rename it."""
        partial = self.path.with_name(f".{self.path.name}.{result.parent.name}.partial")
        try:
            _place(result, partial)
            if file_digest(partial) != digest:
                raise DestinationError(f"{self.path} reads back differently from what was written", "Check the disk")
            size = partial.stat().st_size
            os.replace(partial, self.path)
        except OSError as error:
            raise DestinationError(
                f"cannot write {self.path} ({error.strerror})", "Check space and permissions"
            ) from error
        finally:
            partial.unlink(missing_ok=True)
        return Output(self.uri, digest, size)


def _place(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy of it where they are on different file systems."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


@dataclass(frozen=True)
class StoredObject:
    """An object in S3."""

    address: Address
    store: StoreSettings

    @property
    def uri(self) -> str:
        return str(self.address)

    @property
    def file_name(self) -> PurePosixPath:
        return PurePosixPath(self.address.name)

    def check(self, source: Path | None, *, overwrite: bool) -> None:
        from tasks.store.upload import check_destination

        check_destination(self.store, self.address, overwrite)

    def check_space(self, needed: int) -> None:
        """A bucket is never full."""

    def found(self) -> Output | None:
        from tasks.store.objects import find
        from tasks.store.upload import DIGEST_LABEL

        facts = find(self.store, self.address, DestinationError)
        digest = facts.metadata.get(DIGEST_LABEL) if facts else None
        return Output(self.uri, digest, facts.bytes, facts.version_id, facts.etag) if facts and digest else None

    def keeps(self, output: Mapping[str, Any]) -> bool:
        try:
            found = self.found()
        except StoreError:
            return False
        return found is not None and found.digest == output["digest"]

    def put(
        self, result: Path, digest: str, *, overwrite: bool, notes: Mapping[str, str], progress: Transferred
    ) -> Output:
        from tasks.store.upload import check_destination, upload

        done = upload(
            self.store,
            result,
            self.address,
            job=result.parent.name,
            metadata=dict(notes),
            state=result.with_name("upload.json"),
            replaces=check_destination(self.store, self.address, overwrite=True) if overwrite else None,
            progress=progress,
        )
        return Output(self.uri, digest, done.bytes, done.version_id, done.etag)
