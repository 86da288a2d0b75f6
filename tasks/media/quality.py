"""Quality of pictures, in numbers: luma PSNR, structural similarity, sharpness and flicker.

All measures are of luma, in code values of 8 bits (0 to 255). `WithReference` judges a clip by its original,
`WithoutReference` one that has none. Both take a frame at a time and keep only the one before.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tasks.media.pixels import PictureFormat

Plane = NDArray[Any]
"""Luma of one frame, `[rows, columns]`, of any type."""

PEAK: Final = 255.0
"""Largest code value."""

LARGEST_PSNR: Final = 60.0
"""What a frame counts as that equals its reference, whose PSNR is infinite: 6 dB per bit and 12 more, as libvmaf does.

Rounding an exact result to 8 bits costs more (58.9 dB).
"""

_WINDOW: Final = 11
_DEVIATION: Final = 1.5
_STRIP: Final = 32
"""Rows that structural similarity is computed of at a time, so that they stay in the cache of a core."""


def luma_of(frame: NDArray[np.uint8], picture: PictureFormat) -> NDArray[np.uint8]:
    """Luma of a packed frame, as a view.

    Args:
        frame: uint8 `[picture.frame_bytes]`.
        picture: Its format.

    Returns:
        uint8 `[rows, columns]`.
    """
    return frame[: picture.width * picture.height].reshape(picture.height, picture.width)


def inner(plane: Plane, border: int) -> Plane:
    """A plane without `border` pixels on each side."""
    return plane[border : plane.shape[0] - border, border : plane.shape[1] - border]


def psnr(output: Plane, reference: Plane) -> float:
    """Peak signal-to-noise ratio, `10 log10(255**2 / mean square error)`.

    Args:
        output: `[rows, columns]`.
        reference: Same shape.

    Returns:
        Decibels; infinite for equal planes.
    """
    mean_square = float(np.mean((output.astype(np.float64) - reference) ** 2))
    return float("inf") if mean_square == 0.0 else 10.0 * float(np.log10(PEAK**2 / mean_square))


def ssim(output: Plane, reference: Plane) -> float:
    """Structural similarity: Wang et al. (2004), equation 13, with the Gaussian windows of section III.C.

    Args:
        output: `[rows, columns]`, at least 11 of each.
        reference: Same shape.

    Returns:
        Mean over all places where the window of 11x11 fits; 1 for equal planes.
    """
    rows, columns = (side - _WINDOW + 1 for side in output.shape)
    total = 0.0
    for top in range(0, rows, _STRIP):
        strip = slice(top, min(top + _STRIP, rows) + _WINDOW - 1)
        total += float(_similarity(output[strip].astype(np.float64), reference[strip].astype(np.float64)).sum())
    return total / (rows * columns)


def flicker(output: Plane, previous_output: Plane, reference: Plane, previous_reference: Plane) -> float:
    """How much of a frame's change from the one before is not in the reference.

    The mean of `|(o[t] - o[t-1]) - (r[t] - r[t-1])|` over all pixels. An error that stays the same from frame to frame,
    such as blur of something that stands still, does not count; one that comes and goes does, and the eye sees it.

    Args:
        output: Frame t of the result, `[rows, columns]`.
        previous_output: Frame t - 1 of the result.
        reference: Frame t of the original.
        previous_reference: Frame t - 1 of the original.

    Returns:
        Code values; 0 if the result changes exactly as the original does.
    """
    return float(np.mean(np.abs(_change(output, previous_output) - _change(reference, previous_reference))))


def gradient_energy(plane: Plane) -> float:
    """Mean square of the differences between neighbours, to the right and down: how much fine detail there is.

    The energy of the image gradient, by which cameras are focused (Subbarao, Choi and Nikzad, 1993).
    """
    levels = plane.astype(np.float64)
    across, down = levels[:-1, 1:] - levels[:-1, :-1], levels[1:, :-1] - levels[:-1, :-1]
    return float(np.mean(across**2 + down**2))


class WithReference:
    """How close the frames of a result come to those of the original.

    Args:
        border: Pixels to leave out on each side: what lies outside of the picture is anybody's guess.
    """

    def __init__(self, border: int) -> None:
        self._border = border
        self._psnr: list[float] = []
        self._ssim: list[float] = []
        self._flicker: list[float] = []
        self._last: tuple[Plane, Plane] | None = None

    def add(self, output: Plane, reference: Plane) -> None:
        """Judge the next frame, `[rows, columns]` each."""
        output, reference = inner(output, self._border), inner(reference, self._border)
        self._psnr.append(min(LARGEST_PSNR, psnr(output, reference)))
        self._ssim.append(ssim(output, reference))
        if self._last is not None:
            self._flicker.append(flicker(output, self._last[0], reference, self._last[1]))
        self._last = output.copy(), reference.copy()

    def summary(self) -> dict[str, float | None]:
        """The measures of all frames so far.

        Returns:
            `psnr` and `ssim`, means over frames; `psnr_worst`, of the worst frame; `flicker`, mean over pairs of
            frames, `None` for a single one.
        """
        return {
            "psnr": float(np.mean(self._psnr)),
            "psnr_worst": min(self._psnr),
            "ssim": float(np.mean(self._ssim)),
            "flicker": float(np.mean(self._flicker)) if self._flicker else None,
        }


class WithoutReference:
    """What can be said of a result whose original nobody has, beside a plain interpolation of its source.

    Args:
        border: Pixels of the result to leave out on each side.
        scale: Pixels of the result per pixel of the source.
    """

    def __init__(self, border: int, scale: int) -> None:
        self._border, self._scale = border, scale
        self._fidelity: list[float] = []
        self._energy, self._plain_energy = 0.0, 0.0
        self._change, self._plain_change = 0.0, 0.0
        self._last: tuple[Plane, Plane] | None = None

    def add(self, output: Plane, plain: Plane, shrunk: Plane, source: Plane) -> None:
        """Judge the next frame.

        Args:
            output: Of the result, `[rows, columns]`.
            plain: The source enlarged by plain interpolation, same shape.
            shrunk: The result shrunk back to the size of the source.
            source: Of the source.
        """
        border = -(-self._border // self._scale)
        error = psnr(inner(shrunk, border), inner(source, border))
        self._fidelity.append(min(LARGEST_PSNR, error))
        output, plain = inner(output, self._border), inner(plain, self._border)
        self._energy += gradient_energy(output)
        self._plain_energy += gradient_energy(plain)
        if self._last is not None:
            self._change += float(np.mean(np.abs(_change(output, self._last[0]))))
            self._plain_change += float(np.mean(np.abs(_change(plain, self._last[1]))))
        self._last = output.copy(), plain.copy()

    def summary(self) -> dict[str, float | None]:
        """The measures of all frames so far.

        Returns:
            `fidelity`: PSNR in decibels of the result, shrunk back, against the source, mean over frames: low where the
            result shows something else than the source does. `sharpness`: gradient energy of the result relative to
            that of the plain interpolation; above 1 is sharper, be it by detail or by noise. `flicker_ratio`: mean
            absolute change from frame to frame relative to that of the plain interpolation, which is the source's own;
            where little moves, what is above 1 shimmers. `None` where there is nothing to compare with.
        """
        return {
            "fidelity": float(np.mean(self._fidelity)),
            "sharpness": self._energy / self._plain_energy if self._plain_energy else None,
            "flicker_ratio": self._change / self._plain_change if self._plain_change else None,
        }


def _change(plane: Plane, before: Plane) -> NDArray[np.float32]:
    return plane.astype(np.float32) - before


def _similarity(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    mean_x, mean_y, square_x, square_y, product = map(_blurred, (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    variances = square_x - mean_x**2 + square_y - mean_y**2
    structure = (2 * (product - mean_x * mean_y) + c2) / (variances + c2)
    return np.asarray(luminance * structure)


def _blurred(plane: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted means in Gaussian windows, wherever the whole window fits."""
    distances = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(distances**2) / (2 * _DEVIATION**2))
    weights /= weights.sum()
    rows, columns = (side - _WINDOW + 1 for side in plane.shape)
    by_rows = np.zeros((rows, plane.shape[1]))
    for offset, weight in enumerate(weights):
        by_rows += weight * plane[offset : offset + rows]
    both = np.zeros((rows, columns))
    for offset, weight in enumerate(weights):
        both += weight * by_rows[:, offset : offset + columns]
    return both
