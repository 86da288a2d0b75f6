"""How faithful an enlargement is, checked against areas added up one by one."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest

from tasks.media.fidelity import MOST_FIDELITY, fidelity, shrunk
from tasks.media.pixels import Colour, PictureFormat

SOURCE = PictureFormat(12, 8, "yuv420p", Colour("bt709", False))


def mean_over(plane: np.ndarray, top: Fraction, bottom: Fraction, left: Fraction, right: Fraction) -> float:
    """The average of a plane over a rectangle whose edges may lie within samples."""
    total = Fraction(0)
    for y in range(floor(top), ceil(bottom)):
        for x in range(floor(left), ceil(right)):
            area = (min(bottom, y + 1) - max(top, y)) * (min(right, x + 1) - max(left, x))
            total += area * int(plane[y, x])
    return float(total / ((bottom - top) * (right - left)))


@pytest.mark.parametrize("size", [(16, 24), (24, 36), (12, 18), (11, 17), (9, 13), (8, 12), (31, 47)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_areas_are_averaged_whatever_the_factor(size: tuple[int, int], dtype: type) -> None:
    plane = np.random.default_rng(7).integers(0, np.iinfo(dtype).max, size, dtype, endpoint=True)
    down, across = Fraction(size[0], 8), Fraction(size[1], 12)
    expected = [
        [mean_over(plane, y * down, (y + 1) * down, x * across, (x + 1) * across) for x in range(12)] for y in range(8)
    ]
    np.testing.assert_allclose(shrunk(plane, 8, 12), expected, rtol=1e-5)


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_what_shrinks_back_to_the_same_frame_has_the_most(factor: int) -> None:
    frame = np.random.default_rng(1).integers(0, 256, SOURCE.frame_bytes, np.uint8)
    target = SOURCE.resized(12 * factor, 8 * factor)
    upscaled = np.zeros(target.frame_bytes, np.uint8)
    luma = frame[: 12 * 8].reshape(8, 12).repeat(factor, 0).repeat(factor, 1)
    upscaled[: luma.size] = luma.ravel()
    assert fidelity(frame, SOURCE, upscaled, target) == MOST_FIDELITY


@pytest.mark.parametrize(("levels", "decibels"), [(1, 48.13), (5, 34.15), (255, 0.0)])
def test_a_picture_that_is_too_bright_by_some_levels(levels: int, decibels: float) -> None:
    target = SOURCE.resized(18, 12)
    frame, upscaled = np.zeros(SOURCE.frame_bytes, np.uint8), np.full(target.frame_bytes, levels, np.uint8)
    assert fidelity(frame, SOURCE, upscaled, target) == pytest.approx(decibels, abs=0.01)
