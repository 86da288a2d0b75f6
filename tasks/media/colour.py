"""Planes of YUV, grey or RGB to RGB and back, in float, on whatever device the frames are.

    to_rgb = PlanesToRgb(source)        # uint8 [n, source.frame_bytes] -> float32 [n, 3, h, w] in 0..1
    to_planes = RgbToPlanes(target)     # float32 [n, 3, h, w] -> uint8 [n, target.frame_bytes]

Matrix, range and chroma location are those of the `PictureFormat`. RGB is what the matrix gives (R'G'B', no transfer
function is applied); values of an out-of-gamut source lie outside 0..1 and are not clamped here.

Chroma is resampled with Keys' cubic kernel (a = -1/2, Catmull-Rom), stretched by two for the way down so that it also
removes what the smaller grid cannot hold. Every tap is taken at the site where the sample lies. The whole way from
chroma samples to the chroma part of RGB is one small convolution, and so is the way back: resampling and matrix are
both linear. The convolution runs on the smaller grid, its output channels being the pixels of each cell.

Samples of more than 8 bits take two bytes of the packed frame each; 14 bits fit the signed integers that tensors have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.errors import UnsupportedSourceError
from tasks.media.pixels import Colour, PictureFormat

#: Luma weights (Kr, Kb) of each matrix: ITU-T H.273 (07/2024), table 4 (MatrixCoefficients 1, 4, 5, 6, 7 and 9).
LUMA_WEIGHTS: Final[dict[str, tuple[float, float]]] = {
    "bt709": (0.2126, 0.0722),
    "fcc": (0.30, 0.11),
    "bt470bg": (0.299, 0.114),
    "smpte170m": (0.299, 0.114),
    "smpte240m": (0.212, 0.087),
    "bt2020nc": (0.2627, 0.0593),
}

#: Place of a chroma sample within its 2x2 luma cell, in luma pixels right of and below the cell's first luma sample
#: (H.273, figure 1). Only the axis along which chroma is subsampled is used.
CHROMA_SITES: Final[dict[str, tuple[float, float]]] = {
    "left": (0.0, 0.5),
    "center": (0.5, 0.5),
    "topleft": (0.0, 0.0),
    "top": (0.5, 0.0),
    "bottomleft": (0.0, 1.0),
    "bottom": (0.5, 1.0),
}


@dataclass(frozen=True)
class CodeValues:
    """How luma 0..1 and chroma -1/2..1/2 become integers: `offset + scale * value` (H.273, equations 20 to 25)."""

    peak: int
    """Largest code value."""
    luma_offset: float
    luma_scale: float
    chroma_offset: float
    chroma_scale: float

    @classmethod
    def of(cls, full_range: bool, bits: int) -> CodeValues:
        """Code values of a range at a bit depth."""
        peak, unit = (1 << bits) - 1, 1 << (bits - 8)
        if full_range:
            return cls(peak, 0.0, peak, 128.0 * unit, peak)
        return cls(peak, 16.0 * unit, 219.0 * unit, 128.0 * unit, 224.0 * unit)


#: R'G'B' to Y', Cg and Co: H.273 (07/2024), equations 44 to 46.
_YCGCO: Final = ((0.25, 0.5, 0.25), (-0.25, 0.5, -0.25), (0.5, 0.0, -0.5))


def rgb_to_yuv_matrix(matrix: str) -> np.ndarray:
    """float64 `[3, 3]`: R'G'B' in 0..1 to Y' in 0..1 and Cb, Cr in -1/2..1/2.

    Raises:
        UnsupportedSourceError: The matrix is neither a key of `LUMA_WEIGHTS` nor `ycgco`.
    """
    if matrix == "ycgco":
        return np.array(_YCGCO)
    if matrix not in LUMA_WEIGHTS:
        raise UnsupportedSourceError(
            f'The YUV matrix "{matrix}" is not supported', f"Convert the source to one of {', '.join(LUMA_WEIGHTS)}"
        )
    kr, kb = LUMA_WEIGHTS[matrix]
    luma = np.array([kr, 1.0 - kr - kb, kb])
    return np.stack(
        [luma, (np.array([0.0, 0.0, 1.0]) - luma) / (2 - 2 * kb), (np.array([1.0, 0.0, 0.0]) - luma) / (2 - 2 * kr)]
    )


class PlanesToRgb:
    """Packed planes to RGB.

    Args:
        source: Layout and colour of the frames.
        device: Where they are.

    Raises:
        UnsupportedSourceError: Unknown matrix or chroma location.
    """

    def __init__(self, source: PictureFormat, device: torch.device | str = "cpu") -> None:
        self.format = source
        layout = source.layout
        self._cell = (1 << layout.shift_y, 1 << layout.shift_x)
        code = CodeValues.of(source.colour.full_range, bits=layout.bits)
        # The luma column of every inverse is one: H.273 matrices give R = G = B = Y for grey.
        self._luma_gain, self._luma_bias = 1.0 / code.luma_scale, -code.luma_offset / code.luma_scale
        if layout.model != "yuv":
            return
        inverse = np.linalg.inv(rgb_to_yuv_matrix(source.colour.matrix))
        site_x, site_y = _sites(source.colour)
        # In cells of four pixels the same corners and middles are three pixels apart instead of one.
        rows = _enlarging_taps(self._cell[0], site_y * (self._cell[0] - 1))
        columns = _enlarging_taps(self._cell[1], site_x * (self._cell[1] - 1))
        chroma_matrix = inverse[:, 1:] / code.chroma_scale
        # [colour, row in cell, column in cell, U or V, tap, tap]
        kernel = np.einsum("cp,yi,xj->cyxpij", chroma_matrix, rows, columns)
        bias = -chroma_matrix.sum(1) * code.chroma_offset + self._luma_bias
        self._kernel = _tensor(kernel.reshape(-1, 2, *kernel.shape[-2:]), device)
        self._bias = _tensor(np.repeat(bias, self._cell[0] * self._cell[1]), device)

    def __call__(self, frames: Tensor, picture: PictureFormat | None = None) -> Tensor:
        """Convert.

        Args:
            frames: uint8 `[n, picture.frame_bytes]`.
            picture: Their format, if they have another size than the converter was made for.

        Returns:
            float32 `[n, 3, height, width]`.
        """
        picture = picture or self.format
        luma, chroma = _split(frames, picture)
        if chroma is None:
            return luma.float().mul_(self._luma_gain).add_(self._luma_bias).repeat(1, 3, 1, 1)
        if picture.layout.model == "rgb":
            planes = torch.cat((chroma[:, 1:], luma, chroma[:, :1]), 1)  # They lie as G, B, R.
            return planes.float().mul_(self._luma_gain).add_(self._luma_bias)
        cell_y, cell_x = self._cell
        radius_y, radius_x = self._kernel.shape[2] // 2, self._kernel.shape[3] // 2
        chroma = F.pad(chroma.float(), (radius_x, radius_x, radius_y, radius_y), mode="replicate")
        offsets = convolve(chroma, self._kernel, self._bias)
        n, _, h, w = offsets.shape
        rgb = offsets.view(n, 3, cell_y, cell_x, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, 3, h * cell_y, w * cell_x)
        # A source of odd size has one luma row or column less than its chroma covers.
        rgb = rgb[:, :, : picture.height, : picture.width]
        return torch.add(rgb, luma.float(), alpha=self._luma_gain)


def rgb_from_planes(frames: np.ndarray, picture: PictureFormat) -> np.ndarray:
    """Frames as a screen shows them, for whoever has no tensors.

    Args:
        frames: uint8 `[n, picture.frame_bytes]`.
        picture: Their format.

    Returns:
        uint8 `[n, height, width, 3]`, rounded; what is out of gamut is clamped.
    """
    rgb = PlanesToRgb(picture)(torch.from_numpy(np.array(frames)))
    return rgb.mul_(255).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


@dataclass(frozen=True)
class PhaseKernels:
    """How an image that is not put together yet becomes code values: convolutions at the resolution of its phases.

    Output channels are (plane, row, column within the pixel). Half a code value is in the biases, so that truncation
    rounds. Chroma takes two steps: the matrix and the taps of each column, then those of each row; what is outside the
    picture counts as zero, and the sum is multiplied by `RgbToPlanes.edge_gains` before its bias is added.
    """

    luma: Tensor
    luma_bias: Tensor
    rows: Tensor
    columns: Tensor
    chroma_bias: Tensor
    """`[1, channels, 1, 1]`."""
    peak: int
    """Largest code value."""


class RgbToPlanes:
    """RGB to packed planes, rounded to the nearest code value.

    Args:
        target: Layout and colour of the frames to make.
        device: Where they are.

    Raises:
        UnsupportedSourceError: Unknown matrix or chroma location.
    """

    def __init__(self, target: PictureFormat, device: torch.device | str = "cpu") -> None:
        self.format = target
        layout = target.layout
        self._model = layout.model
        self._cell = (1 << layout.shift_y, 1 << layout.shift_x)
        self._code = CodeValues.of(target.colour.full_range, bits=layout.bits)
        matrix = target.colour.matrix
        # Grey of a source that says it is red, green and blue is as bright as the eye sees it (BT.709).
        self._matrix = rgb_to_yuv_matrix("bt709" if matrix == "gbr" else matrix)
        self._sites = _sites(target.colour)
        self._device = device
        self._kernels: dict[int, PhaseKernels] = {}
        # One axis each: parts of frames have many sizes, but few widths and heights.
        self._gains: dict[tuple[int, int, int], Tensor] = {}

    def __call__(self, rgb: Tensor, picture: PictureFormat | None = None) -> Tensor:
        """Convert.

        Args:
            rgb: float32 `[n, 3, picture.height, picture.width]`.
            picture: Format of the result, if it has another size than the converter was made for.

        Returns:
            uint8 `[n, picture.frame_bytes]`.
        """
        if self._model != "yuv":
            return self._without_chroma(rgb, picture or self.format)
        cell = max(self._cell)
        pad_y, pad_x = -rgb.shape[2] % cell, -rgb.shape[3] % cell
        if pad_y or pad_x:
            rgb = F.pad(rgb, (0, pad_x, 0, pad_y), mode="replicate")
        return self.from_phases(F.pixel_unshuffle(rgb, cell) if cell > 1 else rgb, cell, picture)

    def _without_chroma(self, rgb: Tensor, picture: PictureFormat) -> Tensor:
        """Grey, or red, green and blue: each sample is made of the pixel at its place."""
        out = _empty(len(rgb), picture, rgb.device)
        luma, others = _split(out, picture)
        if others is None:
            weights = _tensor(self._matrix[0].reshape(1, 3, 1, 1), rgb.device)
            luma.copy_(self._rounded((rgb * weights).sum(1, keepdim=True)))
        else:
            luma.copy_(self._rounded(rgb[:, 1:2]))
            others.copy_(self._rounded(rgb[:, [2, 0]]))
        return out

    def _rounded(self, values: Tensor) -> Tensor:
        code = self._code
        return (values * code.luma_scale).add_(code.luma_offset + 0.5).clamp_(0, code.peak).to(_sample_type(code.peak))

    def takes_phases(self, scale: int) -> bool:
        """Whether `from_phases` can be called with this scale: a cell of chroma must not straddle two of its pixels."""
        return self._model == "yuv" and scale % self._cell[0] == 0 and scale % self._cell[1] == 0

    def from_phases(self, phases: Tensor, scale: int, picture: PictureFormat | None = None) -> Tensor:
        """Convert an image that is not put together yet.

        What is pixel by pixel costs the same before and after a pixel shuffle; resampling chroma is far cheaper
        before it, as a dense convolution; and it is bytes that get shuffled instead of floats.

        Args:
            phases: float32 `[n, 3 * scale**2, h, w]`, what `F.pixel_shuffle(., scale)` makes an image of the target's
                size from (or of that size rounded up to whole chroma cells).
            scale: A multiple of the size of the chroma cell.
            picture: Format of the result, if it has another size than the converter was made for.

        Returns:
            uint8 `[n, picture.frame_bytes]`.
        """
        gains = self.edge_gains(scale, *phases.shape[2:])
        return self.put_together(*self.codes(phases, scale, gains), scale, picture)

    def codes(self, phases: Tensor, scale: int, gains: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The code values of an image that is not put together yet.

        Args:
            phases: As for `from_phases`, or a part of that.
            scale: As for `from_phases`.
            gains: What `edge_gains` gives for the whole image, or the same part of it.

        Returns:
            uint8 `[n, luma samples of a pixel, h, w]` and `[n, chroma samples, h, w]`, in the order of the kernels'
            outputs; int16 for more than 8 bits.
        """
        kernels = self.kernels(scale)
        phases = phases.contiguous(memory_format=torch.channels_last)  # Several times faster to convolve on CPUs.
        luma = convolve(phases, kernels.luma, kernels.luma_bias)
        chroma = convolve(phases, kernels.rows, None, (kernels.rows.shape[2] // 2, 0))
        chroma = convolve(chroma, kernels.columns, None, (0, kernels.columns.shape[3] // 2))
        # Outside the picture there are zeros; the taps inside are weighted up so that they sum to one again.
        chroma = torch.addcmul(kernels.chroma_bias, chroma.mul_(gains[0]), gains[1])
        peak = self._code.peak
        return luma.clamp_(0, peak).to(_sample_type(peak)), chroma.clamp_(0, peak).to(_sample_type(peak))

    def put_together(self, luma: Tensor, chroma: Tensor, scale: int, picture: PictureFormat | None = None) -> Tensor:
        """What `codes` gave for a whole image, as `from_phases` returns it."""
        picture = picture or self.format
        out = _empty(len(luma), picture, luma.device)
        luma_plane, chroma_planes = _split(out, picture)
        assert chroma_planes is not None
        cell_y, cell_x = self._cell
        _write(luma, luma_plane, (scale, scale))
        _write(chroma, chroma_planes, (scale // cell_y, scale // cell_x))
        return out

    def kernels(self, scale: int) -> PhaseKernels:
        """The convolutions that make code values from phases."""
        if scale not in self._kernels:
            self._kernels[scale] = self._kernels_for(scale)
        return self._kernels[scale]

    def _kernels_for(self, scale: int) -> PhaseKernels:
        code, (cell_y, cell_x) = self._code, self._cell
        each_pixel = np.eye(scale * scale).reshape(scale * scale, 1, scale * scale)
        luma = (code.luma_scale * self._matrix[0]).reshape(1, 3, 1) * each_pixel
        site_x, site_y = self._sites
        rows, columns = _reducing_taps(cell_y, site_y, scale), _reducing_taps(cell_x, site_x, scale)
        matrix, each = code.chroma_scale * self._matrix[1:], np.eye(scale)
        by_rows = np.einsum("pc,aiy,zx->pazcyxi", matrix, rows, each)
        by_columns = np.einsum("pq,ad,bjx->pabqdxj", np.eye(2), np.eye(len(rows)), columns)
        samples = len(rows) * len(columns)
        # Half a code value on top makes the truncation that follows a rounding.
        luma_bias = np.full(scale * scale, code.luma_offset + 0.5)
        chroma_bias = np.full((1, 2 * samples, 1, 1), code.chroma_offset + 0.5)
        return PhaseKernels(
            luma=_tensor(luma.reshape(scale * scale, 3 * scale * scale, 1, 1), self._device),
            luma_bias=_tensor(luma_bias, self._device),
            rows=_tensor(by_rows.reshape(2 * len(rows) * scale, 3 * scale * scale, -1, 1), self._device),
            columns=_tensor(by_columns.reshape(2 * samples, 2 * len(rows) * scale, 1, -1), self._device),
            chroma_bias=_tensor(chroma_bias, self._device),
            peak=code.peak,
        )

    def edge_gains(self, scale: int, h: int, w: int) -> tuple[Tensor, Tensor]:
        """One over the sum of the taps inside: float32 `[1, 2 * samples, h, 1]` and `[1, 2 * samples, 1, w]`."""
        return self._gains_along(0, h, scale), self._gains_along(1, w, scale)

    def _gains_along(self, axis: int, size: int, scale: int) -> Tensor:
        key = (axis, size, scale)
        if key not in self._gains:
            taps = _reducing_taps(self._cell[axis], self._sites[1 - axis], scale).sum(2)  # [sample, tap]
            inside = np.pad(np.ones(size), taps.shape[1] // 2)
            gains = 1.0 / np.stack([np.correlate(inside, row, mode="valid") for row in taps])
            # Channels of the chroma kernel are (plane, row, column).
            across = scale // self._cell[1 - axis]
            if axis == 0:
                gains = np.tile(np.repeat(gains, across, axis=0), (2, 1))[None, :, :, None]
            else:
                gains = np.tile(gains, (2 * across, 1))[None, :, None, :]
            self._gains[key] = _tensor(gains, self._device)
        return self._gains[key]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int] = (0, 0)) -> Tensor:
    """A convolution whose result at a pixel depends neither on the size of the image around it nor on threads.

    On a CPU, torch gives small images (up to 20480 values) and single threads to another implementation, which adds
    in another order; so oneDNN is called by name there.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(x, weight, bias, padding, (1, 1), (1, 1), 1)
    return F.conv2d(x, weight, bias, padding=padding)


def opacity(frames: Tensor, picture: PictureFormat) -> Tensor:
    """The plane of opacity of packed frames, `[n, 1, height, width]`, as a view of them."""
    return _samples(frames, picture)[:, -picture.width * picture.height :].view(-1, 1, picture.height, picture.width)


def _samples(frames: Tensor, picture: PictureFormat) -> Tensor:
    """Packed frames `[n, bytes]` as `[n, samples]`, a view of them."""
    return frames if picture.bytes_per_sample == 1 else frames.view(torch.int16)


def _sample_type(peak: int) -> torch.dtype:
    return torch.uint8 if peak < 256 else torch.int16


def _empty(n: int, picture: PictureFormat, device: torch.device) -> Tensor:
    return torch.empty(n, picture.frame_bytes, dtype=torch.uint8, device=device)


def _split(frames: Tensor, picture: PictureFormat) -> tuple[Tensor, Tensor | None]:
    """Views of packed frames: luma `[n, 1, h, w]` and chroma `[n, 2, h', w']`, or green and the two others; no opacity.

    Grey has no second one.
    """
    samples = _samples(frames, picture)
    (rows, columns), *others = picture.plane_shapes[:3]
    end = rows * columns
    luma = samples[:, :end].view(-1, 1, rows, columns)
    if picture.layout.model == "gray":
        return luma, None
    chroma_rows, chroma_columns = others[0]
    both = samples[:, end : end + 2 * chroma_rows * chroma_columns]
    return luma, both.view(-1, 2, chroma_rows, chroma_columns)


#: Integer types as wide as a run of that many bytes, to move a run as one element.
_RUNS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _write(codes: Tensor, planes: Tensor, cell: tuple[int, int]) -> None:
    """Shuffle and crop into place.

    Args:
        codes: `[n, planes * rows * columns of the cell, h, w]`, best with channels side by side in memory.
        planes: `[n, planes, H, W]` of the same type, with `H <= h * rows` and `W <= w * columns`.
        cell: Rows and columns of the cell each position of `codes` holds.
    """
    n, channels, h, w = codes.shape
    rows, columns = cell
    count = channels // (rows * columns)
    flat = codes.permute(0, 2, 3, 1).reshape(-1)
    run = columns * codes.element_size()
    if run in _RUNS:
        # The columns of a cell lie side by side: as one wide integer they cost one move, not one each.
        cells = flat.view(_RUNS[run]).view(n, h, w, count, rows, 1)
    else:
        cells = flat.view(n, h, w, count, rows, columns)
    image = cells.permute(0, 3, 1, 4, 2, 5).reshape(-1).view(codes.dtype).view(n, count, h * rows, w * columns)
    planes.copy_(image[:, :, : planes.shape[2], : planes.shape[3]])


def _sites(colour: Colour) -> tuple[float, float]:
    if colour.chroma_location not in CHROMA_SITES:
        raise UnsupportedSourceError(
            f'The chroma location "{colour.chroma_location}" is not supported', f"Use one of {', '.join(CHROMA_SITES)}"
        )
    return CHROMA_SITES[colour.chroma_location]


def cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -1/2 (R. Keys, IEEE Trans. ASSP 29, 1981, equation 4)."""
    d = np.abs(distance)
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    return np.where(d < 1, near, np.where(d < 2, far, 0.0))


def _enlarging_taps(cell: int, site: float) -> np.ndarray:
    """float64 `[cell, taps]`: weights of the neighbouring chroma samples, the sample of the own cell in the middle."""
    if cell == 1:
        return np.ones((1, 1))
    position = (np.arange(cell)[:, None] - site) / cell  # of a luma sample, in chroma samples from the own one
    return cubic(position - np.arange(-2, 3)[None])


def _reducing_taps(cell: int, site: float, scale: int) -> np.ndarray:
    """float64 `[samples, taps, scale]`: weights of the pixels around, in groups of `scale`, the own one in the middle.

    A group holds `scale / cell` chroma samples.
    """
    if cell == 1:
        return np.eye(scale).reshape(scale, 1, scale)
    samples = np.arange(scale // cell) * cell + site  # in luma pixels from the first one of the group
    reach = 2 * cell  # of the stretched kernel, in luma pixels
    groups = -(-reach // scale)
    pixels = np.arange(-groups * scale, (groups + 1) * scale)
    taps = cubic((pixels[None] - samples[:, None]) / cell)
    return (taps / taps.sum(1, keepdims=True)).reshape(len(samples), 2 * groups + 1, scale)


def _tensor(values: np.ndarray, device: torch.device | str) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values)).to(device=device, dtype=torch.float32)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
