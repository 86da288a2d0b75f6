"""Classical resampling against what it has to keep, and against the resizing of the engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tasks.media.colour import PlanesToRgb, RgbToPlanes
from tasks.media.quality import gradient_energy, luma_of, psnr
from tasks.models.classical import KERNELS, Resampler
from tests.models.samples import picture_format, yuv_frames

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL, LARGE = picture_format(48, 32), picture_format(96, 64)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("source", "target"), [(SMALL, LARGE), (LARGE, SMALL), (LARGE, picture_format(32, 24))])
def test_one_colour_stays_as_it_is(kernel: str, source, target) -> None:
    frame = np.concatenate([np.full(rows * columns, v, np.uint8) for (rows, columns), v in
                            zip(source.plane_shapes, (90, 110, 150), strict=True)])  # fmt: skip
    resampled = Resampler(source, target, kernel)(frame[None])[0]
    expected = [
        np.full(rows * columns, v) for (rows, columns), v in zip(target.plane_shapes, (90, 110, 150), strict=True)
    ]
    assert resampled.shape == (target.frame_bytes,)
    assert np.abs(resampled.astype(int) - np.concatenate(expected)).max() <= 1


@pytest.mark.parametrize(("source", "target"), [(SMALL, LARGE), (LARGE, SMALL)])
def test_bicubic_is_that_of_the_engine(source, target) -> None:
    frames = yuv_frames(source, 2)
    rgb = PlanesToRgb(source)(torch.from_numpy(frames))
    size = (target.height, target.width)
    resized = F.interpolate(rgb, size, mode="bicubic", antialias=True, align_corners=False).clamp_(0, 1)
    expected = RgbToPlanes(target)(resized).numpy()
    assert np.abs(Resampler(source, target)(frames).astype(int) - expected).max() <= 1


def test_lanczos_is_another_kernel_that_is_a_little_sharper() -> None:
    frames = yuv_frames(SMALL, 1)
    bicubic, lanczos = (luma_of(Resampler(SMALL, LARGE, kernel)(frames)[0], LARGE) for kernel in KERNELS)
    assert 35 < psnr(bicubic, lanczos) < 60
    assert gradient_energy(lanczos) > gradient_energy(bicubic)


def test_what_is_enlarged_and_shrunk_again_is_nearly_what_it_was() -> None:
    frames = yuv_frames(SMALL, 1)
    back = Resampler(LARGE, SMALL)(Resampler(SMALL, LARGE)(frames))
    assert psnr(luma_of(back[0], SMALL), luma_of(frames[0], SMALL)) > 35
