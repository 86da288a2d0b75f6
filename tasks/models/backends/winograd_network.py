"""`srvgg` networks in fp32 on a CPU, by convolutions of this project: see `winograd_program`.

A picture goes through all layers in one piece of memory: each layer writes its result one row and one column before
what it reads, so that it only overwrites what it no longer needs. Code values are made of some rows at a time, while
the cache still holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from tasks.media.colour import PhaseKernels, RgbToPlanes
from tasks.models.backends.winograd_layer import Layer, Memory, Threads, address, even, row_of
from tasks.models.backends.winograd_program import (
    CELL,
    Convolution,
    Ending,
    Filter,
    by_tap,
    compiled,
    padded,
    transformed,
    vector_floats,
    whole_vectors,
)
from tasks.models.cards import ModelCard

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tasks.models.backends.winograd_layer import Floats

#: Bytes of rows that become code values at a time.
_STRIP_BYTES: Final = 4 << 20


class WinogradNetwork:
    """An `srvgg` network compiled for this CPU, for frames of any size.

    Args:
        card: The model.
        state: Its weights.
        threads: Threads for all streams together.
        streams: Calls that come side by side, each computed by its share of the threads.
        to_planes: What makes code values of its result.
    """

    name = "winograd"
    dtype = torch.float32

    def __init__(
        self, card: ModelCard, state: Mapping[str, Tensor], threads: int, streams: int, to_planes: RgbToPlanes
    ) -> None:
        self._card, self._threads = card, Threads(threads // streams)
        self._outputs = 3 * card.scale**2
        self._features, self._written = whole_vectors(card.num_feat), whole_vectors(self._outputs)
        last = card.num_conv + 1
        self._body = [self._layer(state, index, "prelu") for index in range(last)]
        self._enlarged = self._layer(state, last, "enlarged")
        self._picture = replace(self._enlarged, work=replace(self._enlarged.work, ending="picture"))
        takes_phases = to_planes.takes_phases(card.scale)
        self._colours = _Colours(to_planes.kernels(card.scale), self._written) if takes_phases else None
        self._memory = Memory()

    def _layer(self, state: Mapping[str, Tensor], index: int, ending: Ending) -> Layer:
        outputs = self._features if ending == "prelu" else self._written
        convolution = Convolution(
            inputs=self._card.num_feat if index else 3,
            outputs=outputs,
            source_channels=self._features if index else vector_floats(),
            target_channels=outputs,
            ending=ending,
            repeated=self._card.scale**2,
        )
        return Layer(
            convolution,
            transformed(state[f"body.{2 * index}.weight"], outputs),
            padded(state[f"body.{2 * index}.bias"]),
            padded(state[f"body.{2 * index + 1}.weight"] if ending == "prelu" else torch.zeros(1)),
        )

    def run(self, x: Tensor) -> Tensor:
        """See `Backend.run`."""
        n, _, h, w = x.shape
        result = np.empty((n, even(h), even(w), self._written), np.float32)

        def finish(i: int, part: _Part, rows: slice) -> None:
            self._end(self._enlarged, part, rows, result[i, rows.start :])

        self._each_band(x, 0, finish)
        return torch.from_numpy(result[:, :h, :w, : self._outputs]).permute(0, 3, 1, 2)

    def codes(self, x: Tensor, gains: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend.codes`."""
        colours = self._colours
        assert colours is not None
        n, _, h, w = x.shape
        luma, chroma = (np.empty((n, h, w, samples), colours.type) for samples in colours.samples)
        by_row, by_column = padded(gains[0][0, :, :, 0].T), padded(gains[1][0, :, 0].T)
        finite = np.ones(n, bool)
        margin = even(colours.reach)
        height = max(CELL, even(_STRIP_BYTES // (4 * self._written * w)))

        def finish(i: int, part: _Part, rows: slice) -> None:
            strip = self._memory.get("strip", height + 2 * margin, even(w), self._written)
            for top in range(rows.start, rows.stop, height):
                bottom = min(top + height, rows.stop)
                known = slice(max(0, top - margin), min(h, bottom + margin))
                above, below = known.start - top + margin, known.stop - top + margin
                if not self._end(self._picture, part, known, strip[above:]):
                    finite[i] = False
                strip[:above] = strip[below:] = 0
                here, size = slice(top, bottom), (bottom - top, w)
                colours.convert(strip[margin:], size, luma[i, here], chroma[i, here], by_row[here], by_column)

        self._each_band(x, margin, finish)
        planes = [torch.from_numpy(codes).permute(0, 3, 1, 2) for codes in (luma, chroma)]
        return planes[0], planes[1], torch.from_numpy(finite)

    def _each_band(self, x: Tensor, margin: int, finish: Callable[[int, _Part, slice], None]) -> None:
        """Take pictures through all layers but the last, and let `finish` see to rows of them, in several threads.

        Args:
            x: `[n, 3, h, w]`.
            margin: Rows around its own that `finish` wants to know.
            finish: Of the picture's index, what there is of it, and the rows to see to.
        """
        # Threads that share a picture compute what is around their rows twice.
        reach = self._card.receptive_field + margin
        rows = x.shape[2]
        count = max(1, min(self._threads.count, rows // (2 * reach)))
        height = even(-(-rows // count))
        bands = [slice(top, min(rows, top + height)) for top in range(0, rows, height)]
        for index, image in enumerate(x.numpy()):

            def compute(band: slice, index: int = index, image: Floats = image) -> None:
                top = max(0, band.start - even(reach))
                finish(index, self._through_body(image[:, top : band.stop + reach], top), band)

            self._threads.each(compute, bands)

    def _through_body(self, picture: Floats, top: int) -> _Part:
        """Take a part of a picture `[3, h, w]` that begins with row `top` through all layers but the last."""
        h, w = picture.shape[1:]
        image = self._memory.get("image", even(h) + 2, even(w) + 2, vector_floats())
        image[:] = 0
        image[1 : h + 1, 1 : w + 1, :3] = picture.transpose(1, 2, 0)
        steps = len(self._body)
        features = self._memory.get("features", even(h) + 1 + steps, even(w) + 1 + steps, self._features)
        source = image[1:, 1:]
        for start, layer in zip(range(steps, 0, -1), self._body, strict=True):  # Row and column of the first pixel.
            layer.apply(self._memory, source, features[start:, start:], (h, w))
            source = features[start:, start:]
            for edge in (start - 1, start + h):
                features[edge, start - 1 : start + w + 1] = 0
            for edge in (start - 1, start + w):
                features[start - 1 : start + h + 1, edge] = 0
        return _Part(image[1:, 1:], source, top, w)

    def _end(self, layer: Layer, part: _Part, rows: slice, target: Floats) -> bool:
        """Apply the last layer to some rows. Returns whether all that it gave was finite."""
        first = rows.start - part.top
        image, features = part.image[first:], part.features[first:]
        return layer.apply(self._memory, features, target, (rows.stop - rows.start, part.width), image)


@dataclass(frozen=True)
class _Part:
    """What is in a thread's memory of a picture, from its first pixel on: valid until the thread's next one."""

    image: Floats
    features: Floats
    top: int
    """Row of the picture that the first one here is."""
    width: int


class _Colours:
    """Code values of pictures in rows of pixels, channels side by side: what `RgbToPlanes.codes` computes.

    Args:
        kernels: See there.
        channels: Of a pixel in memory.
    """

    def __init__(self, kernels: PhaseKernels, channels: int) -> None:
        self.samples = len(kernels.luma), len(kernels.columns)
        self.type = np.uint8 if kernels.peak < 256 else np.int16
        self.reach = kernels.rows.shape[2] // 2
        zeros = torch.zeros(len(kernels.rows))
        self._luma = _Filtering(kernels.luma, kernels.luma_bias, channels, kernels.peak)
        self._rows = _Filtering(kernels.rows, zeros, channels)
        self._columns = _Filtering(
            kernels.columns, kernels.chroma_bias, whole_vectors(len(zeros)), kernels.peak, has_gains=True
        )
        self._memory = Memory()

    def convert(
        self,
        picture: Floats,
        size: tuple[int, int],
        luma: NDArray[Any],
        chroma: NDArray[Any],
        by_row: Floats,
        by_column: Floats,
    ) -> None:
        """Convert rows.

        Args:
            picture: From their first pixel on; there are `reach` more rows above and below.
            size: Rows and columns.
            luma: Where it goes, `[row, column, sample]`.
            chroma: Likewise.
            by_row: Gains `[row, sample]`.
            by_column: Gains `[column, sample]`.
        """
        h, w = size
        reach = self._columns.work.taps[1] // 2
        between = self._memory.get("rows", h, w + 2 * reach, self._columns.work.source_channels)
        between[:, :reach] = between[:, w + reach :] = 0
        self._luma.apply(picture, luma, size)
        self._rows.apply(picture, between[:, reach:], size)
        self._columns.apply(between[:, reach:], chroma, size, by_row, by_column)


class _Filtering:
    """A filter with its weights."""

    def __init__(
        self, kernel: Tensor, bias: Tensor, channels: int, peak: int | None = None, has_gains: bool = False
    ) -> None:
        outputs, inputs, down, across = kernel.shape
        self.work = Filter(inputs, outputs, channels, (down, across), peak, has_gains)
        self._weight, self._bias = by_tap(kernel), padded(bias.flatten())

    def apply(self, source: Floats, target: NDArray[Any], size: tuple[int, int], *gains: Floats) -> None:
        """Both from their first pixel on."""
        compiled(self.work)(
            *(address(source), row_of(source), address(target), row_of(target), *size),
            *(address(array) for array in (self._weight, self._bias, *(gains or (self._bias, self._bias)))),
        )
