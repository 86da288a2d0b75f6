"""How networks are brought into bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tasks.errors import ModelError
from tasks.media.colour import RgbToPlanes
from tasks.models.backends.openvino_network import OpenVinoNetwork, activation_extremes, activations
from tasks.models.cards import ModelCard
from tasks.models.quantisation import LARGEST_WEIGHT, LEVELS, Quantised, quantise, round_weights, second_moments
from tasks.models.state import load_state
from tests.models.samples import picture_format


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_second_moments_are_those_of_the_patches() -> None:
    value = noise(3, 7, 5) - 0.3
    # Every patch that touches the image, zeros outside.
    patches = F.unfold(F.pad(value, (2, 2, 2, 2))[None], 3)[0].double()
    torch.testing.assert_close(second_moments(value), patches @ patches.T, rtol=1e-5, atol=1e-5)


def test_a_tiny_image_has_second_moments() -> None:
    value = noise(2, 1, 1)
    patches = F.unfold(F.pad(value, (2, 2, 2, 2))[None], 3)[0].double()
    torch.testing.assert_close(second_moments(value), patches @ patches.T)


def test_weights_are_rounded_for_their_inputs() -> None:
    """Channels that always go together can make up for one another, which rounding each to its nearest cannot."""
    common, own = noise(1, 40, 40), noise(8, 40, 40, seed=1)
    value = common + 0.05 * own
    weight = torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(2))
    integers, step = round_weights(weight, second_moments(value))
    assert integers.dtype == torch.int8
    assert integers.abs().max() <= LARGEST_WEIGHT

    def error(rounded: torch.Tensor) -> float:
        return float(F.conv2d(value[None], rounded - weight).square().mean())

    nearest = (weight / step.reshape(-1, 1, 1, 1)).round() * step.reshape(-1, 1, 1, 1)
    assert error(integers * step.reshape(-1, 1, 1, 1)) < 0.2 * error(nearest)


def test_an_input_that_is_always_zero_is_rounded_too() -> None:
    value = noise(4, 20, 20)
    value[1] = 0
    integers, step = round_weights(noise(2, 4, 3, 3) - 0.5, second_moments(value))
    assert torch.isfinite(step).all()
    assert integers.float().abs().max() == LARGEST_WEIGHT


def test_zero_is_a_value_of_each_activation(srvgg_x2: ModelCard) -> None:
    quantised = quantise(srvgg_x2, load_state(srvgg_x2), [noise(1, 3, 40, 50)], threads=1)
    for low, high in quantised.bounds:
        place = -low / ((high - low) / (LEVELS - 1))
        assert low <= 0 < high
        assert place == pytest.approx(round(place), abs=1e-9)


def test_activations_are_those_of_the_network(srvgg_x2: ModelCard) -> None:
    state, image = load_state(srvgg_x2), noise(1, 3, 20, 30)
    (values,) = activations(srvgg_x2, state, [image], threads=1)
    value = image
    for layer, found in enumerate(values):
        value = F.conv2d(value, state[f"body.{2 * layer}.weight"], state[f"body.{2 * layer}.bias"], padding=1)
        value = F.prelu(value, state[f"body.{2 * layer + 1}.weight"])
        torch.testing.assert_close(found, value[0], rtol=1e-4, atol=1e-5)
    assert len(values) == srvgg_x2.num_conv + 1
    (extremes,) = activation_extremes(srvgg_x2, state, [image], threads=1)
    torch.testing.assert_close(extremes[-1], torch.stack((value.amin((0, 2, 3)), value.amax((0, 2, 3)))))


def test_what_is_saved_computes_the_same(srvgg_x2: ModelCard, tmp_path: Path) -> None:
    state, image = load_state(srvgg_x2), noise(1, 3, 40, 50)
    quantised = quantise(srvgg_x2, state, [image], threads=1)
    quantised.save(tmp_path / "bytes.safetensors")
    read = Quantised.load(tmp_path / "bytes.safetensors")
    to_planes = RgbToPlanes(picture_format(100, 80))
    results = [OpenVinoNetwork(srvgg_x2, state, 1, 1, to_planes, each).run(image) for each in (quantised, read)]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert not torch.equal(results[0], OpenVinoNetwork(srvgg_x2, state, 1, 1, to_planes).run(image))


def test_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "bytes.safetensors"
    path.write_bytes(b"not one")
    with pytest.raises(ModelError, match="holds no network in bytes"):
        Quantised.load(path)
    with pytest.raises(ModelError, match="holds no network in bytes"):
        Quantised.load(tmp_path / "missing.safetensors")
