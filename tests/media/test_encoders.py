"""Encoding: where chunks begin leaves no trace, colour is tagged, and an encoder that dies is an error."""

from __future__ import annotations

import hashlib
import subprocess
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
import pytest

from tasks.errors import ChunkFileError, SettingsError
from tasks.media.chunk_file import ChunkWriter
from tasks.media.encoders import PROFILES, EncodedChunk, encode_chunk, find_profile, group_frames, read_encoded
from tasks.media.ffmpeg import FfmpegError, binary
from tasks.media.pixels import Colour, PictureFormat
from tasks.media.probe import MATRICES, PRIMARIES, TRANSFERS
from tests.media.clips import picture as moving_pattern
from tests.media.witness import decoding_complaints, shown_frames

RATE = Fraction(24000, 1001)
GROUP = 24
FRAMES = 100  # four groups and a short one
BT709 = Colour("bt709", False, "bt709", "bt709")


@pytest.fixture(scope="module")
def raw() -> np.ndarray:
    """uint8[FRAMES, frame_bytes] of a moving picture, 128x72, 4:2:0."""
    pattern = moving_pattern(RATE, 5)
    command = [binary(), "-v", "error", *pattern, "-frames:v", str(FRAMES)]
    command += ["-pix_fmt", "yuv420p", "-f", "rawvideo", "-"]
    data = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    return np.frombuffer(data, np.uint8).reshape(FRAMES, -1)


def _picture(colour: Colour = BT709, size: tuple[int, int] = (128, 72)) -> PictureFormat:
    return PictureFormat(*size, "yuv420p", colour)


def _encode(
    folder: Path,
    frames: np.ndarray,
    first: int,
    profile: str,
    *,
    picture: PictureFormat | None = None,
    aspect: Fraction = Fraction(1),
    concurrency: int = 2,
) -> Path:
    source, target = folder / f"{first}.yuv", folder / f"{first}.mkv"
    with ChunkWriter(source, picture or _picture()) as writer:
        writer.write(frames)
    encode_chunk(
        source, target, PROFILES[profile], rate=RATE, sample_aspect_ratio=aspect, first_frame=first,
        concurrency=concurrency,
    )  # fmt: skip
    source.unlink()
    return target


def _chunked(folder: Path, raw: np.ndarray, length: int, profile: str) -> tuple[list[str], list[bytes], set[bytes]]:
    """Digests of decoded frames, packets, and decoder set-ups of all chunks."""
    folder.mkdir()
    frames, packets, headers = [], [], set()
    for first in range(0, len(raw), length):
        path = _encode(folder, raw[first : first + length], first, profile)
        frames += [frame.md5 for frame in shown_frames(path)]
        with av.open(str(path)) as container:
            headers.add(bytes(container.streams.video[0].codec_context.extradata or b""))
            packets += [bytes(packet) for packet in container.demux(video=0) if packet.size]
    return frames, packets, headers


@pytest.mark.parametrize("profile", PROFILES)
def test_chunk_length_leaves_no_trace_in_frames_or_packets(tmp_path: Path, raw: np.ndarray, profile: str) -> None:
    whole = _chunked(tmp_path / "whole", raw, FRAMES, profile)
    assert len(whole[0]) == len(whole[1]) == FRAMES
    assert len(whole[2]) == 1
    for length in (GROUP, 3 * GROUP):
        assert _chunked(tmp_path / str(length), raw, length, profile) == whole, f"chunks of {length} frames"


@pytest.mark.parametrize("profile", ["h264", "h265"])
def test_number_of_cores_leaves_no_trace(tmp_path: Path, raw: np.ndarray, profile: str) -> None:
    digests = set()
    for concurrency in (1, 3):
        folder = tmp_path / str(concurrency)
        folder.mkdir()
        path = _encode(folder, raw[: 2 * GROUP], 0, profile, concurrency=concurrency)
        digests.add(hashlib.md5(path.read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("profile", PROFILES)
def test_every_group_starts_with_a_key_frame_and_nothing_refers_across(
    tmp_path: Path, raw: np.ndarray, profile: str
) -> None:
    path = _encode(tmp_path, raw, 0, profile)
    wanted = [frame.md5 for frame in shown_frames(path)]
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        ordered = sorted(packet.pts for packet in packets)
        keys = [packet for packet in packets if packet.is_keyframe]
        assert {0, GROUP, 2 * GROUP, 3 * GROUP, 4 * GROUP} <= {ordered.index(packet.pts) for packet in keys}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        container.seek(ordered[2 * GROUP], stream=stream)
        frame = next(container.decode(stream))
        assert frame.pts == ordered[2 * GROUP]
        digest = hashlib.md5()
        for plane in frame.planes:
            row = plane.width * (2 if "10" in frame.format.name else 1)
            digest.update(np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, :row].tobytes())
        assert digest.hexdigest() == wanted[2 * GROUP]


@pytest.mark.parametrize("full_range", [False, True])
def test_ffv1_gives_back_every_byte(tmp_path: Path, raw: np.ndarray, full_range: bool) -> None:
    path = _encode(tmp_path, raw[:30], 0, "ffv1", picture=_picture(Colour("bt709", full_range)))
    wanted = [hashlib.md5(frame.tobytes()).hexdigest() for frame in raw[:30]]
    assert [frame.md5 for frame in shown_frames(path)] == wanted


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    "colour",
    [BT709, Colour("smpte170m", False, "smpte170m", "smpte170m"), Colour("bt470bg", True, "bt470bg", "bt470bg")],
    ids=lambda colour: f"{colour.matrix}-{'full' if colour.full_range else 'limited'}",
)
def test_colour_tags_and_pixel_shape_come_out(tmp_path: Path, raw: np.ndarray, profile: str, colour: Colour) -> None:
    if PROFILES[profile].limited_only and colour.full_range:
        pytest.skip("requests convert to limited range for this profile")
    shapeless = PROFILES[profile].shapeless  # The container says it, when chunks are joined.
    aspect = Fraction(1) if shapeless else Fraction(64, 45)
    path = _encode(tmp_path, raw[:6], 0, profile, picture=_picture(colour), aspect=aspect)
    command = [binary(), "-hide_banner", "-i", str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stderr
    assert shapeless or "SAR 64:45" in said
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        codes = {"bt709": (1, 1, 1), "smpte170m": (6, 6, 6), "bt470bg": (5, 5, 5)}[colour.matrix]
        assert (int(frame.colorspace), int(frame.color_primaries), int(frame.color_trc)) == codes
        assert int(frame.color_range) == (2 if colour.full_range else 1)
        assert not frame.interlaced_frame


@pytest.mark.parametrize("profile", PROFILES)
def test_encoded_file_decodes_without_complaint(tmp_path: Path, raw: np.ndarray, profile: str) -> None:
    assert decoding_complaints(_encode(tmp_path, raw[:30], 0, profile)) == ""


def test_a_chunk_of_one_frame_is_encoded(tmp_path: Path, raw: np.ndarray) -> None:
    for profile in PROFILES:
        assert len(shown_frames(_encode(tmp_path, raw[:1], 0, profile))) == 1


def test_a_killed_encoder_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    large = _picture(size=(384, 216))
    source = tmp_path / "large.yuv"
    frames = np.random.default_rng(2).integers(0, 256, (GROUP, large.frame_bytes), dtype=np.uint8)
    with ChunkWriter(source, large) as writer:
        for _ in range(2):
            writer.write(frames)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 30
        while not killed and time.monotonic() < deadline:
            for child in psutil.Process().children(recursive=True):
                if child.pid not in before and "ffmpeg" in child.name():
                    child.kill()
                    killed.append(child.pid)
                    return
            time.sleep(0.005)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(FfmpegError) as failure:
        encode_chunk(
            source, tmp_path / "large.mkv", PROFILES["h265"], rate=RATE, sample_aspect_ratio=Fraction(1), first_frame=0,
            concurrency=1,
        )  # fmt: skip
    killer.join()
    assert killed
    assert failure.value.returncode == -9
    assert "signal 9" in str(failure.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["large.yuv"]
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def test_a_damaged_chunk_is_an_error_and_leaves_no_process_or_file(tmp_path: Path, raw: np.ndarray) -> None:
    source = tmp_path / "damaged.yuv"
    with ChunkWriter(source, _picture()) as writer:
        writer.write(raw[:60])
    with source.open("r+b") as file:
        file.seek(40 * raw.shape[1] + 5)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(ChunkFileError, match="frame 40"):
        encode_chunk(
            source, tmp_path / "damaged.mkv", PROFILES["h264"], rate=RATE, sample_aspect_ratio=Fraction(1),
            first_frame=0, concurrency=2,
        )  # fmt: skip
    assert [entry.name for entry in tmp_path.iterdir()] == ["damaged.yuv"]
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def test_an_encoded_chunk_is_believed_only_if_file_and_manifest_agree(tmp_path: Path, raw: np.ndarray) -> None:
    path = _encode(tmp_path, raw[:GROUP], 0, "h264")
    content, manifest = path.read_bytes(), EncodedChunk.manifest_path(path).read_text()
    found = read_encoded(path, GROUP)
    assert found is not None
    assert (found.frames, found.bytes) == (GROUP, len(content))
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for data, record, frames in [
        (content[:-1], manifest, GROUP),
        (flipped, manifest, GROUP),
        (content, "{}", GROUP),
        (content, "", GROUP),
        (content, manifest, GROUP + 1),
    ]:
        path.write_bytes(data)
        EncodedChunk.manifest_path(path).write_text(record)
        assert read_encoded(path, frames) is None
        assert list(tmp_path.iterdir()) == [], "what is not believed is removed"


def test_every_tag_that_probing_can_give_is_known_to_the_encoding_command() -> None:
    command = [binary(), "-hide_banner", "-h", "filter=setparams"]
    known = set(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split())
    assert {*MATRICES.values(), *PRIMARIES.values(), *TRANSFERS.values()} <= known


def test_rate_factor_and_preset_reach_the_encoder(tmp_path: Path, raw: np.ndarray) -> None:
    sizes = {}
    for crf, preset in ((None, None), (30, None), (None, "veryslow")):
        profile = find_profile("h264").tuned(crf, preset)
        folder = tmp_path / f"{crf}-{preset}"
        folder.mkdir()
        source, target = folder / "raw.yuv", folder / "coded.mkv"
        with ChunkWriter(source, _picture()) as writer:
            writer.write(raw[:GROUP])
        encode_chunk(source, target, profile, rate=RATE, sample_aspect_ratio=Fraction(1), first_frame=0, concurrency=2)
        sizes[crf, preset] = target.stat().st_size
    assert sizes[30, None] < 0.6 * sizes[None, None]
    assert len(set(sizes.values())) == 3


@pytest.mark.parametrize(
    ("name", "crf", "preset", "wrong"),
    [
        ("h264", 52, None, "a rate factor of 52 is out of range"),
        ("av1", 0, None, "a rate factor of 0 is out of range"),
        ("ffv1", 10, None, "ffv1 has no rate factor"),
        ("prores", None, "slow", "prores has no preset 'slow'"),
        ("h265", None, "8", "h265 has no preset '8'"),
    ],
)
def test_what_an_encoder_cannot_be_told_is_refused(name: str, crf: int | None, preset: str | None, wrong: str) -> None:
    with pytest.raises(SettingsError, match=wrong) as refusal:
        find_profile(name).tuned(crf, preset)
    assert refusal.value.remedy


def test_unknown_encoders_are_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="h264, h265, h265-10, av1, prores, ffv1"):
        find_profile("theora")


def test_a_group_is_a_second() -> None:
    assert [group_frames(Fraction(rate)) for rate in ("24000/1001", "25", "60000/1001", "1/2")] == [24, 25, 60, 1]
