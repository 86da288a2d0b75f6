"""A convolution of `winograd_program` with its weights, and the memory in which pictures go from one to the next."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tasks.models.backends.winograd_program import CELL, Convolution, aligned, compiled, vector_floats

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_Part = TypeVar("_Part")


class Threads:
    """So many threads share the work on a picture; that of the caller does it if it is one.

    Args:
        count: How many.
    """

    def __init__(self, count: int) -> None:
        self.count = max(1, count)
        self._pool = ThreadPoolExecutor(self.count, "part") if self.count > 1 else None

    def each(self, work: Callable[[_Part], None], parts: Iterable[_Part]) -> None:
        """Do the work on all parts."""
        list(map(work, parts) if self._pool is None else self._pool.map(work, parts))


class Memory(threading.local):
    """Pieces of memory of each thread, kept for the next picture."""

    def __init__(self) -> None:
        self._pieces: dict[str, Floats] = {}

    def get(self, name: str, *shape: int) -> Floats:
        """The piece of that name in that shape, with whatever it holds: zeros at first."""
        size = math.prod(shape)
        piece = self._pieces.get(name)
        if piece is None or len(piece) < size:
            self._pieces.pop(name, None)
            piece = self._pieces[name] = aligned(size)
        return piece[:size].reshape(shape)


@dataclass(frozen=True)
class Layer:
    """A convolution with its weights, and the slopes of its channels if it has any."""

    work: Convolution
    weight: Floats
    bias: Floats
    slope: Floats

    def apply(
        self, memory: Memory, source: Floats, target: Floats, size: tuple[int, int], extra: Floats | None = None
    ) -> bool:
        """Compute rows and columns of a picture.

        Args:
            memory: For what is in between.
            source: From its first pixel on; there is one more on all sides.
            target: From its first pixel on; there is one more row and column if the size is odd.
            size: Rows and columns.
            extra: What the program takes as such, by default the slopes.

        Returns:
            Whether all that a last layer gave was finite.
        """
        extra = self.slope if extra is None else extra
        scratch = memory.get("scratch", self.work.scratch_floats)
        watched = aligned(vector_floats())
        compiled(self.work)(
            *(address(source), row_of(source), address(target), row_of(target)),
            *(even(length) // CELL for length in size),
            *(address(array) for array in (self.weight, self.bias, extra)),
            *(row_of(extra), address(scratch), address(watched)),
        )
        return bool(np.isfinite(watched).all())


def address(array: NDArray[Any]) -> int:
    """Where it begins."""
    return array.ctypes.data


def row_of(array: NDArray[Any]) -> int:
    """Elements from a row to the next."""
    return array.strides[0] // array.itemsize


def even(length: int) -> int:
    """So many pixels or more that they are whole cells."""
    return length + -length % CELL
