"""The picture pool: generated pairs on disk, from which the samples of a training step are cut.

What a step sees depends only on the seed and the step's number, never on a generator's running state, so a run that
was interrupted continues with exactly the samples it would have seen. This module does not load torch, because the
background process that draws the pictures imports it.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.models.training.degradation import degrade
from tasks.models.training.procedural import picture

Picture = NDArray[np.uint8]

SCALES = (2, 4)
HELD_OUT_SEED = 10**9
"""Pictures from this seed on are never trained on; training counts up from its own seed times a million."""

REFRESH_STEPS = 16
"""A new picture joins every so many steps."""

_PICTURE_SIDE = 384
_SEED_STRIDE = 10**6


def _draw_pair(number: int, seed: int) -> tuple[Picture, dict[int, Picture]]:
    """Generate picture `number` and its low-resolution frame at every scale, all uint8 of shape (h, w, 3)."""
    full = picture(seed * _SEED_STRIDE + number, _PICTURE_SIDE)
    return full, {s: degrade(full, s, np.random.default_rng([seed, number, s])) for s in SCALES}


class PicturePool:
    """A ring of generated pictures on disk, filled ahead by one background process.

    Picture number `i` lives in slot `i % capacity` and depends only on the seed and `i`, so a folder can be shared by
    several runs with the same seed, at the same time too, and a missing or outdated slot is simply generated again.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        first: int = 240,
        refresh_steps: int | None = REFRESH_STEPS,
        capacity: int = 1600,
        workers: int = 1,
    ) -> None:
        """Open or create the pool.

        Args:
            folder: Where the arrays lie; created if missing.
            seed: Seed of the pictures and the crops, less than a thousand.
            first: Pictures to have before the first step.
            refresh_steps: A new picture joins every so many steps; never if `None`.
            capacity: Most pictures kept; beyond that a new one replaces the oldest.
            workers: Processes that draw pictures.

        Raises:
            ValueError: If the seed is so large that training would reach the held-out pictures.
        """
        if not 0 <= seed < HELD_OUT_SEED // _SEED_STRIDE:
            raise ValueError(f"seed {seed} is outside 0..{HELD_OUT_SEED // _SEED_STRIDE - 1}")
        folder.mkdir(parents=True, exist_ok=True)
        self._seed, self._first, self._refresh_steps, self._capacity = seed, first, refresh_steps, capacity
        key, side = f"{seed}-{capacity}", _PICTURE_SIDE
        self._full = _open_array(folder / f"full-{key}.npy", (capacity, side, side, 3), np.uint8)
        self._small = {
            s: _open_array(folder / f"x{s}-{key}.npy", (capacity, side // s, side // s, 3), np.uint8) for s in SCALES
        }
        # Slots hold the picture's number plus one, so that the zeros of a new file mean "empty".
        self._held = _open_array(folder / f"held-{key}.npy", (capacity,), np.int64)
        self._pending: dict[int, Future[tuple[Picture, dict[int, Picture]]]] = {}
        # Spawned, because forking a process in which torch already runs threads can deadlock.
        self._worker = ProcessPoolExecutor(
            max_workers=workers, mp_context=multiprocessing.get_context("spawn"), initializer=os.nice, initargs=(5,)
        )

    def __enter__(self) -> PicturePool:
        """Return the pool itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the background process."""
        self._worker.shutdown(cancel_futures=True)

    def _prepare(self, step: int) -> NDArray[np.int64]:
        """Make every picture of a step present, order the next two and return the slots to sample from."""
        refresh = self._refresh_steps
        produced = self._first + (step // refresh if refresh else 0)
        numbers = np.arange(max(0, produced - self._capacity), produced)
        slots = numbers % self._capacity
        missing = numbers[self._held[slots] != numbers + 1].tolist()
        for number in [*missing, produced, produced + 1] if refresh else missing:
            if number not in self._pending and self._held[number % self._capacity] != number + 1:
                self._pending[number] = self._worker.submit(_draw_pair, number, self._seed)
        for number in missing:
            full, small = self._pending.pop(number).result()
            slot = number % self._capacity
            self._full[slot] = full
            for s in SCALES:
                self._small[s][slot] = small[s]
            self._held[slot] = number + 1
        return slots

    def pictures(self, scale: int) -> tuple[Picture, Picture]:
        """All pictures of the first step, drawn if need be.

        Args:
            scale: Upscaling factor.

        Returns:
            Low-resolution frames of shape (count, side / scale, side / scale, 3) and the pictures themselves, shape
            (count, side, side, 3), both uint8 RGB.
        """
        slots = self._prepare(0)
        return self._small[scale][slots], self._full[slots]

    def samples(self, step: int, scale: int, count: int, patch: int) -> tuple[Picture, Picture]:
        """Cut, turn and mirror the samples of a step.

        Args:
            step: Step number, from 0.
            scale: Upscaling factor.
            count: Number of samples.
            patch: Side of a low-resolution sample in pixels.

        Returns:
            Samples of shape (count, patch, patch, 3) and targets of shape (count, patch * scale, patch * scale, 3),
            both uint8 RGB.
        """
        slots = self._prepare(step)
        rng = np.random.default_rng([self._seed, 0xBA7C4, step])
        room = _PICTURE_SIDE // scale - patch + 1
        inputs: list[Picture] = []
        targets: list[Picture] = []
        for _ in range(count):
            slot, top, left = int(rng.integers(len(slots))), int(rng.integers(room)), int(rng.integers(room))
            turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
            for array, chosen, factor in ((self._small[scale], inputs, 1), (self._full, targets, scale)):
                rows = slice(top * factor, (top + patch) * factor)
                columns = slice(left * factor, (left + patch) * factor)
                turned = np.rot90(array[slots[slot], rows, columns], turns)
                chosen.append(turned[:, ::-1] if mirrored else turned)
        return np.stack(inputs), np.stack(targets)


def _open_array(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """Map an array file for reading and writing, creating it (sparse, all zero) if it is missing."""
    mode = "r+" if path.exists() else "w+"
    return np.lib.format.open_memmap(path, mode=mode, dtype=dtype, shape=shape)
