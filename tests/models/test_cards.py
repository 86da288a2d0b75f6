"""Model cards: what they say of the networks, and how a model is found."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tasks.errors import ModelError
from tasks.models import cards, networks
from tasks.models.cards import BUNDLED_FOLDER, CARD_FOLDER, ModelCard, all_cards, find_model, refresh_bundled
from tests.models.samples import blank_card

ROOT = Path(__file__).parents[2]

#: Weights, FLOP per input pixel and receptive radius, counted independently from the layers as published.
FACTS = {
    "RealESRGAN_x4plus": (16_697_987, 35.85e6, 349),
    "RealESRGAN_x2plus": (16_703_171, 8.97e6, 698),
    "RealESRGAN_x4plus_anime_6B": (4_467_779, 11.41e6, 94),
    "realesr-animevideov3": (621_424, 1.238e6, 18),
    "realesr-general-x4v3": (1_213_296, 2.418e6, 34),
    "realesr-general-wdn-x4v3": (1_213_296, 2.418e6, 34),
    "swinir-m-real-x4": (11_715_559, 27.33e6, 153),
    "swinir-m-real-x2": (11_678_631, 25.22e6, 153),
    "swin2sr-real-x4": (12_054_643, 27.78e6, 153),
    "compact-x2": (50_796, 0.101e6, 7),
    "compact-x4": (89_040, 0.177e6, 10),
    "standard-x2": (452_684, 0.902e6, 14),
    "standard-x4": (473_456, 0.943e6, 14),
}


def test_every_model_has_a_card() -> None:
    assert set(all_cards()) == set(FACTS)


@pytest.mark.parametrize("name", FACTS)
def test_card_describes_its_network(name: str) -> None:
    card = find_model(name)
    parameters, flop, receptive_field = FACTS[name]
    assert card.parameters == parameters
    assert sum(math.prod(shape) for shape in networks.parameter_shapes(card).values()) == parameters
    assert card.flop_per_input_pixel == pytest.approx(flop, rel=2e-3)
    assert card.receptive_field == receptive_field
    assert (card.url is None) == card.bundled
    assert card.licence
    assert card.best_for


@pytest.mark.parametrize(
    "shape",
    [
        {"architecture": "srvgg", "scale": 2, "num_feat": 4, "num_conv": 3},
        {"architecture": "rrdb", "scale": 4, "num_feat": 4, "num_block": 1, "num_grow": 2},
        {"architecture": "rrdb", "scale": 2, "num_feat": 4, "num_block": 1, "num_grow": 2},
    ],
)
def test_receptive_field_and_flop_are_those_of_the_network(shape: dict[str, object]) -> None:
    card = blank_card(**shape)
    torch.manual_seed(0)
    # Random positive weights: no path through the network can cancel out, and none is cut by an activation.
    network = networks.build(card).double()
    network.load_state_dict({name: weight.abs() for name, weight in network.state_dict().items()})
    radius, multiple = card.receptive_field, card.size_multiple
    size = 2 * (radius + 4) // multiple * multiple
    middle = size // 2
    x = torch.full((1, 3, size, size), 0.5, dtype=torch.float64)
    with torch.inference_mode():
        still = network(x)
        # So large that what arrives at the border is not lost in rounding, which differs between processors.
        x[:, :, middle, middle] += 1e9
        moved = (network(x) != still).any(1)[0].nonzero() // card.scale
    reach = int((moved - middle).abs().max())
    assert radius - card.size_multiple - 1 <= reach <= radius

    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(x)
    assert counter.get_total_flops() == card.flop_per_input_pixel * size * size


def test_the_documentation_has_every_card() -> None:
    rows = {}
    for line in (ROOT / "docs" / "models.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 6:
            rows[cells[0].strip("`")] = cells[1:]
    assert set(rows) == set(all_cards())
    for name, (scale, choose_for, work, where, licence) in rows.items():
        card = find_model(name)
        assert (int(scale), choose_for, licence) == (card.scale, card.best_for, card.licence)
        assert float(work) == round(card.flop_per_input_pixel / 1e6, 2)
        size = f"{card.bytes / 1e6:.1f} MB"
        assert where == (f"[{size}]({card.url})" if card.url else f"{size}, in this repository")


def test_name_in_any_case_and_near_misses() -> None:
    assert find_model("REALESR-ANIMEVIDEOV3").name == "realesr-animevideov3"
    with pytest.raises(ModelError, match="Did you mean realesr-animevideov3") as caught:
        find_model("realesr-animevideo")
    assert "compact-x2" in str(caught.value)
    with pytest.raises(ModelError, match="Known models"):
        find_model("waifu")


def test_bundled_cards_describe_the_bundled_files() -> None:
    for card in all_cards().values():
        if card.bundled:
            data = (BUNDLED_FOLDER / card.file_name).read_bytes()
            described = (card.bytes, card.sha256)
            remedy = "run python -m tasks.models.cards refresh-bundled"
            assert described == (len(data), hashlib.sha256(data).hexdigest()), remedy


def test_refresh_writes_size_and_hash(tmp_path: Path) -> None:
    card_file = tmp_path / "compact-x2.toml"
    card_file.write_text((CARD_FOLDER / "compact-x2.toml").read_text())
    (tmp_path / "compact-x2.safetensors").write_bytes(b"new weights")
    assert refresh_bundled(tmp_path, tmp_path) == ["compact-x2"]
    assert refresh_bundled(tmp_path, tmp_path) == []
    card = ModelCard(**cards.tomllib.loads(card_file.read_text()))
    assert (card.bytes, card.sha256) == (11, hashlib.sha256(b"new weights").hexdigest())
    (tmp_path / "compact-x2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks compact-x2\.safetensors"):
        refresh_bundled(tmp_path, tmp_path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "shape",
    [
        {"architecture": "srvgg", "scale": 3, "num_feat": 6, "num_conv": 2},
        {"architecture": "rrdb", "scale": 4, "num_feat": 8, "num_block": 2, "num_grow": 4},
        {"architecture": "rrdb", "scale": 2, "num_feat": 8, "num_block": 1, "num_grow": 4},
        {"architecture": "rrdb", "scale": 1, "num_feat": 8, "num_block": 1, "num_grow": 4},
    ],
)
def test_card_of_a_weight_file(tmp_path: Path, suffix: str, shape: dict[str, object]) -> None:
    path = tmp_path / f"mine{suffix}"
    state = networks.build(blank_card(**shape)).state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save({"params_ema": state}, path)
    card = find_model(str(path))
    assert {key: getattr(card, key) for key in shape} == shape
    assert card.name == "mine"
    assert card.path == str(path)
    assert card.parameters == sum(tensor.numel() for tensor in state.values())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"model.0.weight": torch.zeros(3, 3)}, "neither an SRVGGNetCompact .* nor an RRDBNet, SwinIR or Swin2SR"),
        ({"body.0.weight": torch.zeros(4, 1, 3, 3), "body.1.weight": torch.zeros(12, 4, 3, 3)}, "neither"),
        ({"body.0.weight": torch.zeros(4, 3, 3, 3), "body.2.weight": torch.zeros(12, 4, 3, 3)}, "neither"),  # no PReLU
        (
            {"conv_first.weight": torch.zeros(8, 5, 3, 3), "body.0.rdb1.conv1.weight": torch.zeros(4, 8, 3, 3)},
            "neither",
        ),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path: Path, state: dict[str, torch.Tensor], message: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file(state, path)
    with pytest.raises(ModelError, match=message):
        find_model(path)


def test_paths_that_are_no_weight_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        find_model(tmp_path / "nowhere.pth")
    with pytest.raises(ModelError, match="not a weight file"):
        find_model(str(tmp_path / "film.mkv"))


def test_listing_cards_does_not_load_torch() -> None:
    code = "import sys; from tasks.models.cards import all_cards; assert all_cards(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CARD_FOLDER.parents[2])
