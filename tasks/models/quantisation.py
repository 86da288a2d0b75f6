"""Compact networks in bytes: integers that stand for weights and activations, and how they are found.

    quantised = quantise(card, load_state(card), images)    # images of the video itself

Three steps make the rounding cost as little as it can, in this order. Channels are brought to like size. The range of
each activation is measured on images. The weights are rounded one after another, and those still to be rounded make up
for the error of those that are, as seen by the activations of the images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from tasks.errors import ModelError
from tasks.models.cards import ModelCard

State = Mapping[str, Tensor]
Bounds = tuple[float, float]

#: Values an activation is rounded to; a weight takes one of -127..127.
LEVELS: Final = 256
LARGEST_WEIGHT: Final = 127

#: Part of the range between the least and the largest value of an activation that the bytes stand for. What lies
#: beyond is rare and becomes the largest byte; all that lies within is rounded more finely for it.
_KEPT_RANGE: Final = 0.75

#: Edge of the square of each image on whose activations weights are rounded.
_CROP: Final = 96

#: Part of the mean second moment that is added to each, so that weights which no image calls for stay small.
_DAMPING: Final = 0.01


@dataclass(frozen=True)
class Quantised:
    """An `srvgg` network whose layers, all but the first one, which sees the image itself, compute in bytes."""

    state: State
    """As in the network's own state dict, but `body.N.weight` of a layer in bytes is int8, and `body.N.step`, float32
    `[output channels]`, what its ones stand for."""
    bounds: tuple[Bounds, ...]
    """What the least and the largest byte of each activation stand for; zero is one of the values between."""

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        bounds = torch.tensor(self.bounds, dtype=torch.float64)
        safetensors.torch.save_file({**self.state, "bounds": bounds}, path)

    @classmethod
    def load(cls, path: Path) -> Quantised:
        """Read what `save` wrote.

        Raises:
            ModelError: The file is missing or damaged.
        """
        try:
            state = safetensors.torch.load_file(path)
            bounds = state.pop("bounds").tolist()
        except (OSError, SafetensorError, KeyError) as error:
            raise ModelError(f"{path} holds no network in bytes: {error}", "Run the job again with --fresh") from error
        return cls(state, tuple((low, high) for low, high in bounds))


def quantise(card: ModelCard, state: State, images: Sequence[Tensor], threads: int) -> Quantised:
    """Find bytes for a network.

    Args:
        card: A model of architecture `srvgg`.
        state: Its weights.
        images: Float32 `[1, 3, h, w]` in 0..1 each, such as the network is going to see.
        threads: CPU threads.
    """
    from tasks.models.backends.openvino_network import activation_extremes, activations

    extremes = activation_extremes(card, state, images, threads)  # [image, activation, low or high, channel]
    means = extremes.mean(0)
    factors = _factors(state, means)
    balanced = _balanced(state, factors)
    widest = [extremes[:, layer] / factor for layer, factor in enumerate(factors)]
    bounds = tuple(
        _with_zero(_KEPT_RANGE * float(found[:, 0].min()), _KEPT_RANGE * float(found[:, 1].max())) for found in widest
    )
    moments = [torch.zeros(9 * card.num_feat, 9 * card.num_feat, dtype=torch.float64) for _ in bounds]
    for values in activations(card, state, (_crop(image, i) for i, image in enumerate(images)), threads):
        for moment, value, factor, bound in zip(moments, values, factors, bounds, strict=True):
            moment += second_moments(_rounded(value / factor.reshape(-1, 1, 1), bound))
    for layer, moment in enumerate(moments, 1):
        name = f"body.{2 * layer}"
        balanced[f"{name}.weight"], balanced[f"{name}.step"] = round_weights(balanced[f"{name}.weight"], moment)
    return Quantised(balanced, bounds)


def _factors(state: State, extremes: Tensor) -> list[Tensor]:
    """By what each channel of each activation is divided.

    All channels of an activation share one step in bytes, so a large channel costs the small ones their precision. How
    much of it goes over into the weights is the geometric mean of what either side would like: Xiao et al.,
    "SmoothQuant" (2022), equation 4.

    Args:
        state: The weights.
        extremes: Least and largest values, `[activation, 2, channel]`.
    """
    factors = []
    for layer, (low, high) in enumerate(extremes):
        activation = torch.maximum(-low, high).clamp(min=1e-6)
        reading = state[f"body.{2 * layer + 2}.weight"]  # [output, input, 3, 3]
        # Every output channel has a step of its own, so only its relative weights count.
        relative = reading.abs() / reading.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
        weight = relative.amax(dim=(0, 2, 3)).clamp(min=1e-3)
        factors.append((activation / weight).sqrt())
    return factors


def _balanced(state: State, factors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The same network with each activation divided by `factors`, and multiplied again by the weights that read it.

    A PReLU keeps positive factors: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
    Correction" (2019), section 4.1.
    """
    balanced = {name: tensor.float().clone() for name, tensor in state.items()}
    for layer, factor in enumerate(factors):
        balanced[f"body.{2 * layer}.weight"] /= factor.reshape(-1, 1, 1, 1)
        balanced[f"body.{2 * layer}.bias"] /= factor
        balanced[f"body.{2 * layer + 2}.weight"] *= factor.reshape(1, -1, 1, 1)
    return balanced


def _with_zero(low: float, high: float) -> Bounds:
    """Bounds such that zero is one of the evenly spaced values: what a convolution pads with must not be rounded."""
    low, high = min(low, 0.0), max(high, 1e-6)
    step = (high - low) / (LEVELS - 1)
    zero = round(-low / step)
    return -zero * step, (LEVELS - 1 - zero) * step


def _rounded(value: Tensor, bounds: Bounds) -> Tensor:
    low, high = bounds
    step = (high - low) / (LEVELS - 1)
    return value.clamp(low, high).div_(step).round_().mul_(step)


def _crop(image: Tensor, index: int) -> Tensor:
    """A square of an image, each time at another place."""
    rows, columns = max(0, image.shape[2] - _CROP), max(0, image.shape[3] - _CROP)
    # Additive recurrences fill a square evenly with any number of points.
    top = int(rows * ((0.5 + 0.618034 * index) % 1.0))
    left = int(columns * ((0.5 + 0.754878 * index) % 1.0))
    return image[:, :, top : top + _CROP, left : left + _CROP]


def second_moments(value: Tensor) -> Tensor:
    """What the 3x3 patches of an activation have in common: the sum of the outer products of all of them.

    A product of two values of a patch depends only on where they are relative to one another, so of the 81 blocks of
    channels by channels only 25 differ, and 12 of those are transposes of others.

    Args:
        value: Float32 `[channels, h, w]`, zero outside.

    Returns:
        Float64 `[9 * channels, 9 * channels]`, in the order (channel, row, column).
    """
    channels, _, w = value.shape
    # With two columns of zeros between the rows a shift in two dimensions is one in memory.
    flat = F.pad(value, (0, 2, 0, 0)).flatten(1)
    blocks = torch.zeros(5, 5, channels, channels, dtype=torch.float64)
    for down in range(3):
        for right in range(-2, 3):
            shift = down * (w + 2) + right
            if shift < 0 or shift >= flat.shape[1]:
                continue
            product = (flat[:, shift:] @ flat[:, : flat.shape[1] - shift].T).double()
            blocks[2 + down, 2 + right] = product
            blocks[2 - down, 2 - right] = product.T
    places = torch.arange(3)
    apart = 2 + places[:, None] - places[None]  # of the first place from the second one, along one axis
    moments = blocks[apart[:, None, :, None], apart[None, :, None, :]]  # [row, column, row, column, channel, channel]
    return moments.permute(4, 0, 1, 5, 2, 3).reshape(9 * channels, 9 * channels)


def round_weights(weight: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Round the weights of a convolution such that its results change least.

    One weight of each output channel is rounded after another; those still to come take over what the error would
    change in the result. Frantar et al., "GPTQ" (2022), section 3.3 and algorithm 1.

    Args:
        weight: Float32 `[output, input, 3, 3]`.
        moments: Of the patches that it reads: see `second_moments`.

    Returns:
        int8 of the same shape, and float32 `[output]`: what a one stands for.
    """
    remaining = weight.flatten(1).double()
    step = remaining.abs().amax(1).clamp(min=1e-12) / LARGEST_WEIGHT
    diagonal = moments.diagonal()
    damped = moments + (_DAMPING * diagonal.mean() + 1e-12) * torch.eye(len(moments), dtype=moments.dtype)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    rounded = torch.empty_like(remaining)
    for column in range(remaining.shape[1]):
        rounded[:, column] = (remaining[:, column] / step).round().clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)
        error = (remaining[:, column] - rounded[:, column] * step) / upper[column, column]
        remaining[:, column:] -= error[:, None] * upper[column, column:]
    return rounded.to(torch.int8).reshape(weight.shape), step.float()
