"""Libraries of tiny videos, good ones and bad ones, made in milliseconds each."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import av
import numpy as np

FRAMES: Final = 6

#: What is wrong with the bad ones: the kind of the error, and what its message says.
BAD: Final = {
    "empty.mp4": ("source", "is empty (0 bytes)"),
    "text.mp4": ("source", "is a text file"),
    "truncated.mp4": ("source", "moov"),
    "sound.mp4": ("source", "holds no video"),
    "noise.mkv": ("frame", "cannot be decoded"),
}


def make_clip(path: Path, seed: int, frames: int = FRAMES, size: tuple[int, int] = (32, 32)) -> Path:
    """Write a clip whose content a seed decides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    tiles = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    picture = tiles.repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, index, 1).copy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def make_bad_ones(folder: Path) -> None:
    """Write one file for each entry of `BAD`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("No video, but a text about one.\n" * 20)
    clip = make_clip(folder / "whole.mp4", 1001)
    (folder / "truncated.mp4").write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    clip.unlink()
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    noise = make_clip(folder / "noise.mkv", 1002)
    with av.open(str(noise)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    content, lost = noise.read_bytes(), packets[FRAMES // 2]
    assert content.count(lost) == 1
    noise.write_bytes(content.replace(lost, b"\xff" * len(lost)))
