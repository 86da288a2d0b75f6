"""Degradation: how a low-resolution frame is derived from a full-resolution picture.

More than half of the samples are plain antialiased shrinks rounded to 8 bit, so that the model is a faithful
interpolator first. The others are mildly blurred, noisy or coded (JPEG, H.264), so that it does not sharpen the
artefacts of ordinary video.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from tasks.media.recode import recoded

Picture = NDArray[np.uint8]

_KERNELS = (Image.Resampling.BICUBIC, Image.Resampling.BOX, Image.Resampling.LANCZOS)
_KERNEL_WEIGHTS = (0.8, 0.1, 0.1)


def shrink(picture: Picture, scale: int, kernel: Image.Resampling = Image.Resampling.BICUBIC) -> Picture:
    """Shrink a picture with an antialiasing kernel and 8-bit rounding.

    Args:
        picture: Shape (height, width, 3), uint8 RGB; both sides multiples of `scale`.
        scale: Integer factor.
        kernel: Pillow resampling kernel; its support is widened by the factor, so it does not alias.

    Returns:
        Picture of shape (height / scale, width / scale, 3), uint8 RGB.
    """
    height, width = picture.shape[:2]
    return np.asarray(Image.fromarray(picture).resize((width // scale, height // scale), kernel))


def rgb_pixels(frame: av.VideoFrame) -> Picture:
    """Convert a decoded frame to pixels of shape (height, width, 3), uint8 RGB."""
    return frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)


def code_h264(frames: Sequence[Picture], crf: int, preset: str = "medium") -> list[Picture]:
    """Encode frames with H.264 in 4:2:0 and decode them again.

    Args:
        frames: Pictures of one shape (height, width, 3), uint8 RGB; height and width even.
        crf: Constant rate factor, 0 (best) to 51.
        preset: x264 preset.

    Returns:
        The decoded pictures, in order, shapes and dtype as given.
    """
    given = (av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24") for frame in frames)
    return [rgb_pixels(frame) for frame in recoded(given, crf, preset)]


def _code_jpeg(picture: Picture, quality: int, subsampling: int) -> Picture:
    """Round-trip a picture of shape (height, width, 3), uint8, through JPEG; subsampling 0 is 4:4:4 and 2 is 4:2:0."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return np.asarray(Image.open(buffer).convert("RGB"))


def _code_panned(picture: Picture, scale: int, kernel: Image.Resampling, rng: np.random.Generator) -> Picture:
    """Pan over the picture for a few frames, code the shrunk run with H.264 and return the frame without offset.

    Args:
        picture: Shape (height, width, 3), uint8 RGB.
        scale: Integer shrink factor.
        kernel: Pillow resampling kernel.
        rng: Source of randomness.

    Returns:
        The decoded low-resolution frame of shape (height / scale, width / scale, 3), uint8 RGB.
    """
    count = int(rng.integers(1, 6))
    kept = int(rng.integers(count))
    velocity = rng.normal(0.0, 2.5, 2)
    margin = 32
    padded = np.pad(picture, ((margin, margin), (margin, margin), (0, 0)), mode="reflect")
    height, width = picture.shape[:2]
    run = []
    for index in range(count):
        dy, dx = (np.clip(np.round(velocity * (index - kept)), -margin, margin) + margin).astype(int).tolist()
        run.append(shrink(np.ascontiguousarray(padded[dy : dy + height, dx : dx + width]), scale, kernel))
    preset = ("veryfast", "medium")[int(rng.integers(2))]
    return code_h264(run, crf=int(rng.integers(17, 29)), preset=preset)[kept]


def degrade(picture: Picture, scale: int, rng: np.random.Generator) -> Picture:
    """Derive a low-resolution frame from a picture with a randomly chosen, mild degradation.

    Args:
        picture: Shape (height, width, 3), uint8 RGB; both sides multiples of `2 * scale`.
        scale: Integer shrink factor.
        rng: Source of randomness.

    Returns:
        Frame of shape (height / scale, width / scale, 3), uint8 RGB.
    """
    kernel = _KERNELS[int(rng.choice(len(_KERNELS), p=_KERNEL_WEIGHTS))]
    draw = rng.random()
    if draw < 0.55:
        return shrink(picture, scale, Image.Resampling.BICUBIC if draw < 0.48 else kernel)
    if draw < 0.83:
        return _code_panned(picture, scale, kernel, rng)
    if rng.random() < 0.35:
        blurred = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(float(rng.uniform(0.2, 0.35)) * scale))
        picture = np.asarray(blurred)
    frame = shrink(picture, scale, kernel)
    if rng.random() < 0.35:
        noise = rng.standard_normal(frame.shape, dtype=np.float32) * np.float32(rng.uniform(0.5, 3.0))
        frame = np.clip(frame + noise + 0.5, 0.0, 255.0).astype(np.uint8)
    if rng.random() < 0.7:
        frame = _code_jpeg(frame, quality=int(rng.integers(60, 96)), subsampling=(0, 2)[int(rng.integers(2))])
    return frame
