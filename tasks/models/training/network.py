"""The compact network in the form that is trained: only torch, no loading machinery."""

from __future__ import annotations

from typing import Final

from torch import Tensor, nn

#: Features and hidden convolutions of the bundled models by scale.
#:
#: `compact`: doubling is the everyday case and has to run at five 640x360 frames per second on two CPU cores. Without
#: AVX-512, one frame takes about 0.52 s of processor time with eight convolutions and 0.32 s with five. `standard` is
#: for GPUs and many cores; 64 features fill tensor cores.
SIZES: Final[dict[str, dict[int, tuple[int, int]]]] = {
    "compact": {2: (32, 5), 4: (32, 8)},
    "standard": {2: (64, 12), 4: (64, 12)},
}


class CompactNetwork(nn.Module):
    """The compact network: plain 3x3 convolutions at low resolution, pixel shuffle, nearest-neighbour shortcut.

    Module names and shapes equal those of `SRVGGNetCompact`, so weights are interchangeable with that family.
    """

    def __init__(self, scale: int, convolutions: int, features: int = 32) -> None:
        """Build the network with fresh weights.

        Args:
            scale: Integer upscaling factor.
            convolutions: Number of hidden convolutions between the first and the last one.
            features: Channels of the hidden layers.
        """
        super().__init__()
        self.scale = scale
        layers: list[nn.Module] = [nn.Conv2d(3, features, 3, padding=1), nn.PReLU(features)]
        for _ in range(convolutions):
            layers += [nn.Conv2d(features, features, 3, padding=1), nn.PReLU(features)]
        layers.append(nn.Conv2d(features, 3 * scale * scale, 3, padding=1))
        self.body = nn.ModuleList(layers)
        self.upsampler = nn.PixelShuffle(scale)

    def forward(self, x: Tensor) -> Tensor:
        """Upscale a batch of shape (batch, 3, height, width), float 0..1, to (batch, 3, height * s, width * s)."""
        out = x
        for layer in self.body:
            out = layer(out)
        return self.upsampler(out) + nn.functional.interpolate(x, scale_factor=self.scale, mode="nearest")
