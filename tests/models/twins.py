"""Two models that differ in how much noise they remove, as `realesr-general-x4v3` and its partner do."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tasks.models import cards, networks
from tasks.models.cards import ModelCard, all_cards, find_model
from tests.models.samples import blank_card

SHAPE = {"architecture": "srvgg", "scale": 2, "num_feat": 4, "num_conv": 1}


@pytest.fixture
def twins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModelCard, ModelCard]]:
    """`strong` and its weaker partner `weak`, known beside all other models, with weights in `SUPERRES_MODEL_DIR`."""
    folder, weights = tmp_path / "card_files", tmp_path / "weights"
    shutil.copytree(cards.CARD_FOLDER, folder)
    weights.mkdir()
    for seed, (name, more) in enumerate({"strong": 'denoise_partner = "weak"', "weak": ""}.items()):
        torch.manual_seed(seed)
        file = weights / f"{name}.pth"
        torch.save({"params": networks.build(blank_card(**SHAPE)).state_dict()}, file)
        fields = {**SHAPE, "name": name, "url": f"http://127.0.0.1:9/{name}.pth", "bytes": file.stat().st_size}
        fields |= {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        fields |= dict.fromkeys(("licence", "source", "best_for", "description"), "test")
        lines = [f"{field} = {json.dumps(value)}" for field, value in fields.items()]
        (folder / f"{name}.toml").write_text("\n".join([*lines, more]))
    monkeypatch.setattr(cards, "CARD_FOLDER", folder)
    monkeypatch.setenv("SUPERRES_MODEL_DIR", str(weights))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    all_cards.cache_clear()
    yield find_model("strong"), find_model("weak")
    all_cards.cache_clear()
