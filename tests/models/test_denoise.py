"""Denoise strengths: what a name with one means, and that its weights are those of the official scripts' `-dn`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.errors import ModelError, SettingsError
from tasks.models import networks, weights
from tasks.models.cards import ModelCard, all_cards, find_model
from tasks.models.engine import Engine
from tasks.models.state import load_state
from tests.models.samples import picture, picture_format
from tests.models.servers import FileServer
from tests.models.twins import twins

__all__ = ["twins"]

Twins = tuple[ModelCard, ModelCard]


def test_names() -> None:
    blend = find_model("REALESR-general-x4v3@0.50")
    assert blend.name == "realesr-general-x4v3@0.5"
    assert find_model(blend.name) == blend
    own, partner = blend.files
    assert (own.name, partner.name) == ("realesr-general-x4v3", "realesr-general-wdn-x4v3")
    assert find_model("realesr-general-x4v3@1") == own == own.files[0]
    assert find_model("realesr-general-x4v3@0.0") == partner
    hashes = {weights.content_hash(card) for card in (own, partner, blend, find_model("realesr-general-x4v3@0.25"))}
    assert len(hashes) == 4
    assert all(len(bytes.fromhex(text)) == 32 for text in hashes)


def test_partners_have_the_same_network() -> None:
    pairs = [(card, all_cards()[card.denoise_partner]) for card in all_cards().values() if card.denoise_partner]
    assert pairs
    for card, partner in pairs:
        assert networks.parameter_shapes(card) == networks.parameter_shapes(partner)
        assert partner.denoise_partner is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("compact-x2@0.5", "compact-x2 has no denoise strength"),
        ("compact-x2@1", "compact-x2 has no denoise strength"),
        ("realesr-general-wdn-x4v3@0.5", "Choose realesr-general-x4v3"),
        ("realesr-general-x4v3@1.5", "'1.5' is no denoise strength"),
        ("realesr-general-x4v3@-0.1", "'-0.1' is no denoise strength"),
        ("realesr-general-x4v3@nan", "'nan' is no denoise strength"),
        ("realesr-general-x4v3@", "'' is no denoise strength"),
        ("realesr-general-x4v3@half", "'half' is no denoise strength"),
        ("realesr-general-x4v3@0.5@0.5", "has a denoise strength already"),
    ],
)
def test_strengths_that_cannot_be(name: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        find_model(name)


def test_models_and_files_that_are_not_there() -> None:
    with pytest.raises(ModelError, match="Did you mean realesr-general"):
        find_model("realesr-general-x4@0.5")
    with pytest.raises(ModelError, match=r"/no@where/0\.5 is not a weight file"):
        find_model("/no@where/0.5")


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.75])
def test_weights_are_those_of_the_official_implementation(twins: Twins, strength: float) -> None:
    paths = [str(weights.locate(card)) for card in twins]
    upscaler = networks.official("realesrgan.utils", "RealESRGANer")
    shares = [strength, 1 - strength]
    network = networks.build(twins[0])
    reference = upscaler(2, paths, dni_weight=shares, model=network, pre_pad=0, device=torch.device("cpu"))
    blend = find_model(f"strong@{strength}")
    ours, theirs = load_state(blend), reference.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not torch.equal(ours["body.0.weight"], load_state(twins[0])["body.0.weight"])

    source = picture_format(32, 24)
    image = picture(24, 32)
    result = Engine(blend, source, source.resized(64, 48), device="cpu").upscale_rgb(image[None])[0]
    official = reference.enhance(image[:, :, ::-1])[0][:, :, ::-1]
    assert np.abs(result.astype(int) - official).max() <= 1


def test_the_ends_are_the_models_themselves(twins: Twins) -> None:
    for strength, card in ((1, twins[0]), (0, twins[1])):
        ours, theirs = load_state(find_model(f"strong@{strength}")), load_state(card)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_both_files_are_needed_and_checked(twins: Twins) -> None:
    blend = find_model("strong@0.5")
    own, partner = (weights.locate(card) for card in twins)
    assert weights.locate(blend) == own
    good = partner.read_bytes()
    partner.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ModelError, match="weak needs"):
        weights.locate(blend)
    partner.unlink()
    assert not weights.is_present(blend)
    for act in (weights.locate, load_state):
        with pytest.raises(ModelError, match="superres models fetch weak"):
            act(blend)


def test_both_files_are_fetched(
    twins: Twins, folder: Path, tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUPERRES_MODEL_MIRROR", str(tmp_path / "weights"))
    blend = find_model("strong@0.5")
    assert not weights.is_present(blend)
    assert weights.fetch(blend) == folder / "strong.pth"
    assert weights.is_present(blend)
    assert {path.name for path in folder.glob("*.pth")} == {"strong.pth", "weak.pth"}
