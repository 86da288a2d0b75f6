"""Chunk files: the lossless hand-over of frames between extract, upscale and encode.

One file per chunk and stage. Layout: the raw frames one after another (planes Y, U, V, rows without padding), then a
JSON trailer (picture format, frame count, one XXH3 checksum per frame), its length as 8 bytes little endian, and a
magic word. Raw planes cost a tenth of the CPU time of any lossless codec, read and write sequentially, and map straight
into tensors; the trailer makes a complete file recognisable and any damaged frame nameable.

A file appears under its name only when it is complete: it is written beside it and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from tasks.errors import ChunkFileError
from tasks.media.pixels import PictureFormat

#: Ends every complete file; the digit is the version of the layout and part of every chunk key.
MAGIC: Final = b"SRCHUNK1"
_LENGTH_BYTES: Final = 8

_REMEDY: Final = "Run the same command again: the chunk is made anew"


def partial_path(path: Path) -> Path:
    """A name beside `path` for a file being written; unique, so that two attempts at one chunk never share a file."""
    return path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:8]}")


def remove_leftover(path: Path) -> None:
    """Remove an unfinished file or folder if it is still there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class ChunkWriter:
    """Writes one chunk file frame by frame.

    A context manager: the file gets its name when the block ends without an exception, and vanishes otherwise.

    Args:
        path: Final name.
        picture: Format of every frame.
    """

    def __init__(self, path: Path, picture: PictureFormat) -> None:
        self.path = path
        self.picture = picture
        self._partial = partial_path(path)
        self._checksums: list[int] = []
        self._file = self._partial.open("wb")

    def __enter__(self) -> ChunkWriter:
        return self

    def __len__(self) -> int:
        return len(self._checksums)

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Append frames, `uint8[n, frame_bytes]`, contiguous."""
        if frames.ndim != 2 or frames.shape[1] != self.picture.frame_bytes:
            raise ValueError(f"frames of shape {frames.shape} do not fit {self.picture}")
        for frame in frames:
            self._checksums.append(xxhash.xxh3_64_intdigest(frame.data))
        self._file.write(np.ascontiguousarray(frames).data)

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        try:
            if exc_type is None:
                trailer = json.dumps({"picture": self.picture.to_dict(), "checksums": self._checksums}).encode()
                self._file.write(trailer + len(trailer).to_bytes(_LENGTH_BYTES, "little") + MAGIC)
                self._file.close()
                os.replace(self._partial, self.path)
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)


class ChunkReader:
    """Reads one chunk file and checks it.

    Args:
        path: The file.

    Raises:
        ChunkFileError: It is missing, incomplete or not a chunk file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.picture, self._checksums = _read_trailer(path)

    def __len__(self) -> int:
        return len(self._checksums)

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[NDArray[np.uint8]]:
        """Yield consecutive frames, `uint8[<= size, frame_bytes]`, each checked against its checksum.

        Args:
            size: Frames per batch.
            start: First frame, counted within this file.
            stop: Frame after the last one; the end of the file by default.

        Raises:
            ChunkFileError: A frame does not match its checksum.
        """
        frame_bytes = self.picture.frame_bytes
        stop = len(self) if stop is None else stop
        with self.path.open("rb") as file:
            file.seek(start * frame_bytes)
            for first in range(start, stop, size):
                count = min(size, stop - first)
                batch = np.empty((count, frame_bytes), dtype=np.uint8)
                if file.readinto(batch.data) != batch.nbytes:
                    raise ChunkFileError(f"{self.path} ends within frame {first}", _REMEDY)
                for offset, frame in enumerate(batch):
                    if xxhash.xxh3_64_intdigest(frame.data) != self._checksums[first + offset]:
                        raise ChunkFileError(
                            f"{self.path}: frame {first + offset} does not match its checksum", _REMEDY
                        )
                yield batch

    def verify(self) -> None:
        """Check every frame.

        Raises:
            ChunkFileError: A frame does not match its checksum.
        """
        for _ in self.batches(8):
            pass


def is_valid(path: Path, picture: PictureFormat, frames: int) -> bool:
    """Whether `path` is a complete chunk file with these frames; damaged files are removed."""
    if not path.exists():
        return False
    try:
        reader = ChunkReader(path)
        if reader.picture == picture and len(reader) == frames:
            reader.verify()
            return True
    except ChunkFileError:
        pass
    path.unlink(missing_ok=True)
    return False


def _read_trailer(path: Path) -> tuple[PictureFormat, list[int]]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            tail = _LENGTH_BYTES + len(MAGIC)
            if size < tail:
                raise ChunkFileError(f"{path} is not a complete chunk file ({size} bytes)", _REMEDY)
            file.seek(size - tail)
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if file.read() != MAGIC or length > size - tail:
                raise ChunkFileError(f"{path} is not a complete chunk file", _REMEDY)
            file.seek(size - tail - length)
            trailer: dict[str, Any] = json.loads(file.read(length))
        picture = PictureFormat.from_dict(trailer["picture"])
        checksums: list[int] = trailer["checksums"]
    except FileNotFoundError as error:
        raise ChunkFileError(f"{path} is missing", _REMEDY) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ChunkFileError(f"{path} has a damaged trailer", _REMEDY) from error
    if size != len(checksums) * picture.frame_bytes + length + tail:
        raise ChunkFileError(f"{path} has {size} bytes, which does not fit its {len(checksums)} frames", _REMEDY)
    return picture, checksums
