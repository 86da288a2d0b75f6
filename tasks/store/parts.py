"""Transfers in parts: how a file is cut, parts moved side by side, and one part read however often it breaks off."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import copy_context
from dataclasses import dataclass
from threading import Event
from typing import Final, TypeVar

from tasks.aws import aws_client
from tasks.errors import StoreError, SuperResolutionError
from tasks.store.address import Address
from tasks.store.errors import typed_errors
from tasks.store.objects import ObjectFacts
from tasks.store.settings import StoreSettings

#: Called with the bytes that are there so far, and those of the whole.
Progress = Callable[[int, int], None]

#: Parts of an object that S3 allows.
MOST_PARTS: Final = 10_000

#: Transfers side by side, below the 10 connections that a client keeps: one connection to S3 gives about 100 MB/s.
_THREADS: Final = 8

#: Bytes of parts that are held in memory at a time, so that parts of huge files do not fill it.
_MEMORY: Final = 512 << 20

#: Pauses in seconds before a part that broke off is continued; counted anew whenever bytes arrived.
PAUSES: tuple[float, ...] = (0.2, 1.0, 3.0, 10.0)

_BLOCK: Final = 1 << 20

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Part:
    """A section of a file."""

    number: int
    """Counted from 1, as S3 does."""
    start: int
    length: int


def part_size(total: int, smallest: int) -> int:
    """Bytes of a part: `smallest`, or whole mebibytes more where there would be too many parts."""
    needed = -(-total // MOST_PARTS)
    return smallest if needed <= smallest else -(-needed // _BLOCK) * _BLOCK


def cut(total: int, size: int) -> list[Part]:
    """Parts of a file in order; one empty part of an empty file."""
    starts = range(0, max(total, 1), size)
    return [Part(number, start, min(size, total - start)) for number, start in enumerate(starts, start=1)]


def side_by_side(
    work: Callable[[Part, Event], _Result], parts: Iterable[Part], size: int
) -> Generator[tuple[Part, _Result], None, None]:
    """Do `work` for all parts in threads; results come as they are there, in the caller's thread.

    The first error ends everything: parts not begun are left, and `work` sees its event set. So does closing the
    iterator, which a caller does with `contextlib.closing`. Either way no thread is left.
    """
    stop = Event()
    pool = ThreadPoolExecutor(max(1, min(_THREADS, _MEMORY // size)), thread_name_prefix="store")
    try:
        # With the context of the caller: in it, a worker finds the Prefect API that has its credentials.
        futures = {pool.submit(copy_context().run, work, part, stop): part for part in parts}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def read_part(
    settings: StoreSettings,
    address: Address,
    facts: ObjectFacts,
    part: Part,
    stop: Event,
    blame: type[SuperResolutionError],
) -> bytearray:
    """Read a section of the very content that `facts` describe; a body that breaks off is continued where it did.

    Raises:
        SuperResolutionError: Of class `blame`: the object changed or is gone.
        StoreError: The store gave too little too often, or something else.
    """
    content = bytearray()
    pauses = iter(PAUSES)
    while len(content) < part.length:
        before = len(content)
        with typed_errors("read", address, blame):
            trouble = _read_on(settings, address, facts, part, content)
        if len(content) > before:
            pauses = iter(PAUSES)
        if len(content) < part.length:
            pause = next(pauses, None)
            if pause is None or stop.wait(pause):
                raise StoreError(
                    f"cannot read {address}: {part.length - len(content)} bytes from {part.start + len(content)} on "
                    f"did not come ({trouble})",
                    "Check network and proxy, and start again: what is there is kept",
                )
    return content


def _read_on(settings: StoreSettings, address: Address, facts: ObjectFacts, part: Part, content: bytearray) -> str:
    """Append what one answer gives; returns why that is not all, in case it is not."""
    from botocore.exceptions import BotoCoreError, FlexibleChecksumError
    from urllib3.exceptions import HTTPError

    first, last = part.start + len(content), part.start + part.length - 1
    # The client itself repeats the call until an answer begins; after that it does not.
    answer = aws_client("s3", settings.aws).get_object(
        Bucket=address.bucket, Key=address.key, Range=f"bytes={first}-{last}", **facts.pin
    )
    body = answer["Body"]
    try:
        if answer["ETag"].strip('"') != facts.etag:
            raise StoreError(f"cannot read {address}: the store gave another version", "Check proxy and endpoint")
        if not answer.get("ContentRange", "").startswith(f"bytes {first}-"):
            return "the store gave another part than asked for"
        # To its very end: some answers carry a checksum, which the client compares only there.
        while block := body.read(max(1, min(_BLOCK, part.length - len(content)))):
            content += block
        if len(content) > part.length:
            content.clear()
            return "the answer was too long"
    except FlexibleChecksumError:
        content.clear()
        return "the answer was not what its checksum says"
    except (BotoCoreError, HTTPError, OSError) as error:
        return type(error).__name__
    finally:
        body.close()
    return "the answer was too short"
