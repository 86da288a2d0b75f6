"""Classical resampling of packed frames: what every model has to beat, and how frames are shrunk to try one.

    plain = Resampler(source, target)       # bicubic
    larger = plain(frames)                  # uint8 [n, source.frame_bytes] -> uint8 [n, target.frame_bytes]

Colours go the way they go around a network: to RGB in float, through the kernel, and back to code values once.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tasks.media.colour import PlanesToRgb, RgbToPlanes
from tasks.media.pixels import PictureFormat

KERNELS: Final = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
"""Keys' cubic (a = -1/2) over four samples, and Lanczos over six; both are stretched when they shrink a picture, so
that nothing aliases."""


class Resampler:
    """Frames of one size to another one.

    Args:
        source: Format of the frames it takes.
        target: Format of those it gives.
        kernel: A key of `KERNELS`.

    Raises:
        UnsupportedSourceError: The colour description is not supported.
    """

    def __init__(self, source: PictureFormat, target: PictureFormat, kernel: str = "bicubic") -> None:
        self.target = target
        self._kernel = KERNELS[kernel]
        self._to_rgb, self._to_planes = PlanesToRgb(source), RgbToPlanes(target)

    def __call__(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resample.

        Args:
            frames: uint8 `[n, source.frame_bytes]`.

        Returns:
            uint8 `[n, target.frame_bytes]`.
        """
        rgb = self._to_rgb(torch.from_numpy(frames)).numpy()
        size = (self.target.width, self.target.height)
        resized = [[np.asarray(Image.fromarray(plane).resize(size, self._kernel)) for plane in frame] for frame in rgb]
        # As the engine does with what a network gives: overshoots end at black and white.
        return self._to_planes(torch.from_numpy(np.asarray(resized)).clamp_(0, 1)).numpy()
