"""Measures of quality against values worked out by hand, and against their definitions written out."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tasks.errors import ChunkFileError
from tasks.media.chunk_file import ChunkWriter
from tasks.media.pixels import Colour, PictureFormat
from tasks.media.quality import (
    LARGEST_PSNR,
    WithoutReference,
    WithReference,
    flicker,
    gradient_energy,
    inner,
    luma_of,
    psnr,
    ssim,
)
from tasks.media.recode import recoded_planes
from tasks.media.vmaf import has_vmaf, vmaf

RATE = Fraction(24000, 1001)


def plane(*rows: list[int]) -> np.ndarray:
    return np.array(rows, dtype=np.uint8)


def noise(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns), dtype=np.uint8)


def picture(width: int, height: int) -> PictureFormat:
    return PictureFormat(width, height, "yuv420p", Colour("bt709", full_range=False))


def moving(form: PictureFormat, count: int) -> np.ndarray:
    """Frames of smooth tiles that move, uint8 `[count, frame_bytes]`."""
    tiles = noise(form.height // 8, form.width // 8, 7).repeat(8, 0).repeat(8, 1)
    frames = np.full((count, form.frame_bytes), 128, np.uint8)
    for index in range(count):
        luma_of(frames[index], form)[:] = np.roll(tiles, 2 * index, 1)
    return frames


def test_psnr_of_a_constant_error_is_that_of_its_square() -> None:
    dark, light = plane([10, 20], [30, 40]), plane([15, 15], [35, 35])
    assert psnr(dark, light) == pytest.approx(10 * np.log10(65025 / 25))
    assert psnr(dark, light) == psnr(light, dark) == pytest.approx(34.1514, abs=1e-4)
    assert psnr(dark, dark) == float("inf")


def test_ssim_is_that_of_its_definition_at_every_place() -> None:
    # Higher than the strips it is computed in.
    reference, output = noise(77, 13, 1), noise(77, 13, 2) // 3 + noise(77, 13, 1) // 2
    distance = np.arange(11) - 5
    weights = np.exp(-(distance[:, None] ** 2 + distance[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for top in range(77 - 10):
        for left in range(13 - 10):
            x, y = (each[top : top + 11, left : left + 11].astype(float) for each in (output, reference))
            mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
            var_x, var_y = (weights * (x - mean_x) ** 2).sum(), (weights * (y - mean_y) ** 2).sum()
            both = (weights * (x - mean_x) * (y - mean_y)).sum()
            luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
            values.append(luminance * (2 * both + c2) / (var_x + var_y + c2))
    assert ssim(output, reference) == pytest.approx(np.mean(values), abs=1e-9)
    assert ssim(reference, reference) == pytest.approx(1)


def test_flicker_counts_changes_that_the_original_has_not() -> None:
    before, after = plane([100, 100]), plane([104, 100])
    assert flicker(after, before, plane([51, 50]), plane([50, 50])) == 1.5  # (|4 - 1| + |0 - 0|) / 2
    # An error that stays the same is none of it, nor is motion that is in both; code values do not wrap around.
    assert flicker(before, before, plane([0, 0]), plane([0, 0])) == 0
    assert flicker(plane([0, 255]), plane([255, 0]), plane([0, 255]), plane([255, 0])) == 0
    assert flicker(plane([0, 255]), plane([255, 0]), before, before) == 255


def test_gradient_energy_is_the_mean_square_of_differences_to_the_right_and_down() -> None:
    assert gradient_energy(plane([0, 2], [3, 200])) == 2**2 + 3**2
    assert gradient_energy(plane([0, 2, 2], [3, 0, 0])) == (4 + 9 + 0 + 4) / 2
    assert gradient_energy(np.full((5, 5), 200, np.uint8)) == 0


def test_a_clip_is_judged_by_its_original_without_the_border() -> None:
    reference = [noise(30, 20, seed) // 2 for seed in range(3)]
    output = [frame.copy() for frame in reference]
    output[1] += 5
    for frame in output:
        frame[:2] = frame[-2:] = frame[:, :2] = frame[:, -2:] = 255
    judged = WithReference(2)
    for one, other in zip(output, reference, strict=True):
        judged.add(one, other)
        one[:] = 0  # What was given may be used again by whoever gave it.
    worst = 10 * np.log10(65025 / 25)
    summary = judged.summary()
    assert summary["psnr_worst"] == pytest.approx(worst)
    assert summary["psnr"] == pytest.approx((2 * LARGEST_PSNR + worst) / 3)
    assert summary["flicker"] == 5  # Up by 5 and down by 5 again.
    assert 0.9 < summary["ssim"] < 1  # type: ignore[operator]

    single = WithReference(0)
    single.add(reference[0], reference[0])
    assert single.summary() == {"psnr": LARGEST_PSNR, "psnr_worst": LARGEST_PSNR, "ssim": 1.0, "flicker": None}


def test_without_an_original_a_result_is_judged_beside_plain_interpolation() -> None:
    plain = [noise(24, 24, seed) // 4 for seed in range(3)]
    source = [noise(12, 12, seed) // 4 for seed in range(3)]
    judged = WithoutReference(2, scale=2)
    for frame, small in zip(plain, source, strict=True):
        judged.add(2 * frame, frame, small + np.uint8(1), small)
    assert judged.summary() == {
        "fidelity": pytest.approx(10 * np.log10(65025)),
        "sharpness": pytest.approx(4),  # Twice the contrast, squared.
        "flicker_ratio": pytest.approx(2),
    }
    still = WithoutReference(2, scale=2)
    for _ in range(2):
        still.add(np.zeros((24, 24)), np.zeros((24, 24)), source[0], source[0])
    assert still.summary() == {"fidelity": LARGEST_PSNR, "sharpness": None, "flicker_ratio": None}


def test_the_border_of_a_plane_is_what_lies_around_its_inside() -> None:
    whole = noise(6, 8)
    assert inner(whole, 2).tolist() == whole[2:4, 2:6].tolist()
    assert inner(whole, 0).shape == (6, 8)


def test_recoding_keeps_order_and_loses_what_the_rate_factor_says() -> None:
    form = picture(64, 48)
    frames = moving(form, 7)
    untouched, fine, coarse = (np.stack(list(recoded_planes(frames, form, crf, RATE))) for crf in (0, 15, 40))
    np.testing.assert_array_equal(untouched, frames)
    assert fine.shape == coarse.shape == frames.shape
    for index, frame in enumerate(frames):
        errors = [float(np.mean((fine[index].astype(float) - other) ** 2)) for other in frames]
        assert int(np.argmin(errors)) == index
        assert psnr(luma_of(fine[index], form), luma_of(frame, form)) > 3 + psnr(
            luma_of(coarse[index], form), luma_of(frame, form)
        )


@pytest.mark.skipif(not has_vmaf(), reason="this ffmpeg has no libvmaf")
def test_vmaf_tells_a_blurred_clip_from_its_original(tmp_path: Path) -> None:
    form = picture(96, 64)
    frames = moving(form, 6)
    blurred = frames.copy()
    for frame in blurred:
        luma = luma_of(frame, form)
        luma[:] = sum(np.roll(luma.astype(int), shift, 1) for shift in range(-3, 4)) // 7
    folder = tmp_path / "with, comma: and 'quotes'"
    folder.mkdir()
    paths = {}
    for name, content in (("sharp", frames), ("blurred", blurred), ("short", frames[:1])):
        paths[name] = folder / f"{name}.yuv"
        with ChunkWriter(paths[name], form) as writer:
            writer.write(content)
    perfect = vmaf(paths["sharp"], paths["sharp"], RATE)
    assert 90 < perfect <= 100
    worse = vmaf(paths["blurred"], paths["sharp"], RATE)
    assert 0 <= worse < perfect - 10
    # Blur is judged against what is sharp, not the other way round.
    assert vmaf(paths["sharp"], paths["blurred"], RATE) > worse + 10
    with pytest.raises(ChunkFileError, match="missing"):
        vmaf(paths["sharp"], folder / "nowhere.yuv", RATE)
