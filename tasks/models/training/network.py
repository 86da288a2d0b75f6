"""The compact network in the form that is trained: only torch, no loading machinery."""

from __future__ import annotations

from torch import Tensor, nn

FEATURES = 32

CONVOLUTIONS = {2: 5, 4: 8}
"""Hidden convolutions of the bundled model of each scale.

Doubling is the everyday case and has to run at five 640x360 frames per second on two CPU cores. Without AVX-512, one
frame takes about 0.52 s of processor time with eight and 0.32 s with five.
"""


class CompactNetwork(nn.Module):
    """The compact network: plain 3x3 convolutions at low resolution, pixel shuffle, nearest-neighbour shortcut.

    Module names and shapes equal those of `SRVGGNetCompact`, so weights are interchangeable with that family.
    """

    def __init__(self, scale: int, convolutions: int, features: int = FEATURES) -> None:
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
