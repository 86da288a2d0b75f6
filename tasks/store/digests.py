"""Checksums of files: those that S3 keeps with objects, and the XXH3 that names content everywhere in a job."""

from __future__ import annotations

import hashlib
import zlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import xxhash

if TYPE_CHECKING:
    import numpy as np

_BLOCK: Final = 1 << 22

#: Polynomials of the CRCs that Python has no code for, reflected, and their bits.
_POLYNOMIALS: Final = {"CRC32C": (0x82F63B78, 32), "CRC64NVME": (0x9A6C9329AC4BC9B5, 64)}

#: Stretches of a block that a CRC is computed of side by side: enough that numpy's cost for a call does not count.
_LANES: Final = 4096


class Hash(Protocol):
    """What hashes of hashlib, xxhash and this module have in common."""

    def update(self, data: bytes, /) -> None: ...
    def digest(self) -> bytes: ...


def new_hash(algorithm: str) -> Hash:
    """A fresh hash of one of `objects.ALGORITHMS`, or of `XXH3` (128 bits)."""
    if algorithm == "XXH3":
        return xxhash.xxh3_128()
    if algorithm == "CRC32":
        return _Crc32()
    if algorithm in _POLYNOMIALS:
        return _Crc(*_POLYNOMIALS[algorithm])
    return hashlib.new(algorithm, usedforsecurity=False)


def feed(path: Path, start: int, length: int, *hashes: Hash) -> None:
    """Give hashes a section of a file."""
    with path.open("rb") as file:
        file.seek(start)
        while length > 0 and (block := file.read(min(_BLOCK, length))):
            length -= len(block)
            for each in hashes:
                each.update(block)


class _Crc32:
    def __init__(self) -> None:
        self._state = 0

    def update(self, data: bytes, /) -> None:
        self._state = zlib.crc32(data, self._state)

    def digest(self) -> bytes:
        return self._state.to_bytes(4, "big")


class _Crc:
    """A reflected CRC of 32 or 64 bits at a few hundred megabytes a second.

    Python has no native code for these two, but S3 gives CRC64NVME to every object whose uploader chose no checksum,
    and of one encrypted with a key of KMS the ETag tells nothing: without it only the size could be checked. A block is
    cut into stretches whose CRCs numpy computes side by side, eight bytes a step; joining two means to move the first
    over as many zero bytes as the second is long, which is linear.
    """

    def __init__(self, polynomial: int, bits: int) -> None:
        self._polynomial = polynomial
        self._bytes = bits // 8
        self._mask = (1 << bits) - 1
        self._state = self._mask

    def update(self, data: bytes, /) -> None:
        import numpy as np

        tables = _tables(self._polynomial)
        while (words := len(data) // 8) >= 64:
            lanes = min(_LANES, 1 << (words.bit_length() // 2))
            steps = words // lanes
            rows = np.frombuffer(data, "<u8", lanes * steps).reshape(lanes, steps).T
            state = np.zeros(lanes, np.uint64)
            state[0] = self._state
            for row in np.ascontiguousarray(rows):
                state ^= row
                folded = tables[0].take(state & np.uint64(0xFFFF))
                for place in (1, 2, 3):
                    folded ^= tables[place].take((state >> np.uint64(16 * place)) & np.uint64(0xFFFF))
                state = folded
            self._state = _join(state, self._polynomial, 8 * steps)
            data = data[8 * lanes * steps :]
        for byte in data:
            self._state = (self._state >> 8) ^ _byte_table(self._polynomial)[(self._state ^ byte) & 0xFF]

    def digest(self) -> bytes:
        return (self._state ^ self._mask).to_bytes(self._bytes, "big")


@lru_cache(maxsize=4)
def _byte_table(polynomial: int) -> tuple[int, ...]:
    """What each value of the lowest byte becomes when one byte is moved out."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (polynomial if value & 1 else 0)
        table.append(value)
    return tuple(table)


@lru_cache(maxsize=4)
def _tables(polynomial: int) -> list[np.ndarray[Any, Any]]:
    """What each value of the four pairs of bytes of a word becomes when all eight bytes are moved out."""
    import numpy as np

    one = np.array(_byte_table(polynomial), np.uint64)
    tables = []
    for place in range(4):
        state = np.arange(1 << 16, dtype=np.uint64) << np.uint64(16 * place)
        for _ in range(8):
            state = (state >> np.uint64(8)) ^ one[state & np.uint64(0xFF)]
        tables.append(state)
    return tables


def _join(states: np.ndarray[Any, Any], polynomial: int, length: int) -> int:
    """CRC of stretches of `length` bytes each, a power of two of them, from their own."""
    while len(states) > 1:
        states = _apply(_zeros(polynomial, length), states[::2]) ^ states[1::2]
        length *= 2
    return int(states[0])


@lru_cache(maxsize=256)
def _zeros(polynomial: int, length: int) -> np.ndarray[Any, Any]:
    """What each bit of a CRC becomes when `length` zero bytes follow."""
    import numpy as np

    if length == 1:
        bits = [1 << bit for bit in range(64)]
        return np.array([(bit >> 8) ^ _byte_table(polynomial)[bit & 0xFF] for bit in bits], np.uint64)
    half = _zeros(polynomial, length // 2)
    double = _apply(half, half)
    return _apply(_zeros(polynomial, 1), double) if length % 2 else double


def _apply(matrix: np.ndarray[Any, Any], states: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    import numpy as np

    result = np.zeros_like(states)
    for bit, column in enumerate(matrix):
        result ^= np.where((states >> np.uint64(bit)) & np.uint64(1), column, np.uint64(0))
    return result
