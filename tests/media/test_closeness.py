"""A frame that shows something else is told from one whose noise a model removed."""

from __future__ import annotations

import av
import numpy as np
import pytest

from tasks.media.closeness import Closeness, _block_means
from tasks.media.pixels import Colour, PictureFormat

SIDE = (72, 100)  # Rows and columns; neither is a multiple of a block.
PICTURE = PictureFormat(SIDE[1], SIDE[0], "gray", Colour("bt709", full_range=True))


def _worst(source: np.ndarray, result: np.ndarray) -> float:
    found = Closeness.to([source.ravel()], PICTURE)
    found.add(av.VideoFrame.from_ndarray(result, format="gray"), PICTURE)
    return found.worst


def test_means_of_blocks_at_borders_are_of_what_there_is() -> None:
    luma = np.arange(9 * 10, dtype=np.float32).reshape(9, 10)
    means = _block_means(luma)
    assert means.shape == (2, 2)
    assert means[0, 0] == luma[:8, :8].mean()
    assert means[1, 1] == luma[8:, 8:].mean()


@pytest.mark.parametrize("black_and_white", [False, True])
def test_snow_that_a_model_removed_is_not_far(black_and_white: bool) -> None:
    chance = np.random.default_rng(4)
    snow = chance.integers(0, 256, SIDE, dtype=np.uint8)
    if black_and_white:
        snow = np.where(snow < 128, 0, 255).astype(np.uint8)
    assert _worst(snow, np.full(SIDE, 128, np.uint8)) > 20


def test_another_picture_is_far() -> None:
    rows = np.linspace(0, 255, SIDE[0]).astype(np.uint8)[:, None].repeat(SIDE[1], axis=1)
    assert _worst(rows, rows) > 60
    assert _worst(rows, 255 - rows) < 12
    assert _worst(rows, np.zeros(SIDE, np.uint8)) < 12
