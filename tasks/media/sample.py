"""The sample clip of `make run`: a drawn town under a moving camera, with sound, made on the spot.

    python -m tasks.media.sample output/sample.mp4

320x180, 24000/1001 frames/s, 5 seconds, H.264 with B-frames and AAC sound: small and quick to upscale, with the fine
lines, flat faces, foliage and gradients that show what a model does.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import ffmpeg as ffmpeg_python
import numpy as np
from numpy.typing import NDArray

from tasks.media import ffmpeg

WIDTH: Final = 320
HEIGHT: Final = 180
RATE: Final = "24000/1001"
FRAMES: Final = 120

#: The town is drawn this many times larger than it is shown; averaging down gives clean edges and sub-pixel motion.
_OVERSAMPLING: Final = 4
_SEED: Final = 7


def write_sample(path: Path, frames: int = FRAMES) -> None:
    """Write the clip.

    Args:
        path: File to write; its ending names the container.
        frames: Length.
    """
    town = draw_town()
    picture = ffmpeg_python.input(
        "pipe:0", format="rawvideo", pix_fmt="rgb24", video_size=(WIDTH, HEIGHT), framerate=RATE
    ).filter("scale", out_color_matrix="bt709", out_range="tv", flags="accurate_rnd+full_chroma_int")
    picture = picture.filter("setparams", colorspace="bt709", color_primaries="bt709", color_trc="bt709", range="tv")
    sound = ffmpeg_python.input(
        f"aevalsrc=0.2*sin(2*PI*220*t)+0.1*sin(2*PI*(330+4*sin(2*PI*t))*t):d={frames * 1001 / 24000}", format="lavfi"
    )
    output = ffmpeg_python.output(
        picture,
        sound,
        ffmpeg.file_argument(path),
        pix_fmt="yuv420p",
        fflags="+bitexact",
        **{"c:v": "libx264", "crf": "20", "bf": "3", "threads:v": "1", "c:a": "aac", "b:a": "96k"},
    )
    with ffmpeg.FfmpegProcess(output.get_args(), stdin=True) as process:
        for number in range(frames):
            process.stdin.write(view(town, number / max(1, frames - 1)).data)


def view(town: NDArray[np.uint8], progress: float) -> NDArray[np.uint8]:
    """The camera's picture: `uint8[HEIGHT, WIDTH, 3]`.

    Args:
        town: The drawing, `uint8[rows, columns, 3]`.
        progress: 0 at the start of the clip, 1 at its end.
    """
    rows, columns = HEIGHT * _OVERSAMPLING, WIDTH * _OVERSAMPLING
    eased = (1 - np.cos(np.pi * progress)) / 2
    left = round(eased * (town.shape[1] - columns))
    top = round((0.5 + 0.5 * np.sin(2 * np.pi * progress)) * (town.shape[0] - rows))
    window = town[top : top + rows, left : left + columns].astype(np.uint16)
    blocks = window.reshape(HEIGHT, _OVERSAMPLING, WIDTH, _OVERSAMPLING, 3)
    return (blocks.sum(axis=(1, 3)) / _OVERSAMPLING**2).round().astype(np.uint8)


def draw_town() -> NDArray[np.uint8]:
    """The whole drawing, `uint8[rows, columns, 3]`; the same every time."""
    random = np.random.default_rng(_SEED)
    rows, columns = (HEIGHT + 12) * _OVERSAMPLING, int(WIDTH * 1.8) * _OVERSAMPLING
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32)
    sky = np.stack([95 + 120 * y / rows, 150 + 70 * y / rows, np.full_like(y, 225)], axis=-1)
    town = sky.astype(np.uint8)
    town[(x - columns * 0.3) ** 2 + (y - rows * 0.22) ** 2 < (rows * 0.09) ** 2] = (255, 240, 190)
    for layer, shade in enumerate(((120, 150, 150), (90, 130, 105))):
        height = rows * (0.52 + 0.1 * layer) + rows * 0.07 * (
            np.sin(x / columns * (9 + 5 * layer)) + 0.4 * np.sin(x / columns * (31 + 9 * layer) + layer)
        )
        town[y > height] = shade
    left = 0
    while left < columns:
        width, height = (int(value) for value in random.integers((120, 220), (300, 470)))
        _draw_house(town, random, left, rows - height, width)
        left += width + int(random.integers(10, 90))
    for _ in range(60):
        _draw_tree(town, random, int(random.integers(0, columns)), rows)
    # A fence of thin lines: what interpolation blurs first.
    for post in range(0, columns, 28):
        town[rows - 64 : rows - 8, post : post + 6] = (235, 230, 220)
    town[rows - 54 : rows - 49] = town[rows - 30 : rows - 25] = (235, 230, 220)
    return town


def _draw_house(town: NDArray[np.uint8], random: np.random.Generator, left: int, top: int, width: int) -> None:
    colour = random.integers((120, 90, 80), (225, 190, 170))
    town[top:, left : left + width] = colour
    for row in range(top, town.shape[0], 14):
        town[row : row + 2, left : left + width] = (colour * 0.88).astype(np.uint8)
    for roof in range(60):
        inset = roof * width // 150
        town[top - 1 - roof, left + inset : max(left + inset, left + width - inset)] = (110, 60 + roof // 4, 55)
    glass = (250, 225, 140) if random.random() < 0.5 else (60, 75, 100)
    for row in range(top + 36, town.shape[0] - 90, 74):
        for column in range(left + 22, left + width - 44, 58):
            town[row - 3 : row + 43, column - 3 : column + 33] = (245, 245, 240)
            town[row : row + 40, column : column + 30] = glass
            town[row + 18 : row + 21, column : column + 30] = (245, 245, 240)
            town[row : row + 40, column + 14 : column + 16] = (245, 245, 240)


def _draw_tree(town: NDArray[np.uint8], random: np.random.Generator, centre: int, rows: int) -> None:
    base, size = rows - int(random.integers(10, 40)), int(random.integers(30, 70))
    town[base - size : base, max(0, centre - 4) : centre + 4] = (85, 60, 45)
    for _ in range(160):
        angle, distance = random.random() * 2 * np.pi, np.sqrt(random.random()) * size
        column, row = int(centre + distance * np.cos(angle)), int(base - size * 1.4 + distance * np.sin(angle) * 0.8)
        radius = int(random.integers(3, 9))
        shade = (np.array((50, 95, 40)) + random.integers(-25, 45)).clip(0, 255)
        top, left = max(0, row - radius), max(0, column - radius)
        y, x = np.ogrid[top : min(rows, row + radius), left : min(town.shape[1], column + radius)]
        town[top : row + radius, left : column + radius][(y - row) ** 2 + (x - column) ** 2 < radius**2] = shade


if __name__ == "__main__":
    write_sample(Path(sys.argv[1]))
