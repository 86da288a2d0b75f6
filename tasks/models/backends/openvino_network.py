"""Networks run by OpenVINO on a CPU.

The graphs are built here layer by layer from the weights: no converter, which would need an export of the torch
network, seconds of time and a package that reports its use to its maker.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset13 as ops
from torch import Tensor

from tasks.media.colour import PhaseKernels, RgbToPlanes
from tasks.models.backends.torch_network import codes_of
from tasks.models.cards import ModelCard
from tasks.models.networks import RRDB_RESIDUAL, RRDB_SLOPE
from tasks.models.quantisation import LARGEST_WEIGHT, LEVELS, Quantised

Node = Any
Weights = Mapping[str, Tensor]


class OpenVinoNetwork:
    """A network compiled for this CPU, for frames of any size.

    Args:
        card: The model.
        state: Its weights.
        threads: Threads for all streams together.
        streams: Calls of `run` that are computed side by side, each by its share of the threads.
        to_planes: What makes code values of its result.
        quantised: An `srvgg` network in bytes, to run instead.
        in_bf16: Let the layers compute in `bf16`; what goes in and comes out is float32.
    """

    name = "openvino"
    dtype = torch.float32

    def __init__(
        self,
        card: ModelCard,
        state: Weights,
        threads: int,
        streams: int,
        to_planes: RgbToPlanes,
        quantised: Quantised | None = None,
        in_bf16: bool = False,
    ) -> None:
        self._in_bf16 = in_bf16
        self._card, self._state, self._quantised, self._to_planes = card, state, quantised, to_planes
        self._threads, self._streams = threads, streams
        self._compiling = threading.Lock()
        self._compiled: dict[bool, Any] = {}
        self._requests = threading.local()

    def run(self, x: Tensor) -> Tensor:
        """See `Backend.run`."""
        return torch.from_numpy(self._request(in_codes=False).infer([_array(x)], **_SHARED)[0])

    def codes(self, x: Tensor, gains: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend.codes`."""
        if self._in_bf16:
            # In the graph colours would be computed in eight bits of precision, too.
            return codes_of(self.run(x), self._to_planes, self._card.scale, gains)
        results = self._request(in_codes=True).infer([_array(x), *map(_array, gains)], **_SHARED)
        luma, chroma = (_samples(results[i]).permute(0, 3, 1, 2) for i in range(2))
        # What goes into the last layer of a network in bytes is bounded.
        sums = torch.from_numpy(results[2]) if self._quantised is None else torch.zeros(len(x))
        return luma, chroma, torch.isfinite(sums)

    def _request(self, in_codes: bool) -> Any:
        """That of this thread; graphs are compiled when first needed."""
        requests: dict[bool, Any] = self._requests.__dict__.setdefault("by_kind", {})
        if in_codes not in requests:
            with self._compiling:
                if in_codes not in self._compiled:
                    model = self._model(in_codes)
                    self._compiled[in_codes] = _compile(model, self._threads, self._streams, self._in_bf16)
            requests[in_codes] = self._compiled[in_codes].create_infer_request()
        return requests[in_codes]

    def _model(self, in_codes: bool) -> openvino.Model:
        if self._card.architecture == "rrdb":
            return rrdb(self._card, self._state)
        kernels = self._to_planes.kernels(self._card.scale) if in_codes else None
        return srvgg(self._card, self._state, self._quantised, kernels, in_bf16=self._in_bf16)


#: Inputs are read where they are, and results stay where they were written.
_SHARED: dict[str, Any] = {"share_inputs": True, "share_outputs": True}


def _samples(codes: np.ndarray) -> Tensor:
    """Code values in the type they have in raw frames."""
    return torch.from_numpy(codes if codes.dtype == np.uint8 else codes.astype(np.int16))


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().numpy()


def activation_extremes(card: ModelCard, state: Weights, images: Iterable[Tensor], threads: int) -> Tensor:
    """How far the activations of an `srvgg` network reach.

    Args:
        card: The model.
        state: Its weights.
        images: Float32 `[1, 3, h, w]` in 0..1 each.
        threads: CPU threads.

    Returns:
        Float32 `[image, activation, 2, channel]`: the least and the largest values.
    """
    axes = np.array([0, 2, 3])
    watched = _compile(
        srvgg(card, state, watch=lambda value: [ops.reduce_min(value, axes), ops.reduce_max(value, axes)]), threads, 1
    )
    found = [[results[i] for i in range(1, len(results))] for results in _run(watched, images)]
    return torch.from_numpy(np.array(found)).reshape(len(found), card.num_conv + 1, 2, card.num_feat)


def activations(card: ModelCard, state: Weights, images: Iterable[Tensor], threads: int) -> Iterator[list[Tensor]]:
    """All activations of an `srvgg` network for each image, `[channels, h, w]` each; valid until the next image."""
    watched = _compile(srvgg(card, state, watch=lambda value: [value]), threads, 1)
    for results in _run(watched, images):
        yield [torch.from_numpy(results[i][0]) for i in range(1, len(results))]


def _run(compiled: Any, images: Iterable[Tensor]) -> Iterator[Any]:
    return (compiled([_array(image)]) for image in images)


@lru_cache(maxsize=1)
def _core() -> Any:
    return openvino.Core()


def _compile(model: openvino.Model, threads: int, streams: int, in_bf16: bool = False) -> Any:
    return _core().compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": streams,
            # Left open, it would be chosen by processor, and the same frame differ from node to node.
            "INFERENCE_PRECISION_HINT": "bf16" if in_bf16 else "f32",
            # Decoding and encoding share the machine: which core is free is the kernel's business.
            "ENABLE_CPU_PINNING": False,
            # Prepared layers of each size of picture that was seen: parts of frames have hundreds, and with the default
            # of 5000 memory grew by half a megabyte with each.
            "CPU_RUNTIME_CACHE_CAPACITY": "500",
        },
    )


def srvgg(
    card: ModelCard,
    state: Weights,
    quantised: Quantised | None = None,
    kernels: PhaseKernels | None = None,
    watch: Callable[[Node], list[Node]] | None = None,
    in_bf16: bool = False,
) -> openvino.Model:
    """An SRVGGNetCompact without its pixel shuffle.

    Args:
        card: The model.
        state: Its weights.
        quantised: The same in bytes, to use instead.
        kernels: Go on to code values: luma and chroma `[n, h, w, channels]`, uint8 or int32, and the sum of what the
            network gave unless it is in bytes. Further inputs are the gains at the edges.
        watch: Makes further outputs from each activation.
        in_bf16: Convolutions are going to be computed in `bf16`.
    """
    image = ops.parameter([-1, 3, -1, -1], np.float32)
    value: Node = image
    watched: list[Node] = []
    weights = state if quantised is None else quantised.state
    for layer in range(card.num_conv + 2):
        value = _convolution(value, weights, f"body.{2 * layer}")
        if layer <= card.num_conv:
            value = ops.prelu(value, _constant(weights[f"body.{2 * layer + 1}.weight"]))
            if watch is not None:
                watched += watch(value)
            if quantised is not None:
                bounds = [np.full((1, 1, 1, 1), bound, np.float32) for bound in quantised.bounds[layer]]
                value = ops.fake_quantize(value, *bounds, *bounds, LEVELS)
    # The image enlarged by repeating pixels: what a convolution gives, the layer before adds on its way, but in `bf16`
    # the image itself would be rounded to eight bits.
    cell = card.scale**2
    if in_bf16:
        repeated = ops.gather(image, np.repeat(np.arange(3), cell), np.int64(1))
    else:
        repeated = _plain_convolution(image, torch.eye(3).repeat_interleave(cell, dim=0).reshape(-1, 3, 1, 1))
    value = ops.add(value, repeated)
    if kernels is None:
        return openvino.Model([value, *watched], [image])
    outputs = [] if quantised is not None else [ops.reduce_sum(value, np.array([1, 2, 3]))]
    codes, gains = _codes(ops.clamp(value, 0.0, 1.0), kernels)
    return openvino.Model([*codes, *outputs], [image, *gains])


def _codes(image: Node, kernels: PhaseKernels) -> tuple[list[Node], list[Node]]:
    """Luma and chroma as `RgbToPlanes.codes` computes them, `[n, h, w, channels]`, and the inputs for the gains."""
    luma = ops.add(_plain_convolution(image, kernels.luma), _constant(kernels.luma_bias.reshape(1, -1, 1, 1)))
    channels = kernels.chroma_bias.shape[1]
    gains = [ops.parameter(shape, np.float32) for shape in ([1, channels, -1, 1], [1, channels, 1, -1])]
    chroma = _plain_convolution(_plain_convolution(image, kernels.rows), kernels.columns)
    for gain in gains:
        chroma = ops.multiply(chroma, gain)
    chroma = ops.add(chroma, _constant(kernels.chroma_bias))
    return [_bytes_side_by_side(plane, kernels.peak) for plane in (luma, chroma)], gains


def _bytes_side_by_side(value: Node, peak: int) -> Node:
    # More than 8 bits: there is no 16-bit integer that OpenVINO computes in.
    codes = ops.convert(ops.clamp(value, 0.0, float(peak)), np.uint8 if peak < 256 else np.int32)
    return ops.transpose(codes, np.array([0, 2, 3, 1]))


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
    return ops.add(ops.multiply(value, np.float32(RRDB_RESIDUAL)), start)


def _leaky(value: Node) -> Node:
    return ops.prelu(value, np.array([RRDB_SLOPE], np.float32))


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
    """A 3x3 convolution that keeps the size; in bytes if its weights are integers."""
    weight, bias, step = state[f"{name}.weight"], state[f"{name}.bias"], state.get(f"{name}.step")
    if step is None:
        kernel = _constant(weight)
    else:
        step = step.reshape(-1, 1, 1, 1)
        largest = (LARGEST_WEIGHT * step).numpy()
        # Changes no value; it is how the compiler sees that these are integers.
        kernel = ops.fake_quantize(
            _constant(weight * step), -largest, largest, -largest, largest, 2 * LARGEST_WEIGHT + 1
        )
    result = ops.convolution(value, kernel, [1, 1], [1, 1], [1, 1], [1, 1])
    return ops.add(result, _constant(bias.reshape(1, -1, 1, 1)))


def _plain_convolution(value: Node, kernel: Tensor) -> Node:
    """A convolution in floats that keeps the size, without bias."""
    pads = [side // 2 for side in kernel.shape[2:]]
    return ops.convolution(value, _constant(kernel), [1, 1], pads, pads, [1, 1])


def _constant(tensor: Tensor) -> Node:
    return ops.constant(tensor.float().contiguous().numpy())
