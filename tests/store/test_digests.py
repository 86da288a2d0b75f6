"""Checksums: those computed here are those that others compute, however the bytes are handed over."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import pytest

from tasks.media.encoders import file_digest
from tasks.store.digests import feed, new_hash


@pytest.mark.parametrize(
    ("algorithm", "digest"),
    [  # Of the RFCs and the catalogue of CRCs, where "123456789" is what every check value is of.
        ("CRC32", "cbf43926"),
        ("CRC32C", "e3069283"),
        ("CRC64NVME", "ae8b14860a799888"),
        ("MD5", "25f9e794323b453885f5181f1b624d0b"),
        ("SHA1", "f7c3bc1d808e04732adf679965ccc34ca7ae3441"),
        ("SHA256", "15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225"),
    ],
)
def test_check_values_come_out(algorithm: str, digest: str) -> None:
    found = new_hash(algorithm)
    found.update(b"123456789")
    assert found.digest().hex() == digest


@pytest.mark.parametrize("algorithm", ["CRC32C", "CRC64NVME"])
def test_a_crc_computed_side_by_side_is_that_computed_byte_by_byte(algorithm: str) -> None:
    data = random.Random(1).randbytes(300_001)
    whole, pieces, by_byte = new_hash(algorithm), new_hash(algorithm), new_hash(algorithm)
    whole.update(data)
    start = 0
    for length in (0, 1, 7, 511, 512, 513, 4099, 70_001, len(data)):
        pieces.update(data[start : start + length])
        start += length
    for start in range(0, len(data), 500):  # Short enough that nothing is done side by side.
        by_byte.update(data[start : start + 500])
    assert whole.digest() == pieces.digest() == by_byte.digest()


def test_a_section_of_a_file_is_read_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = random.Random(2).randbytes(10_000)
    path.write_bytes(data)
    crc, other = new_hash("CRC32"), new_hash("CRC32")
    feed(path, 100, 5000, crc, other)
    assert crc.digest() == other.digest() == zlib.crc32(data[100:5100]).to_bytes(4, "big")
    whole = new_hash("XXH3")
    feed(path, 0, len(data), whole)
    assert whole.digest().hex() == file_digest(path)
