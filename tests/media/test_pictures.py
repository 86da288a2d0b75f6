"""Pictures to look at: the right window, the right colours, panels in their places."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from tasks.media.pictures import MOST_BYTES, cut, data_uri, detail_window, enlarge, frame_rgb, side_by_side
from tasks.media.pixels import Colour, PictureFormat


def flat(rows: int, columns: int, colour: tuple[int, int, int] = (90, 90, 90)) -> np.ndarray:
    return np.full((rows, columns, 3), colour, dtype=np.uint8)


def noise(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


def decoded(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)))


@pytest.mark.parametrize(("x", "y"), [(0, 0), (37, 21), (80, 44)])
def test_the_window_lies_on_the_only_texture(x: int, y: int) -> None:
    frame = flat(64, 100)
    frame[y : y + 20, x : x + 20] = noise(20, 20)
    found_x, found_y = detail_window(frame, 22, 22)
    # Steps from the texture to the flat around it count too: a window one pixel off may hold more of them.
    assert abs(found_x - min(max(x - 1, 0), 78)) <= 1
    assert abs(found_y - min(max(y - 1, 0), 42)) <= 1


def test_many_small_steps_win_over_one_large_one() -> None:
    frame = flat(60, 120)
    frame[:, 90:] = 255
    frame[10:40, 5:35] = noise(30, 30) // 4 + 80
    x, _ = detail_window(frame, 30, 30)
    assert x < 40


def test_the_middle_of_a_flat_picture_is_taken() -> None:
    assert detail_window(flat(48, 64), 16, 12) == (24, 18)


def test_a_window_larger_than_the_picture_is_the_picture() -> None:
    assert detail_window(noise(24, 32), 100, 100) == (0, 0)


@pytest.mark.parametrize(
    ("colour", "yuv"),
    [
        # White and the primaries of 8-bit studio range by the equations of BT.709 and BT.601; JPEG's full range.
        (Colour("bt709", False), {(235, 128, 128): (255, 255, 255), (63, 102, 240): (255, 0, 0)}),
        (Colour("smpte170m", False), {(16, 128, 128): (0, 0, 0), (81, 90, 240): (254, 0, 0)}),
        (Colour("smpte170m", True), {(255, 128, 128): (255, 255, 255), (76, 85, 255): (254, 0, 0)}),
    ],
)
def test_planes_become_the_colours_that_their_matrix_and_range_mean(
    colour: Colour, yuv: dict[tuple[int, int, int], tuple[int, int, int]]
) -> None:
    picture = PictureFormat(16, 8, "yuv420p", colour)
    for codes, expected in yuv.items():
        planes = [
            np.full(rows * columns, code) for code, (rows, columns) in zip(codes, picture.plane_shapes, strict=True)
        ]
        rgb = frame_rgb(np.concatenate(planes).astype(np.uint8), picture)
        assert rgb.shape == (8, 16, 3)
        assert np.abs(rgb.astype(int) - expected).max() <= 1, (codes, rgb[0, 0])


def test_panels_stand_side_by_side_below_their_labels() -> None:
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    sheet = decoded(side_by_side([(f"model {n}", flat(80, 100, colour)) for n, colour in enumerate(colours)]))
    head = sheet.shape[0] - 80
    assert sheet.shape[1] == 3 * 100 + 2 * 8
    for number, colour in enumerate(colours):
        left = number * 108
        panel = sheet[head + 8 : -8, left + 8 : left + 92].astype(int)
        assert np.abs(panel - colour).max() <= 6
        label = sheet[:head, left : left + 100]
        assert label.min() < 100 and label.max() > 240  # Something is written, on paper.


def test_what_does_not_fit_beside_the_others_goes_below_them() -> None:
    sheet = decoded(side_by_side([(str(number), flat(60, 900)) for number in range(3)]))
    assert sheet.shape[1] == 1808
    assert sheet.shape[0] > 2 * 60
    assert (sheet[-30, 1000:] > 240).all()  # Nothing stands beside the third.


def test_a_long_label_stays_above_its_panel() -> None:
    sheet = decoded(side_by_side([("a" * 200, flat(40, 60)), ("", flat(40, 60))]))
    assert sheet[: sheet.shape[0] - 40, 62:].min() > 200


def test_panels_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="one size"):
        side_by_side([("a", flat(10, 10)), ("b", flat(10, 12))])
    with pytest.raises(ValueError, match="at least one"):
        side_by_side([])


def test_pictures_stay_small_enough_for_a_report() -> None:
    panels = [(str(number), noise(240, 320)) for number in range(3)]
    easy = [(str(number), flat(240, 320)) for number in range(3)]
    assert len(side_by_side(easy)) < len(side_by_side(panels)) <= MOST_BYTES


def test_a_cut_shows_the_same_place_in_every_size() -> None:
    frame = noise(20, 30)
    large = np.repeat(np.repeat(frame, 4, axis=0), 4, axis=1)
    assert (cut(large, 4 * 7, 4 * 3, 40, 32)[::4, ::4] == cut(frame, 7, 3, 10, 8)).all()


def test_enlarging_keeps_flat_colours_and_gives_the_size() -> None:
    large = enlarge(flat(9, 16, (12, 130, 250)), 64, 36)
    assert large.shape == (36, 64, 3)
    assert (large == (12, 130, 250)).all()


def test_a_data_uri_holds_the_file() -> None:
    jpeg = side_by_side([("a", flat(20, 20))])
    kind, _, text = data_uri(jpeg).partition(",")
    assert kind == "data:image/jpeg;base64"
    assert base64.b64decode(text) == jpeg
