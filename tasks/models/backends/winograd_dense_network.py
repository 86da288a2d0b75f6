"""`rrdb` networks in fp32 on a CPU, by convolutions of this project: see `winograd_program`.

The channels of a dense block lie side by side in one piece of memory, what goes in first: each layer reads those that
are there and writes the next ones, so nothing is put together. Where the picture is at its new size it goes from layer
to layer in tiles, which fit into the cache and overlap by all that those layers see.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.media.changes import Box
from tasks.models.backends.winograd_layer import Layer, Memory, Threads, even
from tasks.models.backends.winograd_program import Convolution, Ending, padded, transformed, whole_vectors
from tasks.models.cards import ModelCard
from tasks.models.networks import RRDB_RESIDUAL, RRDB_SLOPE

if TYPE_CHECKING:
    from tasks.models.backends.winograd_layer import Floats

#: Layers of a dense block before its last one.
_GROWING: Final = 4

#: How often the picture becomes twice as large, and how many pixels of the result one of the body is along an edge.
_DOUBLINGS: Final = 2
_ENLARGED: Final = 2**_DOUBLINGS

#: Edge of a tile in pixels of the body, and how many more on each side the layers after the body see: one for that at
#: half size, and three at full size.
_TILE: Final = 32
_SEEN: Final = 2


class WinogradDenseNetwork:
    """An `rrdb` network compiled for this CPU, for frames of any size.

    Args:
        card: The model.
        state: Its weights.
        threads: Threads for all streams together.
        streams: Calls that come side by side, each computed by its share of the threads.
    """

    name = "winograd"
    dtype = torch.float32

    def __init__(self, card: ModelCard, state: Mapping[str, Tensor], threads: int, streams: int) -> None:
        self._card = card
        self._threads = Threads(threads // streams)
        self._features, self._grown = whole_vectors(card.num_feat), whole_vectors(card.num_grow)
        self._block = self._features + _GROWING * self._grown
        self._memory = Memory()
        image = 3 * card.size_multiple**2
        self._first = self._layer(state, "conv_first", whole_vectors(image), self._block, inputs=image, slope=1)
        self._blocks = [
            [self._dense_block(state, f"body.{block}.rdb{dense}") for dense in (1, 2, 3)]
            for block in range(card.num_block)
        ]
        self._body = self._layer(state, "conv_body", self._block, self._block, ending="plus")
        self._enlarging = [self._layer(state, f"conv_up{i + 1}", self._features) for i in range(_DOUBLINGS)]
        self._detail = self._layer(state, "conv_hr", self._features)
        self._last = self._layer(state, "conv_last", self._features, slope=1)

    def _dense_block(self, state: Mapping[str, Tensor], name: str) -> list[Layer]:
        layer = partial(self._layer, state, source_channels=self._block, target_channels=self._block)
        growing = [layer(f"{name}.conv{i + 1}", inputs=self._features + i * self._grown) for i in range(_GROWING)]
        last = layer(f"{name}.conv{_GROWING + 1}", inputs=self._block, ending="plus", gain=RRDB_RESIDUAL)
        return [*growing, last]

    def _layer(
        self,
        state: Mapping[str, Tensor],
        name: str,
        source_channels: int,
        target_channels: int | None = None,
        *,
        inputs: int | None = None,
        ending: Ending = "prelu",
        slope: float = RRDB_SLOPE,
        gain: float = 1.0,
    ) -> Layer:
        """A layer of that name, whose result is multiplied by `gain`.

        It reads `inputs` channels, by default the features; its target has what it writes, if nothing else is said.
        """
        weight, bias = gain * state[f"{name}.weight"], gain * state[f"{name}.bias"]
        inputs = inputs or self._features
        outputs = whole_vectors(len(weight))
        return Layer(
            Convolution(
                inputs=inputs,
                outputs=outputs,
                source_channels=source_channels,
                target_channels=target_channels or outputs,
                ending=ending,
            ),
            transformed(self._spread(weight, inputs), outputs),
            padded(bias),
            padded(torch.full_like(bias, slope)),
        )

    def _spread(self, weight: Tensor, inputs: int) -> Tensor:
        """The weight for channels as they lie in memory, where each layer's begin with a whole vector."""
        if weight.shape[1] == inputs:
            return weight
        card = self._card
        result = weight.new_zeros(len(weight), inputs, 3, 3)
        result[:, : card.num_feat] = weight[:, : card.num_feat]
        for i, part in enumerate(weight[:, card.num_feat :].split(card.num_grow, 1)):
            start = self._features + i * self._grown
            result[:, start : start + card.num_grow] = part
        return result

    def run(self, x: Tensor) -> Tensor:
        """See `Backend.run`."""
        x = F.pixel_unshuffle(x, self._card.size_multiple)
        n, _, h, w = x.shape
        result = np.empty((n, _ENLARGED * h, _ENLARGED * w, 3), np.float32)
        for picture, enlarged in zip(x.numpy(), result, strict=True):
            self._enlarge(self._through_body(picture), (h, w), enlarged)
        return torch.from_numpy(result).permute(0, 3, 1, 2)

    def codes(self, x: Tensor, gains: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Code values are made of `srvgg` networks' results only."""
        raise NotImplementedError

    def _through_body(self, picture: Floats) -> Floats:
        """The features of a picture `[c, h, w]` after all blocks, from the first pixel on."""
        size = picture.shape[1], picture.shape[2]
        h, w = size
        image = self._bordered("image", size, self._first.work.source_channels)
        image[:h, :w, : len(picture)] = picture.transpose(1, 2, 0)
        start, one, other = (self._bordered(f"block {i}", size, self._block) for i in range(3))
        features = self._bordered("features", size, self._block)
        apply = partial(self._apply, size=size)
        apply(self._first, image, features)
        start[:h, :w, : self._features] = features[:h, :w, : self._features]
        for block in self._blocks:
            value = start
            for dense, target, added in zip(block, (one, other, one), (None, None, start), strict=True):
                for i, layer in enumerate(dense[:-1]):
                    apply(layer, value, value[..., self._features + i * self._grown :])
                apply(dense[-1], value, target, extra=value, start=added)
                value = target
            start, one = one, start
        apply(self._body, start, other, extra=features)
        return other

    def _enlarge(self, features: Floats, size: tuple[int, int], result: Floats) -> None:
        """Take features through the layers after the body.

        Args:
            features: From their first pixel on.
            size: Rows and columns of them.
            result: `[rows, columns, 3]`, at the new size.
        """
        h, w = size

        def compute(kept: Box) -> None:
            needed = kept.grown(_SEEN, w, h)
            seen = features[needed.top : needed.bottom, needed.left : needed.right, : self._features]
            tile = self._tile_enlarged(seen)
            place, inside = kept.scaled(_ENLARGED), kept.within(needed).scaled(_ENLARGED)
            result[place.top : place.bottom, place.left : place.right] = tile[
                inside.top : inside.bottom, inside.left : inside.right, :3
            ]

        self._threads.each(
            compute,
            [
                Box(top, left, min(h, top + _TILE), min(w, left + _TILE))
                for top in range(0, h, _TILE)
                for left in range(0, w, _TILE)
            ],
        )

    def _tile_enlarged(self, value: Floats) -> Floats:
        """A tile after the last layer; valid until the thread's next one."""
        for i, layer in enumerate(self._enlarging):
            size = 2 * value.shape[0], 2 * value.shape[1]
            doubled, enlarged = (
                self._bordered(f"{name} {i}", size, self._features) for name in ("doubled", "enlarged")
            )
            for y in range(2):
                for x in range(2):
                    doubled[y : size[0] : 2, x : size[1] : 2] = value
            layer.apply(self._memory, doubled, enlarged, size)
            value = enlarged[: size[0], : size[1]]
        detail = doubled  # What it held has been read.
        self._detail.apply(self._memory, enlarged, detail, size)
        result = self._memory.get("result", *size, self._last.work.target_channels)
        self._last.apply(self._memory, detail, result, size)
        return result

    def _apply(
        self,
        layer: Layer,
        source: Floats,
        target: Floats,
        extra: Floats | None = None,
        start: Floats | None = None,
        *,
        size: tuple[int, int],
    ) -> None:
        """Apply a layer to a whole picture.

        Args:
            layer: Which.
            source: What it reads.
            target: Where it writes.
            extra: What is added to the result, if anything.
            start: What three dense blocks began with, after the last one of them.
            size: Rows and columns.
        """
        h, w = size
        height = even(-(-h // self._threads.count))

        def compute(top: int) -> None:
            rows = slice(top, min(h, top + height))
            here = None if extra is None else extra[top:]
            layer.apply(self._memory, source[top:], target[top:], (rows.stop - top, w), here)
            if start is not None:
                part = target[rows, :w, : self._features]
                part *= RRDB_RESIDUAL
                part += start[rows, :w, : self._features]

        self._threads.each(compute, range(0, h, height))
        # Beyond a picture of odd size layers see zeros, not what its last cells have there.
        target[h : even(h), : even(w), : layer.work.outputs] = 0
        target[:h, w : even(w), : layer.work.outputs] = 0

    def _bordered(self, name: str, size: tuple[int, int], channels: int) -> Floats:
        """Memory for a picture, from its first pixel on, with zeros around it."""
        h, w = size
        piece = self._memory.get(name, even(h) + 2, even(w) + 2, channels)
        for edge in (slice(1), slice(h + 1, None)):
            piece[edge] = 0
        for edge in (slice(1), slice(w + 1, None)):
            piece[:, edge] = 0
        return piece[1:, 1:]
