"""Pictures and model cards for the tests of models and engine."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch

from tasks.media.colour import RgbToPlanes
from tasks.media.pixels import Colour, PictureFormat
from tasks.models.backends import winograd_program
from tasks.models.cards import ModelCard

#: Backends that run convolutional networks where the tests run; the last is the choice for fp32.
CPU_BACKENDS: Final = ("torch", "openvino", "winograd") if winograd_program.is_available() else ("torch", "openvino")


def blank_card(**shape: Any) -> ModelCard:
    """A card that only describes a network."""
    text = dict.fromkeys(("sha256", "licence", "source", "best_for", "description"), "")
    return ModelCard(**{"name": "test", "bytes": 0, **text, **shape})


def unfit_for_bytes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights that do about the same in floats, as the small difference of two large channels."""
    state = {name: tensor.clone() for name, tensor in state.items()}
    large, other = 50.0, 0.77 * 50.0
    state["body.0.weight"][:2] = 0
    state["body.0.bias"][:2] = 0
    state["body.0.weight"][:2, 0, 1, 1] = torch.tensor([large, other])
    state["body.2.weight"][:, :2] = 0
    state["body.2.weight"][:, 0, 1, 1] = 10000 / large
    state["body.2.weight"][:, 1, 1, 1] = -10000 / other
    return state


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 `[height, width, 3]`: slow gradients, edges and fine noise, as photographs have."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    planes = []
    for _ in range(3):
        a, b, c = random.uniform(0.01, 0.1, 3)
        plane = 110 + 50 * np.sin(a * x + b * y) + 30 * np.cos(c * x - a * y)
        plane += 30 * ((x // random.integers(7, 23) + y // random.integers(7, 23)) % 2)
        planes.append(plane + random.normal(0, 4, plane.shape))
    return np.clip(np.round(np.stack(planes, axis=-1)), 0, 255).astype(np.uint8)


def picture_format(width: int, height: int, **colour: Any) -> PictureFormat:
    """8-bit 4:2:0, BT.709 limited range unless told otherwise."""
    return PictureFormat(width, height, "yuv420p", Colour(**{"matrix": "bt709", "full_range": False, **colour}))


def yuv_frames(form: PictureFormat, count: int, seed: int = 0) -> np.ndarray:
    """uint8 `[count, frame_bytes]`, all different."""
    rgb = np.stack([picture(form.height, form.width, seed + i) for i in range(count)])
    return RgbToPlanes(form)(torch.from_numpy(rgb).permute(0, 3, 1, 2).float() / 255).numpy()
