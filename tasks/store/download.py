"""Downloads: a pinned version of an object becomes a file, continued after a kill and checked at the end.

While it is under way there are two files beside the target: `.download` with the content, which has holes, and `.parts`
with one line for every part that is there. Their names do not say `partial`: such files of a job are removed when it
starts again. A line holds the part's XXH3, and what is continued is checked against it: so nothing need be flushed to
disk on the way, and not even a crash of the machine can leave a part that only seems to be there.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Final

import xxhash

from tasks.aws import aws_client
from tasks.errors import ScratchError, SourceError, StoreError
from tasks.store.address import Address
from tasks.store.digests import Hash, feed, new_hash
from tasks.store.errors import local_errors, typed_errors
from tasks.store.objects import ObjectFacts
from tasks.store.parts import Part, Progress, cut, part_size, read_part, side_by_side
from tasks.store.settings import StoreSettings

#: Bytes of a part, if the file is not huge: many times what is lost when it breaks off, little enough to hold 8.
PART_BYTES: int = 16 << 20

#: Checksums that numpy computes at a fraction of the speed of a disk: used if nothing else tells about the content.
_SLOW: Final = ("CRC64NVME", "CRC32C")

_HASH_THREADS: Final = 4


@dataclass(frozen=True)
class Downloaded:
    """A finished download."""

    digest: str
    """XXH3 (128 bits) of the file."""
    checked: str
    """What the store knew that the file was compared with: `sha256`, `crc32`, `md5` and so on, or only `size`."""


@dataclass(frozen=True)
class _Expected:
    """What the store says about the content of an object."""

    algorithm: str
    digest: bytes
    part_bytes: int
    """Bytes of the parts whose digests `digest` is made of; 0 if it is of the whole."""


def download(
    settings: StoreSettings, address: Address, facts: ObjectFacts, target: Path, progress: Progress | None = None
) -> Downloaded:
    """Make `target` the content that `facts` describe; a killed download of the same content is continued.

    Only one process may download to a target at a time.

    Args:
        settings: How to reach the store.
        address: The object.
        facts: As `objects.head` gave them.
        target: The file; its folder exists.
        progress: Is told how far it is, in the caller's thread; what it raises ends the download.

    Raises:
        SourceError: The object changed, is gone or may not be read.
        ScratchError: There is no room, or the file cannot be written.
        StoreError: The store cannot be reached, or gave something else than it has.
    """
    content, record = target.with_name(f"{target.name}.download"), target.with_name(f"{target.name}.parts")
    try:
        with local_errors("write", target):
            _fetch(settings, address, facts, content, record, progress)
            expected = _expected(settings, address, facts)
            digest = _check(content, facts.bytes, expected, address)
            os.replace(content, target)
            record.unlink()
    except (SourceError, _WrongContentError):
        for path in (content, record):  # Nothing of it could be used again.
            path.unlink(missing_ok=True)
        raise
    return Downloaded(digest, expected.algorithm.lower() if expected else "size")


class _WrongContentError(StoreError):
    """All bytes came, but not the right ones."""

    def __reduce__(self) -> tuple[object, ...]:
        return StoreError, (self.problem, self.remedy)


def _fetch(
    settings: StoreSettings,
    address: Address,
    facts: ObjectFacts,
    content: Path,
    record: Path,
    progress: Progress | None,
) -> None:
    size = part_size(facts.bytes, PART_BYTES)
    # In this order in the first line, as text: a record of anything else is simply not the same.
    title = json.dumps([str(address), facts.version, facts.etag, facts.bytes, size])
    parts = cut(facts.bytes, size)
    have = _continued(content, record, title, parts)
    done = sum(part.length for part in parts if part in have)
    _check_space(content, facts.bytes - done, address)
    with content.open("r+b" if have else "wb") as file, record.open("w") as lines:
        file.truncate(facts.bytes)
        lines.writelines([title + "\n", *(_line(part, digest) for part, digest in have.items())])
        lines.flush()

        def fetch(part: Part, stop: Event) -> str:
            block = read_part(settings, address, facts, part, stop, SourceError)
            os.pwrite(file.fileno(), block, part.start)
            return xxhash.xxh3_128_hexdigest(block)

        with closing(side_by_side(fetch, (part for part in parts if part not in have), size)) as fetched:
            for part, digest in fetched:
                lines.write(_line(part, digest))
                lines.flush()
                done += part.length
                if progress:
                    progress(done, facts.bytes)
        os.fsync(file.fileno())


def _line(part: Part, digest: str) -> str:
    return f"{part.number} {digest}\n"


def _continued(content: Path, record: Path, title: str, parts: list[Part]) -> dict[Part, str]:
    """Parts that an earlier attempt wrote, as far as they are what it wrote, with their hashes."""
    try:
        first, *lines = record.read_text().splitlines()
        if first != title:
            return {}
        written = dict(line.split(" ") for line in lines)
        have = {}
        with content.open("rb") as file:
            for part in parts:
                if digest := written.get(str(part.number)):
                    file.seek(part.start)
                    if xxhash.xxh3_128_hexdigest(file.read(part.length)) == digest:
                        have[part] = digest
        return have
    except (OSError, ValueError):
        return {}


def _check_space(content: Path, needed: int, address: Address) -> None:
    free = shutil.disk_usage(content.parent).free
    if needed > free:
        raise ScratchError(
            f"no room for {address} in {content.parent}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB free",
            "Choose another scratch folder, or make room",
        )


def _expected(settings: StoreSettings, address: Address, facts: ObjectFacts) -> _Expected | None:
    """The best that the store tells about the content, `None` if that is nothing."""
    part_bytes = _part_bytes(settings, address, facts) if facts.parts else 0
    even = not facts.parts or part_bytes  # Parts of different lengths cannot be told apart afterwards.
    found = []
    if facts.checksum and (even or not facts.checksum.composite):
        digest = base64.b64decode(facts.checksum.value)
        size = part_bytes if facts.checksum.composite else 0
        found.append(_Expected(facts.checksum.algorithm, digest, size))
    if facts.etag_is_md5 and even:
        found.append(_Expected("MD5", bytes.fromhex(facts.etag.partition("-")[0]), part_bytes))
    found.sort(key=lambda expected: expected.algorithm in _SLOW)
    return found[0] if found else None


def _part_bytes(settings: StoreSettings, address: Address, facts: ObjectFacts) -> int:
    """Bytes of each part the object was uploaded in, 0 if they differ."""
    with typed_errors("read", address, SourceError):
        client = aws_client("s3", settings.aws)
        # Pinned by version alone: some stores give the part's own ETag here.
        pin = {"VersionId": facts.version_id} if facts.version_id else {}
        first = client.head_object(Bucket=address.bucket, Key=address.key, PartNumber=1, **pin)
    size = int(first["ContentLength"])
    return size if size and -(-facts.bytes // size) == facts.parts else 0


def _check(path: Path, size: int, expected: _Expected | None, address: Address) -> str:
    """Compare the file with what the store says; returns its XXH3."""
    whole = new_hash("XXH3")
    if expected is None or not expected.part_bytes:
        hashes: list[Hash] = [new_hash(expected.algorithm)] if expected else []
        feed(path, 0, size, whole, *hashes)
        found = hashes[0].digest() if hashes else b""
    else:
        algorithm = expected.algorithm

        def of_part(part: Part) -> bytes:
            part_hash = new_hash(algorithm)
            feed(path, part.start, part.length, part_hash)
            return part_hash.digest()

        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            reading = pool.submit(feed, path, 0, size, whole)
            joined = new_hash(algorithm)
            for digest in pool.map(of_part, cut(size, expected.part_bytes)):
                joined.update(digest)
            reading.result()
        found = joined.digest()
    if expected and found != expected.digest:
        raise _WrongContentError(
            f"{address} differs from its {expected.algorithm} in the store after download",
            "Check network, proxy and disk, and start again",
        )
    return whole.digest().hex()
