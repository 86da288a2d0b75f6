"""Networks run by this project's own kernels on a GPU with tensor cores.

A convolution, its bias, its activation or residuals and the place of its result in a wider buffer are one kernel, see
`convolution.cu`. For `srvgg` networks the way from their last layer to code values of the target is one more
convolution. Halves go from layer to layer, sums are floats.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.media.colour import PhaseKernels, RgbToPlanes
from tasks.models.backends.cuda_program import Kernel, can_compile
from tasks.models.cards import ModelCard
from tasks.models.networks import RRDB_RESIDUAL, RRDB_SLOPE

#: Channels of a pixel come in pieces of that many to the tensor cores.
_DEPTH: Final = 16

# What a kernel does to its sums, as `ENDING` in convolution.cu.
_ACTIVATION, _RESIDUALS, _PICTURE, _CODES = range(4)

#: Of a tile, as in convolution.cu.
_COLUMNS: Final = 16


def runs(card: ModelCard) -> bool:
    """Whether this module has all that a model needs."""
    channels = (card.num_feat, card.num_grow) if card.architecture == "rrdb" else (card.num_feat,)
    fits = card.architecture in ("srvgg", "rrdb") and all(count % _DEPTH == 0 and count <= 64 for count in channels)
    return fits and (card.architecture == "rrdb" or card.scale in (2, 4))


def is_available(device: torch.device) -> bool:
    """Whether a device is a GPU with the instructions that the kernels are made of, and they can be compiled."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0) and can_compile()


class CudaNetwork:
    """An `srvgg` or `rrdb` network in fp16.

    Args:
        card: The model.
        state: Its weights.
        device: Where it runs; must be current whenever it is made or called.
        to_planes: What makes code values of its result.
    """

    name = "cuda"
    dtype = torch.float16

    def __init__(
        self, card: ModelCard, state: Mapping[str, Tensor], device: torch.device, to_planes: RgbToPlanes
    ) -> None:
        self._card, self._state, self._device, self._to_planes = card, state, device, to_planes
        self._group = torch.cuda.get_device_capability(device) == (9, 0)
        self._codes: _Convolution | None = None
        if card.architecture == "srvgg":
            layers = card.num_conv + 1
            self._layers = [
                self._convolution(f"body.{2 * i}", slope=state[f"body.{2 * i + 1}.weight"]) for i in range(layers)
            ]
            self._last = self._convolution(f"body.{2 * layers}", ending=_PICTURE)
        else:
            self._build_rrdb()

    def run(self, x: Tensor) -> Tensor:
        """See `Backend.run`."""
        if self._card.architecture == "srvgg":
            return self._phases(x, None, (-torch.inf, torch.inf))[:, : 3 * self._card.scale**2]
        return self._run_rrdb(x)

    def codes(self, x: Tensor, gains: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend.codes`."""
        not_finite = torch.zeros(len(x), dtype=torch.int32, device=x.device)
        phases = self._phases(x, not_finite, (0.0, 1.0))
        kernels = self._to_planes.kernels(self._card.scale)
        luma, chroma = len(kernels.luma), kernels.chroma_bias.shape[1]
        if self._codes is None:
            filters, bias = codes_filter(kernels)
            ending = (_CODES, 1 if kernels.peak < 256 else 2)
            # The rest of each weight that a half has no room for is one more weight: together they are exact.
            rest = filters - filters.half().float()
            self._codes = _Convolution([filters, rest], bias, None, ending, self._group, self._device)
        more = self._codes.out - luma - chroma
        down, across = (
            torch.cat((axis.new_ones(luma, axis.shape[1]), axis, axis.new_ones(more, axis.shape[1])))
            for axis in (gains[0][0, :, :, 0], gains[1][0, :, 0])
        )
        kind = torch.uint8 if kernels.peak < 256 else torch.int16
        codes = _buffer(phases, _padded(luma + chroma, 8), kind)
        self._codes(phases, codes, gains=(down, across), limits=(0.0, kernels.peak))
        return codes[:, :luma], codes[:, luma : luma + chroma], not_finite == 0

    def _phases(self, x: Tensor, not_finite: Tensor | None, limits: tuple[float, float]) -> Tensor:
        picture = _pieces(x)
        this, other = (_buffer(picture, self._card.num_feat) for _ in range(2))
        self._layers[0](picture, this)
        for layer in self._layers[1:]:
            layer(this, other)
            this, other = other, this
        phases = _buffer(picture, _padded(3 * self._card.scale**2, _DEPTH))
        self._last(this, phases, residuals=[picture], limits=limits, not_finite=not_finite, phases=self._card.scale**2)
        return phases

    def _build_rrdb(self) -> None:
        leaky = torch.tensor([RRDB_SLOPE])
        self._first = self._convolution("conv_first")
        self._blocks = [
            [
                self._convolution(f"body.{block}.rdb{dense}.conv{i}", slope=leaky)
                if i < 5
                else self._convolution(f"body.{block}.rdb{dense}.conv5", ending=_RESIDUALS)
                for i in range(1, 6)
            ]
            for block in range(self._card.num_block)
            for dense in (1, 2, 3)
        ]
        self._body = self._convolution("conv_body", ending=_RESIDUALS)
        self._enlarging = [self._convolution(name, slope=leaky) for name in ("conv_up1", "conv_up2", "conv_hr")]
        self._last = self._convolution("conv_last")

    def _run_rrdb(self, x: Tensor) -> Tensor:
        card = self._card
        features, growth = card.num_feat, card.num_grow
        picture = _pieces(F.pixel_unshuffle(x, card.size_multiple) if card.size_multiple > 1 else x)
        shallow = _buffer(picture, features)
        self._first(picture, shallow)
        # A dense block works in one buffer: each convolution reads the channels so far and adds its own after them.
        # Three of them take turns, so that what a group of three blocks began with is there at its end.
        dense = [_buffer(picture, features + 4 * growth) for _ in range(3)]
        dense[0][:, :features] = shallow
        for i, convolutions in enumerate(self._blocks):
            this, following, begin = dense[i % 3], dense[(i + 1) % 3], dense[(i - 2) % 3]
            for j, convolution in enumerate(convolutions[:4]):
                end = features + j * growth
                convolution(this[:, :end], this[:, end : end + growth])
            is_last = i % 3 == 2
            residuals = [this[:, :features], begin[:, :features]] if is_last else [this[:, :features]]
            convolutions[4](this, following[:, :features], residuals=residuals, scales=(RRDB_RESIDUAL,) * 2)
        this = _buffer(picture, features)
        self._body(dense[len(self._blocks) % 3][:, :features], this, residuals=[shallow], scales=(1.0, 1.0))
        del dense, shallow
        for i, convolution in enumerate(self._enlarging):
            enlarged = i < 2
            larger = _buffer(this, features, enlarged=enlarged)
            convolution(this, larger, enlarged=enlarged)
            this = larger
        result = _buffer(this, 8)
        self._last(this, result)
        return result[:, :3]

    def _convolution(self, name: str, *, slope: Tensor | None = None, ending: int = _ACTIVATION) -> _Convolution:
        weight, bias = self._state[f"{name}.weight"], self._state[f"{name}.bias"]
        return _Convolution([weight], bias, slope, (ending, 1), self._group, self._device)


def codes_filter(kernels: PhaseKernels) -> tuple[Tensor, Tensor]:
    """The convolutions of `RgbToPlanes.codes` as one.

    Returns:
        Float32 `[luma and chroma samples, channels, edge, edge]`, and its bias `[samples]`.
    """
    rows, columns = kernels.rows.double().cpu(), kernels.columns.double().cpu()
    chroma = torch.einsum("omx,miy->oiyx", columns[:, :, 0], rows[..., 0])
    edge = max(chroma.shape[2:])
    y, x = ((edge - size) // 2 for size in chroma.shape[2:])
    luma = F.pad(kernels.luma.double().cpu(), (edge // 2,) * 4)
    filters = torch.cat((luma, F.pad(chroma, (x, x, y, y)))).float()
    return filters, torch.cat((kernels.luma_bias, kernels.chroma_bias.flatten())).float().cpu()


class _Layer(ctypes.Structure):
    """`Layer` of convolution.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("input", "output", "weights", "bias", "slope", "residual", "residual2")),
        *((name, ctypes.c_void_p) for name in ("down", "across", "not_finite")),
        *((name, ctypes.c_float) for name in ("scale", "scale2", "least", "most")),
        *((name, ctypes.c_int) for name in ("height", "width", "steps", "input_steps", "enlarged", "input_pitch")),
        *((name, ctypes.c_int) for name in ("output_pitch", "residual_pitch", "residual2_pitch", "stored", "phases")),
    ]


class _Convolution:
    """A convolution with its weights on the device.

    Args:
        filters: Float32 `[out, in, edge, edge]` each; their sum is what is computed.
        bias: `[out]`.
        slope: What negative results are multiplied by, `[out]` or one for all; `None` for 1.
        ending: What happens to its result, and bytes of a code value.
        group: Compute with the instructions that only Hopper has.
        device: Where.
    """

    def __init__(
        self,
        filters: list[Tensor],
        bias: Tensor,
        slope: Tensor | None,
        ending: tuple[int, int],
        group: bool,
        device: torch.device,
    ) -> None:
        channels, inputs, edge = filters[0].shape[:3]
        self.out = _padded(channels, _DEPTH)
        self._input_steps = _padded(inputs, _DEPTH) // _DEPTH
        self._steps = len(filters) * self._input_steps
        self._shape = Shape(self.out, edge // 2, *ending, group)
        self._kernel = _kernel(self._shape, torch.cuda.current_device())
        packed = [packed_weights(each, self.out, group) for each in filters]
        self._weights = torch.cat(packed).to(device)
        self._bias = F.pad(bias.float(), (0, self.out - channels)).to(device)
        slope = torch.ones(1) if slope is None else slope.float()
        slope = slope.expand(channels) if len(slope) == 1 else slope
        self._slope = F.pad(slope, (0, self.out - channels), value=1.0).to(device)

    def __call__(
        self,
        x: Tensor,
        result: Tensor,
        *,
        residuals: list[Tensor] | None = None,
        scales: tuple[float, float] = (1.0, 1.0),
        limits: tuple[float, float] = (0.0, 0.0),
        gains: tuple[Tensor, Tensor] | None = None,
        not_finite: Tensor | None = None,
        enlarged: bool = False,
        phases: int = 1,
    ) -> None:
        """Compute; see `Layer` in convolution.cu.

        Args:
            x: Half `[n, channels, h, w]`, channels side by side.
            result: What to write, likewise; as many channels as a multiple of eight has room for.
            residuals: What is added, one or two of them.
            scales: What the sum before each is multiplied by.
            limits: Of the result.
            gains: For code values.
            not_finite: int32 `[n]`, set for images with values that are not finite.
            enlarged: `x` has half the height and width.
            phases: Channels per colour.
        """
        first, second = [*(residuals or []), None, None][:2]
        n, stored, height, width = result.shape
        layer = _Layer(
            *(_address(t) for t in (x, result, self._weights, self._bias, self._slope, first, second)),
            *(_address(t) for t in (*(gains or (None, None)), not_finite)),
            *(*scales, *limits),
            *(height, width, self._steps, self._input_steps, enlarged, x.stride(3)),
            *(result.stride(3), *(t.stride(3) if t is not None else 0 for t in (first, second)), stored, phases),
        )
        tile = (_COLUMNS, self._shape.rows * self._shape.warps)
        self._kernel.launch((-(-width // tile[0]), -(-height // tile[1]), n), layer)


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for, named as in convolution.cu."""

    out: int
    radius: int
    ending: int
    sample_bytes: int
    group: bool
    rows: int = 2
    warps: int = 4
    in_step: int = _DEPTH
    stages: int = 2
    blocks: int = 4

    @property
    def threads(self) -> int:
        """In a block."""
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: parts of input and weights, and the result later on."""
        rows, edge = self.rows * self.warps, 2 * self.radius + 1
        halo = (_COLUMNS + 2 * self.radius) * (rows + 2 * self.radius)
        stage = 2 * self.in_step * (halo + edge**2 * self.out)
        return max(self.stages * stage, 2 * rows * _COLUMNS * (self.out + 8))

    @property
    def source(self) -> str:
        """The program."""
        sums = [f"c[{i // 4}][{i % 4}]" for i in range(self.out // 2)]
        count = len(sums)
        values = {
            **{name.upper(): int(value) for name, value in vars(self).items()},
            "OUT_TEXT": f'"{self.out}"',
            "SUMS": ", ".join(f'"+f"({each})' for each in sums),
            "SUM_PLACES": f'"{_places(0, count)}"',
            "A_PLACES": f'"{_places(count, 4)}"',
            "WEIGHTS_PLACE": f'"%{count + 4}"',
        }
        defines = "".join(f"#define {name} {value}\n" for name, value in values.items())
        return defines + (Path(__file__).parent / "convolution.cu").read_text()


def _places(first: int, count: int) -> str:
    return ", ".join(f"%{i}" for i in range(first, first + count))


@cache
def _kernel(shape: Shape, device: int) -> Kernel:
    """That of a shape on a device, which must be the current one."""
    del device
    return Kernel(shape.source, "convolve", shape.threads, shape.shared_bytes)


def packed_weights(weight: Tensor, out: int, group: bool) -> Tensor:
    """Weights in the order in which a kernel reads them.

    Args:
        weight: `[out, in, edge, edge]`.
        out: Channels to make of them; those there are not are zeros.
        group: For four warps, who want eight by eight weights side by side; else as a warp's threads hold them.

    Returns:
        Half, flat.
    """
    channels, inputs, edge, _ = weight.shape
    padding = (0, 0, 0, -inputs % _DEPTH, 0, out - channels)
    full = F.pad(weight.float().flatten(2), padding)
    if group:
        # [8 of out, out, 16 of in, 8 of in, in, tap]
        ordered = full.reshape(out // 8, 8, -1, 2, 8, edge**2).permute(2, 5, 0, 3, 1, 4)
    else:
        # [16 of out, 8 of out, out, 16 of in, 8 of in, 2 of in, in, tap]; a thread has one of `out` and one pair.
        ordered = full.reshape(out // 16, 2, 8, -1, 2, 4, 2, edge**2).permute(3, 7, 0, 2, 5, 1, 4, 6)
    return ordered.contiguous().half().flatten()


def _padded(count: int, multiple: int) -> int:
    return count + -count % multiple


def _buffer(like: Tensor, channels: int, kind: torch.dtype = torch.float16, *, enlarged: bool = False) -> Tensor:
    """`[n, channels, h, w]` with channels side by side, as high and wide as `like` or twice that."""
    n, _, h, w = like.shape
    shape = (n, h << enlarged, w << enlarged, channels)
    return torch.empty(shape, dtype=kind, device=like.device).permute(0, 3, 1, 2)


def _pieces(x: Tensor) -> Tensor:
    """A picture with as many channels as tensor cores take at a time; those it has not are zeros."""
    picture = _buffer(x, _padded(x.shape[1], _DEPTH))
    picture[:, : x.shape[1]] = x
    picture[:, x.shape[1] :] = 0
    return picture


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
