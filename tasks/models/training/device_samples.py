"""Samples for training on a GPU: cut out of pictures that lie there, all of a step at once."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class DeviceSamples:
    """Pictures on a device, and samples cut out of them.

    Args:
        small: Low-resolution frames, uint8 (count, side / scale, side / scale, 3).
        full: The pictures, uint8 (count, side, side, 3).
        seed: Seed of the crops.
        device: Where.
    """

    def __init__(self, small: NDArray[np.uint8], full: NDArray[np.uint8], seed: int, device: str) -> None:
        self._small, self._full = (torch.from_numpy(pictures).to(device) for pictures in (small, full))
        self._seed, self._scale = seed, full.shape[1] // small.shape[1]

    def __call__(self, step: int, count: int, patch: int) -> tuple[Tensor, Tensor]:
        """Cut, turn and mirror the samples of a step, which depend on the seed and the step's number alone.

        Args:
            step: Step number, from 0.
            count: Number of samples.
            patch: Side of a low-resolution sample in pixels.

        Returns:
            Float32 samples `[count, 3, patch, patch]` and targets `[count, 3, patch * scale, patch * scale]`, 0..1.
        """
        rng = np.random.default_rng([self._seed, 0xBA7C4, step])
        room = self._small.shape[1] - patch + 1
        chosen = np.stack([rng.integers(len(self._small), size=count), *rng.integers(room, size=(2, count))])
        mirrored = rng.integers(2, size=(2, count, 1))
        transposed = bool(rng.integers(2))
        places, mirrors = (torch.from_numpy(values).to(self._small.device) for values in (chosen, mirrored))

        def cut(pictures: Tensor, scale: int) -> Tensor:
            steps = torch.arange(patch * scale, device=pictures.device)
            rows, columns = (
                scale * places[1 + axis, :, None] + torch.where(mirrors[axis] > 0, steps.flip(0), steps)
                for axis in (0, 1)
            )
            samples = pictures[places[0, :, None, None], rows[:, :, None], columns[:, None, :]]
            samples = samples.transpose(1, 2) if transposed else samples
            return samples.permute(0, 3, 1, 2).float().div_(255.0).contiguous(memory_format=torch.channels_last)

        return cut(self._small, 1), cut(self._full, self._scale)
