"""How faithful an enlargement is: what it gives when it is shrunk back, beside the frame it was made of.

A model may invent detail, but nothing that is not in the source may change what the source's own pixels show. The
measure needs no original in high resolution, so it can be taken of every video, while it is upscaled.
"""

from __future__ import annotations

import math
from typing import Final

import av
import numpy as np
from numpy.typing import NDArray

from tasks.media.pixels import PictureFormat

#: What equal pictures have, in dB; their PSNR is infinite, which JSON cannot say.
MOST_FIDELITY: Final = 99.0


def fidelity(
    frame: NDArray[np.uint8], source: PictureFormat, upscaled: NDArray[np.uint8], target: PictureFormat
) -> float:
    """Peak signal-to-noise ratio of luma between a frame and its enlargement, averaged back to the frame's size.

    Args:
        frame: The frame, `uint8[source.frame_bytes]`.
        source: What these bytes are.
        upscaled: Its enlargement, `uint8[target.frame_bytes]`.
        target: What these bytes are.

    Returns:
        `10 log10(peak^2 / mean squared difference)` in dB, at most `MOST_FIDELITY`.
    """
    before = _luma(frame, source).astype(np.float32)
    difference = shrunk(_luma(upscaled, target), source.height, source.width) - before
    error = float(np.mean(np.square(difference), dtype=np.float64))
    peak = (1 << av.VideoFormat(source.pix_fmt).components[0].bits) - 1
    return min(MOST_FIDELITY, 10 * math.log10(peak**2 / error)) if error else MOST_FIDELITY


def shrunk(plane: NDArray[np.uint8] | NDArray[np.uint16], rows: int, columns: int) -> NDArray[np.float32]:
    """A plane as averages over equal areas, also where these do not end between two samples.

    Args:
        plane: `uint8` or `uint16`, `[rows of the plane, columns of the plane]`.
        rows: Rows of the result.
        columns: Columns of the result.

    Returns:
        `float32[rows, columns]`.
    """
    indexes, weights = _shares(plane.shape[0], rows)
    half = np.zeros((rows, plane.shape[1]), np.float32)
    for index, weight in zip(indexes, weights, strict=True):
        half += weight[:, None] * plane[index]
    indexes, weights = _shares(plane.shape[1], columns)
    whole = np.zeros((rows, columns), np.float32)
    for index, weight in zip(indexes, weights, strict=True):
        whole += weight * half[:, index]
    return whole


def _shares(samples: int, parts: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Which samples lie in each of `parts` equal parts of a line, and how much of the part each of them fills.

    Returns:
        Indexes and weights, `[samples a part can touch, parts]`; the weights of a part are 1 together.
    """
    length = samples / parts
    ends = np.arange(parts + 1) * samples / parts
    touched = np.floor(ends[:-1]) + np.arange(math.ceil(length) + 1)[:, None]
    inside = np.minimum(touched + 1, ends[1:]) - np.maximum(touched, ends[:-1])
    indexes = np.minimum(touched, samples - 1).astype(np.int64)
    return indexes, (inside.clip(0) / length).astype(np.float32)


def _luma(frame: NDArray[np.uint8], picture: PictureFormat) -> NDArray[np.uint8] | NDArray[np.uint16]:
    size = picture.width * picture.height * picture.bytes_per_sample
    plane = frame[:size] if picture.bytes_per_sample == 1 else frame[:size].view("<u2")
    return plane.reshape(picture.height, picture.width)
