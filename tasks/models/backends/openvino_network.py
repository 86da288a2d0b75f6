"""Networks run by OpenVINO on a CPU.

The graphs are built here layer by layer from the weights: no converter, which would need an export of the torch
network, seconds of time and a package that reports its use to its maker.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset13 as ops
from torch import Tensor

from tasks.models.backends import Ranges
from tasks.models.cards import ModelCard

Node = Any
Weights = Mapping[str, Tensor]

#: Slope of every LeakyReLU and factor of every residual in an RRDBNet.
_RRDB_SLOPE = _RRDB_RESIDUAL = 0.2


class OpenVinoNetwork:
    """A network compiled for this CPU, for frames of any size.

    Args:
        card: The model.
        state: Its weights.
        threads: Threads for all streams together.
        streams: Calls of `run` that are computed side by side, each by its share of the threads.
        ranges: For an `srvgg` network computed in bytes.
    """

    name = "openvino"
    channels_last = False

    def __init__(
        self, card: ModelCard, state: Weights, threads: int, streams: int, ranges: Ranges | None = None
    ) -> None:
        model = srvgg(card, state, ranges) if card.architecture == "srvgg" else rrdb(card, state)
        self._compiled = _compile(model, threads, streams)
        self._local = threading.local()

    def run(self, x: Tensor) -> Tensor:
        """See `Backend.run`."""
        if not hasattr(self._local, "request"):
            self._local.request = self._compiled.create_infer_request()
        results = self._local.request.infer([x.contiguous().numpy()], share_inputs=True, share_outputs=True)
        return torch.from_numpy(results[0])


def activation_ranges(card: ModelCard, state: Weights, images: Iterable[Tensor], threads: int) -> Ranges:
    """What the activations of an `srvgg` network are like, for a network in bytes.

    Args:
        card: The model.
        state: Its weights.
        images: Float32 `[1, 3, h, w]` in 0..1 each.
        threads: CPU threads.

    Returns:
        For each channel after each activation the least and the largest value in an image, averaged over the images.
    """
    compiled = _compile(srvgg(card, state, watched=True), threads, 1)
    extremes = []
    for image in images:
        results = compiled([image.contiguous().numpy()])
        extremes.append([results[i] for i in range(1, len(compiled.outputs))])
    # [activation, channel, low or high]
    means = np.mean(extremes, axis=0).reshape(card.num_conv + 1, 2, card.num_feat).swapaxes(1, 2)
    return tuple(tuple((float(low), float(high)) for low, high in channels) for channels in means)


@lru_cache(maxsize=1)
def _core() -> Any:
    return openvino.Core()


def _compile(model: openvino.Model, threads: int, streams: int) -> Any:
    return _core().compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": streams,
            # Other precisions would be chosen by processor, and the same frame differ from node to node.
            "INFERENCE_PRECISION_HINT": "f32",
            # Decoding and encoding share the machine: which core is free is the kernel's business.
            "ENABLE_CPU_PINNING": False,
        },
    )


def srvgg(card: ModelCard, state: Weights, ranges: Ranges | None = None, watched: bool = False) -> openvino.Model:
    """An SRVGGNetCompact without its pixel shuffle.

    Args:
        card: The model.
        state: Its weights.
        ranges: Compute every convolution but the first one, which sees the image itself, in bytes.
        watched: Give the least and the largest value after each activation as further outputs.
    """
    bounds: list[tuple[float, float]] = []
    if ranges is not None:
        state, bounds = _balanced(card, state, ranges)
    image = ops.parameter([-1, 3, -1, -1], np.float32)
    value: Node = image
    extremes: list[Node] = []
    for layer in range(card.num_conv + 2):
        in_bytes = ranges is not None and layer > 0
        value = _convolution(value, state, f"body.{2 * layer}", in_bytes)
        if layer <= card.num_conv:
            value = ops.prelu(value, _constant(state[f"body.{2 * layer + 1}.weight"]))
            if watched:
                axes = np.array([0, 2, 3])
                extremes += [ops.reduce_min(value, axes), ops.reduce_max(value, axes)]
            if ranges is not None:
                value = _in_bytes(value, *bounds[layer])
    cell = card.scale**2
    nearest = ops.gather(image, np.repeat(np.arange(3), cell), np.int64(1))
    return openvino.Model([ops.add(value, nearest), *extremes], [image])


def _balanced(card: ModelCard, state: Weights, ranges: Ranges) -> tuple[Weights, list[tuple[float, float]]]:
    """The same network with channels of like size, and the bounds of each activation.

    All channels of an activation share one step in bytes, so a large channel costs the small ones their precision. What
    is divided out of a channel can be multiplied into the weights that read it, because a PReLU keeps positive factors:
    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), section 4.1. How much
    goes over is the geometric mean of what either side would like: Xiao et al., "SmoothQuant" (2022), equation 4.
    """
    balanced = {name: tensor.float().clone() for name, tensor in state.items()}
    bounds = []
    for layer, channels in enumerate(ranges):
        low, high = torch.tensor(channels).unbind(1)
        activation = torch.maximum(-low, high).clamp(min=1e-6)
        reading = balanced[f"body.{2 * layer + 2}.weight"]  # [output, input, 3, 3]
        # Every output channel has a step of its own, so only its relative weights count.
        relative = reading.abs() / reading.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
        weight = relative.amax(dim=(0, 2, 3)).clamp(min=1e-3)
        factor = (activation / weight).sqrt()
        balanced[f"body.{2 * layer}.weight"] /= factor.reshape(-1, 1, 1, 1)
        balanced[f"body.{2 * layer}.bias"] /= factor
        balanced[f"body.{2 * layer + 2}.weight"] = reading * factor.reshape(1, -1, 1, 1)
        bounds.append((float((low / factor).min()), float((high / factor).max())))
    return balanced, bounds


def _in_bytes(value: Node, low: float, high: float) -> Node:
    """Round to 256 evenly spaced values, zero among them: what a convolution pads with must not be a rounded one."""
    low, high = min(low, 0.0), max(high, 1e-6)
    step = (high - low) / 255
    zero = round(-low / step)
    low, high = -zero * step, (255 - zero) * step
    bounds = [np.full((1, 1, 1, 1), bound, np.float32) for bound in (low, high)]
    return ops.fake_quantize(value, *bounds, *bounds, 256)


def rrdb(card: ModelCard, state: Weights) -> openvino.Model:
    """An RRDBNet."""
    image = ops.parameter([-1, 3, -1, -1], np.float32)
    value: Node = image
    if card.size_multiple > 1:
        value = ops.space_to_depth(value, "depth_first", card.size_multiple)
    features = value = _convolution(value, state, "conv_first")
    for block in range(card.num_block):
        start = value
        for dense in ("rdb1", "rdb2", "rdb3"):
            value = _dense_block(value, state, f"body.{block}.{dense}")
        value = _residual(start, value)
    value = ops.add(features, _convolution(value, state, "conv_body"))
    for layer in ("conv_up1", "conv_up2"):
        value = _leaky(_convolution(_twice_as_large(value), state, layer))
    value = _leaky(_convolution(value, state, "conv_hr"))
    return openvino.Model([_convolution(value, state, "conv_last")], [image])


def _dense_block(value: Node, state: Weights, name: str) -> Node:
    collected = [value]
    for layer in range(1, 5):
        together = ops.concat(collected, 1) if layer > 1 else value
        collected.append(_leaky(_convolution(together, state, f"{name}.conv{layer}")))
    return _residual(value, _convolution(ops.concat(collected, 1), state, f"{name}.conv5"))


def _residual(start: Node, value: Node) -> Node:
    return ops.add(ops.multiply(value, np.float32(_RRDB_RESIDUAL)), start)


def _leaky(value: Node) -> Node:
    return ops.prelu(value, np.array([_RRDB_SLOPE], np.float32))


def _twice_as_large(value: Node) -> Node:
    return ops.interpolate(
        value,
        np.array([2, 2], np.float32),
        "nearest",
        "scales",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
        axes=np.array([2, 3]),
    )


def _convolution(value: Node, state: Weights, name: str, in_bytes: bool = False) -> Node:
    """A 3x3 convolution that keeps the size."""
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    kernel = _constant(weight)
    if in_bytes:
        # -127..127, each output channel with a step of its own.
        largest = weight.float().abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12).numpy()
        kernel = ops.fake_quantize(kernel, -largest, largest, -largest, largest, 255)
    result = ops.convolution(value, kernel, [1, 1], [1, 1], [1, 1], [1, 1])
    return ops.add(result, _constant(bias.reshape(1, -1, 1, 1)))


def _constant(tensor: Tensor) -> Node:
    return ops.constant(tensor.float().contiguous().numpy())
