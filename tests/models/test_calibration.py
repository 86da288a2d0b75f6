"""Networks in bytes: close to fp32 where that is possible, and refused where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tasks.errors import SettingsError
from tasks.media.changes import Box, cut_out
from tasks.media.decode import decode_frames
from tasks.media.probe import probe
from tasks.media.timestamps import scan_packets
from tasks.models.calibration import LEAST_PSNR, Verdict, calibrate, psnr
from tasks.models.cards import ModelCard, find_model
from tasks.models.engine import Engine
from tasks.models.quantisation import Quantised
from tasks.models.state import load_state
from tasks.models.weights import is_present
from tests.models.samples import picture_format, unfit_for_bytes, yuv_frames

#: Real clips and weights, where they lie beside the repository.
SHARED = Path(__file__).parents[3] / "shared"

pytestmark = pytest.mark.usefixtures("one_thread")


def formats(card: ModelCard, width: int = 96, height: int = 64) -> tuple[Any, Any]:
    source = picture_format(width, height)
    return source, source.resized(width * card.scale, height * card.scale)


@pytest.mark.parametrize("name", ["compact-x2", "compact-x4"])
def test_bundled_models_may_be_computed_in_bytes(name: str) -> None:
    card = find_model(name)
    source, target = formats(card)
    frames = yuv_frames(source, 9)
    quantised, kept = calibrate(card, source, target, frames)
    assert Verdict(kept, "").is_good
    exact = Engine(card, source, target, device="cpu").upscale(frames)
    quick = Engine(card, source, target, device="cpu", precision="int8", quantised=quantised)
    result = quick.upscale(frames)
    assert quick.description.precision == "int8"
    assert min(psnr(exact[i], result[i]) for i in (1, 4, 7)) == kept < 100


@pytest.mark.parametrize("tile", [32, 50])
def test_tiles_change_no_bit(tile: int) -> None:
    card = find_model("compact-x2")
    source, target = formats(card, 150, 130)
    frames = yuv_frames(source, 3)
    quantised, _ = calibrate(card, source, target, frames)
    whole, tiled = (
        Engine(card, source, target, device="cpu", precision="int8", quantised=quantised, tile=size)
        for size in (None, tile)
    )
    np.testing.assert_array_equal(tiled.upscale(frames), whole.upscale(frames))


def unfit(folder: Path) -> ModelCard:
    weights = folder / "unfit.pth"
    torch.save({"params": unfit_for_bytes(load_state(find_model("compact-x2")))}, weights)
    return find_model(weights)


@pytest.mark.parametrize("clip", ["bbb-10s.mp4", "nasa_13013.mp4"])
def test_frames_of_real_films(clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (SHARED / "media" / clip).exists():
        pytest.skip(f"{clip} is not beside the repository")
    facts = probe(SHARED / "media" / clip)
    table = scan_packets(facts).table
    indexes = [(2 * i + 1) * len(table) // 18 for i in range(9)]
    whole = [next(iter(decode_frames(facts, table, index, index))) for index in indexes]
    box = Box(100, 160, 228, 352)
    frames, source = np.stack([cut_out(frame, facts.picture, box) for frame in whole]), facts.picture.resized(*box.size)
    monkeypatch.setenv("SUPERRES_MODEL_DIR", str(SHARED / "weights"))
    cards = {True: [find_model("compact-x2"), find_model("realesr-animevideov3")], False: [unfit(tmp_path)]}
    for is_good, models in cards.items():
        for card in filter(is_present, models):
            target = source.resized(source.width * card.scale, source.height * card.scale)
            _, kept = calibrate(card, source, target, frames)
            assert Verdict(kept, "").is_good == is_good, f"{card.name} keeps {kept:.1f} dB"


def test_a_network_that_bytes_cannot_hold(tmp_path: Path) -> None:
    card = unfit(tmp_path)
    source, target = formats(card)
    _, kept = calibrate(card, source, target, yuv_frames(source, 3))
    assert kept < LEAST_PSNR
    assert not Verdict(kept, "").is_good


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("srvgg_x2", {}, "needs the network in bytes"),
        ("srvgg_x2", {"quantised": Quantised({}, ((0.0, 1.0),))}, "needs the network in bytes"),
        ("srvgg_x2", {"backend": "torch"}, "backend torch does not compute in int8"),
        ("rrdb_x2", {}, "cannot be computed in int8"),
    ],
)
def test_int8_that_cannot_be(model: str, options: dict[str, Any], message: str, request: pytest.FixtureRequest) -> None:
    card = request.getfixturevalue(model)
    with pytest.raises(SettingsError, match=message):
        Engine(card, *formats(card), device="cpu", precision="int8", **options)


def test_one_frame_is_too_few(srvgg_x2: ModelCard) -> None:
    source, target = formats(srvgg_x2)
    with pytest.raises(ValueError, match="two frames"):
        calibrate(srvgg_x2, source, target, yuv_frames(source, 1))
