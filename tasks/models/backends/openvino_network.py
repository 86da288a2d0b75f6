"""Networks run by OpenVINO on a CPU.

The graphs are built here layer by layer from the weights: no converter, which would need an export of the torch
network, seconds of time and a package that reports its use to its maker.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset13 as ops
from torch import Tensor

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
    """

    name = "openvino"
    channels_last = False

    def __init__(self, card: ModelCard, state: Weights, threads: int, streams: int) -> None:
        model = srvgg(card, state) if card.architecture == "srvgg" else rrdb(card, state)
        self._compiled = _core().compile_model(
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
        self._local = threading.local()

    def run(self, x: Tensor) -> Tensor:
        """See `Backend.run`."""
        if not hasattr(self._local, "request"):
            self._local.request = self._compiled.create_infer_request()
        results = self._local.request.infer([x.contiguous().numpy()], share_inputs=True, share_outputs=True)
        return torch.from_numpy(results[0])


@lru_cache(maxsize=1)
def _core() -> Any:
    return openvino.Core()


def srvgg(card: ModelCard, state: Weights) -> openvino.Model:
    """An SRVGGNetCompact without its pixel shuffle."""
    image = ops.parameter([-1, 3, -1, -1], np.float32)
    value: Node = image
    for layer in range(0, 2 * card.num_conv + 4, 2):
        value = _convolution(value, state, f"body.{layer}")
        if layer <= 2 * card.num_conv:
            value = ops.prelu(value, _constant(state[f"body.{layer + 1}.weight"]))
    cell = card.scale**2
    nearest = ops.gather(image, np.repeat(np.arange(3), cell), np.int64(1))
    return openvino.Model([ops.add(value, nearest)], [image])


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


def _convolution(value: Node, state: Weights, name: str) -> Node:
    """A 3x3 convolution that keeps the size."""
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    result = ops.convolution(value, _constant(weight), [1, 1], [1, 1], [1, 1], [1, 1])
    return ops.add(result, _constant(bias.reshape(1, -1, 1, 1)))


def _constant(tensor: Tensor) -> Node:
    return ops.constant(tensor.float().contiguous().numpy())
