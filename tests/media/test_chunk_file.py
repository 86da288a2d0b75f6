"""Chunk files: whole or not there, and every damage noticed by frame."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tasks.errors import ChunkFileError
from tasks.media.chunk_file import MAGIC, ChunkReader, ChunkWriter, is_valid, partial_path
from tasks.media.pixels import Colour, PictureFormat

PICTURE = PictureFormat(32, 18, "yuv420p", Colour("bt709", False))
FRAMES = 7


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (FRAMES, PICTURE.frame_bytes), dtype=np.uint8)


@pytest.fixture
def chunk(tmp_path: Path, frames: np.ndarray) -> Path:
    path = tmp_path / "chunk.yuv"
    with ChunkWriter(path, PICTURE) as writer:
        writer.write(frames[:3])
        writer.write(frames[3:])
    return path


def test_frames_come_back_as_they_went_in(chunk: Path, frames: np.ndarray) -> None:
    reader = ChunkReader(chunk)
    assert (len(reader), reader.picture) == (FRAMES, PICTURE)
    for size in (1, 3, 100):
        assert np.array_equal(np.concatenate(list(reader.batches(size))), frames)
    assert np.array_equal(np.concatenate(list(reader.batches(2, 2, 5))), frames[2:5])


def test_a_file_has_no_name_before_it_is_complete(tmp_path: Path, frames: np.ndarray) -> None:
    path = tmp_path / "chunk.yuv"
    with ChunkWriter(path, PICTURE) as writer:
        writer.write(frames)
        assert not path.exists()
        assert len(list(tmp_path.iterdir())) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["chunk.yuv"]


def test_nothing_is_left_of_a_file_whose_writing_failed(tmp_path: Path, frames: np.ndarray) -> None:
    with pytest.raises(RuntimeError), ChunkWriter(tmp_path / "chunk.yuv", PICTURE) as writer:
        writer.write(frames)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rewrite_leaves_the_old_file_alone(chunk: Path, frames: np.ndarray) -> None:
    before = chunk.read_bytes()
    with pytest.raises(RuntimeError), ChunkWriter(chunk, PICTURE) as writer:
        writer.write(frames[::-1])
        raise RuntimeError
    assert chunk.read_bytes() == before


def test_two_attempts_never_share_an_unfinished_file(tmp_path: Path, frames: np.ndarray) -> None:
    path = tmp_path / "chunk.yuv"
    assert partial_path(path) != partial_path(path)
    with ChunkWriter(path, PICTURE) as slow:
        slow.write(frames[:1])
        with ChunkWriter(path, PICTURE) as fast:
            fast.write(frames)
        slow.write(frames[1:])
    assert is_valid(path, PICTURE, FRAMES)


def test_frames_of_another_size_are_not_taken(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not fit"), ChunkWriter(tmp_path / "chunk.yuv", PICTURE) as writer:
        writer.write(np.zeros((1, PICTURE.frame_bytes + 1), np.uint8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [0, 3, FRAMES - 1])
def test_a_flipped_bit_is_named_by_frame(chunk: Path, number: int) -> None:
    content = bytearray(chunk.read_bytes())
    content[number * PICTURE.frame_bytes + 100] ^= 4
    chunk.write_bytes(content)
    with pytest.raises(ChunkFileError, match=f"frame {number} does not match its checksum"):
        ChunkReader(chunk).verify()


def test_every_truncation_is_noticed(chunk: Path) -> None:
    content = chunk.read_bytes()
    for length in {0, 1, 15, 16, PICTURE.frame_bytes, 3 * PICTURE.frame_bytes, len(content) - 1, len(content) - 8}:
        chunk.write_bytes(content[:length])
        with pytest.raises(ChunkFileError):
            ChunkReader(chunk)


@pytest.mark.parametrize(
    "trailer",
    [
        b"{}",
        b"not JSON",
        b'{"picture": {"width": 32}, "checksums": []}',
        b"[]",
        b"\xff\xfe",
    ],
)
def test_a_trailer_that_makes_no_sense_is_damage(chunk: Path, trailer: bytes) -> None:
    frames = chunk.read_bytes()[: FRAMES * PICTURE.frame_bytes]
    chunk.write_bytes(frames + trailer + len(trailer).to_bytes(8, "little") + MAGIC)
    with pytest.raises(ChunkFileError):
        ChunkReader(chunk)


@pytest.mark.parametrize("ending", [b"SRCHUNK0", b"\0" * 8])
def test_another_magic_word_is_no_chunk_file(chunk: Path, ending: bytes) -> None:
    chunk.write_bytes(chunk.read_bytes()[:-8] + ending)
    with pytest.raises(ChunkFileError, match="not a complete chunk file"):
        ChunkReader(chunk)


def test_a_trailer_length_beyond_the_file_is_damage(chunk: Path) -> None:
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-16] + (1 << 62).to_bytes(8, "little") + MAGIC)
    with pytest.raises(ChunkFileError):
        ChunkReader(chunk)


def test_extra_bytes_before_the_trailer_are_damage(chunk: Path) -> None:
    chunk.write_bytes(b"\0" + chunk.read_bytes())
    with pytest.raises(ChunkFileError, match="does not fit"):
        ChunkReader(chunk)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ChunkFileError, match="is missing"):
        ChunkReader(tmp_path / "nowhere.yuv")


def test_only_a_whole_file_of_the_right_kind_is_valid_and_others_are_removed(chunk: Path, tmp_path: Path) -> None:
    content = chunk.read_bytes()
    other = PictureFormat(32, 18, "yuv420p", Colour("smpte170m", False))
    assert not is_valid(tmp_path / "nowhere.yuv", PICTURE, FRAMES)
    assert is_valid(chunk, PICTURE, FRAMES)
    for picture, frames, damage in [(other, FRAMES, 0), (PICTURE, FRAMES - 1, 0), (PICTURE, FRAMES, 1)]:
        chunk.write_bytes(bytes([content[0] ^ damage]) + content[1:])
        assert not is_valid(chunk, picture, frames)
        assert not chunk.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, frames: np.ndarray) -> None:
    path = tmp_path / "chunk.yuv"
    with pytest.raises(OSError), ChunkWriter(path, PICTURE) as writer:
        os.dup2(os.open("/dev/full", os.O_WRONLY), writer._file.fileno())
        for _ in range(200):
            writer.write(frames)
    assert list(tmp_path.iterdir()) == []
