"""Networks run by torch, on a GPU or a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from tasks.media.colour import RgbToPlanes
from tasks.models import networks
from tasks.models.cards import ModelCard

#: On a CPU, activations of an `srvgg` network larger than this are cut into strips (see `low_resolution_output`).
#: Outside the main thread glibc cannot keep a freed block of 64 MiB or more, whatever it is told: it would be mapped
#: and cleared anew for every layer. Below that, strips would only cost the copying of their borders.
_WHOLE_BYTES: Final = 48 << 20
_STRIP_BYTES: Final = 8 << 20


class TorchNetwork:
    """A network of torch modules.

    Args:
        card: The model.
        state: Its weights.
        device: Where it runs.
        dtype: In which precision.
        to_planes: What makes code values of its result.
    """

    name = "torch"

    def __init__(
        self,
        card: ModelCard,
        state: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        to_planes: RgbToPlanes,
    ) -> None:
        self.card = card
        self.device = device
        self.dtype = dtype
        self._to_planes = to_planes
        network = networks.build(card)
        network.load_state_dict(state)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._network = network.to(device=device, dtype=dtype)

    def run(self, x: Tensor) -> Tensor:
        """See `Backend.run`."""
        x = x.contiguous(memory_format=torch.channels_last)
        if self.card.architecture != "srvgg":
            return self._network(x)
        row_bytes = x.shape[0] * x.shape[3] * self.card.num_feat * x.element_size()
        large = self.device.type == "cpu" and row_bytes * x.shape[2] > _WHOLE_BYTES
        rows = max(8, _STRIP_BYTES // row_bytes) if large else None
        return networks.low_resolution_output(self._network, x, rows)

    def codes(self, x: Tensor, gains: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend.codes`."""
        return codes_of(self.run(x), self._to_planes, self.card.scale, gains)


def codes_of(
    phases: Tensor, to_planes: RgbToPlanes, scale: int, gains: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """What `Backend.codes` gives for what `Backend.run` gave, which is overwritten."""
    finite = all_finite(phases)
    luma, chroma = to_planes.codes(phases.float().clamp_(0, 1), scale, gains)
    return luma, chroma, finite


def all_finite(values: Tensor) -> Tensor:
    """For each `[n]` of `[n, c, h, w]`, whether all values are finite."""
    # A sum is finite only if every value is (and none is so large that it would be wrong anyway).
    return torch.isfinite(values.sum(dim=(1, 2, 3), dtype=torch.float32))
