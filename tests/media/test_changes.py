"""What is found to have changed between two frames, and what is kept of them."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.media import changes as changes_module
from tasks.media.changes import BLOCK, Box, Change, ChangeFinder, cut_out, paste, planes
from tasks.media.pixels import Colour, PictureFormat

PICTURE = PictureFormat(150, 101, "yuv420p", Colour("bt709", full_range=False))  # Not a multiple of anything.


def noise(picture: PictureFormat = PICTURE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, picture.frame_bytes, np.uint8)


def changed(*places: tuple[int, int, int], by: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A frame, and one that differs from it at (plane, row, column)."""
    known = noise() // 2
    frame = known.copy()
    for plane, row, column in places:
        planes(frame, PICTURE)[plane][row, column] += by
    return frame, known


def test_nothing() -> None:
    assert ChangeFinder(PICTURE, 8).changes(*changed()) == []


@pytest.mark.parametrize(
    ("place", "luma"),
    [((0, 0, 0), (0, 0)), ((0, 100, 149), (100, 149)), ((1, 20, 30), (40, 60)), ((2, 50, 74), (100, 148))],
)
def test_a_sample_is_found_in_its_block(place: tuple[int, int, int], luma: tuple[int, int]) -> None:
    (change,) = ChangeFinder(PICTURE, 8).changes(*changed(place)) or []
    top, left = luma[0] // BLOCK * BLOCK, luma[1] // BLOCK * BLOCK
    assert change.changed == Box(top, left, min(101, top + BLOCK), min(150, left + BLOCK))
    assert change.affected == change.changed.grown(8, 150, 101)
    assert change.needed == change.changed.grown(16, 150, 101)
    assert change.needed.top % 2 == change.needed.left % 2 == 0


def test_boxes_hold_all_changes_and_little_else() -> None:
    random = np.random.default_rng(3)
    for _ in range(50):
        places = [(0, random.integers(101), random.integers(150)) for _ in range(random.integers(1, 5))]
        found = ChangeFinder(PICTURE, 2).changes(*changed(*places))
        boxes = [Box(0, 0, 101, 150)] if found is None else [change.changed for change in found]
        for _, row, column in places:
            assert any(box.top <= row < box.bottom and box.left <= column < box.right for box in boxes)


@pytest.mark.parametrize("reach", [2, 20, 40])
def test_a_frame_is_given_up_early_only_if_its_boxes_would_give_it_up(
    reach: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random, picture = np.random.default_rng(reach), PICTURE.resized(420, 333)
    finder, known = ChangeFinder(picture, reach), noise(PICTURE.resized(420, 333))
    found: list[list[Change] | None] = []
    frames = []
    for count in range(1, 40):
        frame = known.copy()
        planes(frame, picture)[0][random.integers(333, size=count), random.integers(420, size=count)] ^= 1
        frames.append(frame)
        found.append(finder.changes(frame, known))
    assert None in found
    monkeypatch.setattr(changes_module, "_grown", lambda blocks, margin: np.zeros_like(blocks))
    assert found == [finder.changes(frame, known) for frame in frames]


def test_far_apart_changes_are_boxes_of_their_own() -> None:
    large = PICTURE.resized(1280, 720)
    known = noise(large)
    frame = known.copy()
    for row, column in ((0, 0), (719, 1279)):
        planes(frame, large)[0][row, column] ^= 1
    found = ChangeFinder(large, 20).changes(frame, known) or []
    assert sorted(change.changed.top for change in found) == [0, 704]
    for column in range(0, 200, 20):  # Close ones are one.
        planes(frame, large)[0][4, column] ^= 255
    assert len(ChangeFinder(large, 20).changes(frame, known) or []) == 2


def test_a_frame_that_changed_nearly_everywhere() -> None:
    assert ChangeFinder(PICTURE, 8).changes(noise(seed=1), noise(seed=2)) is None
    assert ChangeFinder(PICTURE, 60).changes(*changed((0, 50, 70))) is None


@pytest.mark.parametrize(("by", "tolerance", "count"), [(3, 3, 0), (4, 3, 1), (1, 0, 1)])
def test_small_differences_count_as_none_if_asked(by: int, tolerance: int, count: int) -> None:
    frame, known = changed((1, 5, 5), by=by)
    finder = ChangeFinder(PICTURE, 8, tolerance)
    assert len(finder.changes(frame, known) or []) == count
    assert len(finder.changes(known, frame) or []) == count


def test_parts_are_put_back_where_they_were() -> None:
    frame, box = noise(), Box(16, 32, 101, 150)
    part_picture = PICTURE.resized(*box.size)
    part = cut_out(frame, PICTURE, box)
    assert part.shape == (part_picture.frame_bytes,)
    other = noise(seed=5)
    inner = Box(20, 40, 60, 150)
    paste(other, PICTURE, inner, part, part_picture, inner.within(box))
    luma = planes(other, PICTURE)[0]
    np.testing.assert_array_equal(luma[20:60, 40:], planes(frame, PICTURE)[0][20:60, 40:])
    np.testing.assert_array_equal(luma[:20], planes(noise(seed=5), PICTURE)[0][:20])
    np.testing.assert_array_equal(planes(other, PICTURE)[2][10:30, 20:], planes(frame, PICTURE)[2][10:30, 20:])
