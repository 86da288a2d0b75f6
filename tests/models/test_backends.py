"""Each backend against the official networks."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tasks.errors import SettingsError
from tasks.media.colour import RgbToPlanes
from tasks.models import networks
from tasks.models.backends import Backend, choose_backend, make_backend, winograd_program
from tasks.models.cards import ModelCard, find_model
from tasks.models.state import load_state
from tests.models.conftest import MakeModel
from tests.models.samples import CPU_BACKENDS, picture_format

CPU = torch.device("cpu")
COMPACT = find_model("compact-x2")
SHAPES: dict[str, dict[str, Any]] = {
    "srvgg-x1": {"architecture": "srvgg", "scale": 1, "num_feat": 8, "num_conv": 1},
    "srvgg-x2": {"architecture": "srvgg", "scale": 2, "num_feat": 16, "num_conv": 4},
    "srvgg-x3": {"architecture": "srvgg", "scale": 3, "num_feat": 24, "num_conv": 0},
    "srvgg-x4": {"architecture": "srvgg", "scale": 4, "num_feat": 64, "num_conv": 2},
    "rrdb-x1": {"architecture": "rrdb", "scale": 1, "num_feat": 8, "num_block": 1, "num_grow": 4},
    "rrdb-x2": {"architecture": "rrdb", "scale": 2, "num_feat": 16, "num_block": 2, "num_grow": 8},
    "rrdb-x4": {"architecture": "rrdb", "scale": 4, "num_feat": 16, "num_block": 1, "num_grow": 32},
}


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (17, 40)])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_backend_computes_the_official_network(
    shape: str, backend: str, size: tuple[int, int], make_model: MakeModel
) -> None:
    card = make_model(**SHAPES[shape], gain=1.5)
    official = networks.build(card)
    official.load_state_dict(load_state(card))
    x = torch.rand(2, 3, *(card.size_multiple * side for side in size), generator=torch.Generator().manual_seed(1))
    network = backend_of(backend, card, load_state(card), size)
    with torch.inference_mode():
        result = network.run(x)
        if card.architecture == "srvgg":
            result = F.pixel_shuffle(result, card.scale)
        expected = official(x)
    assert network.name == backend
    assert result.shape == expected.shape
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def backend_of(name: str, card: ModelCard, state: dict[str, torch.Tensor], size: tuple[int, int]) -> Backend:
    to_planes = RgbToPlanes(picture_format(card.scale * size[1], card.scale * size[0]))
    return make_backend(name, card, state, CPU, torch.float32, threads=2, streams=2, to_planes=to_planes)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (17, 40)])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shape", ["srvgg-x2", "srvgg-x4"])
def test_a_backend_goes_on_to_code_values(
    shape: str, backend: str, size: tuple[int, int], make_model: MakeModel
) -> None:
    card = make_model(**SHAPES[shape], gain=1.5)
    network = backend_of(backend, card, load_state(card), size)
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    picture = picture_format(card.scale * size[1], card.scale * size[0])
    to_planes = RgbToPlanes(picture)
    with torch.inference_mode():
        luma, chroma, finite = network.codes(x, to_planes.edge_gains(card.scale, *size))
        planes = to_planes.put_together(luma, chroma, card.scale)
        expected = to_planes(F.pixel_shuffle(network.run(x), card.scale).clamp(0, 1))
    assert finite.tolist() == [True, True]
    difference = (planes.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_values_that_are_not_finite_are_noticed(backend: str, bad: float, make_model: MakeModel) -> None:
    card = make_model(**SHAPES["srvgg-x2"])
    state = load_state(card)
    state["body.10.bias"][3] = bad
    network = backend_of(backend, card, state, (8, 9))
    gains = RgbToPlanes(picture_format(18, 16)).edge_gains(2, 8, 9)
    with torch.inference_mode():
        assert network.codes(torch.rand(1, 3, 8, 9), gains)[2].tolist() == [False]


def test_the_choice_by_device_network_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("auto", CPU, COMPACT) == CPU_BACKENDS[-1]
    assert choose_backend("auto", CPU, COMPACT, "int8") == "openvino"
    assert choose_backend("auto", CPU, COMPACT, "bf16") == "openvino"
    assert choose_backend("auto", CPU, find_model("RealESRGAN_x4plus")) == CPU_BACKENDS[-1]
    assert choose_backend("auto", torch.device("cuda"), COMPACT) == "torch"
    monkeypatch.setattr(winograd_program, "vector_floats", lambda: 0)
    assert choose_backend("auto", CPU, COMPACT) == "openvino"
    with pytest.raises(SettingsError, match="needs the Python package llvmlite and a processor with AVX2"):
        choose_backend("winograd", CPU, COMPACT)
    monkeypatch.undo()
    assert choose_backend("torch", CPU, COMPACT) == "torch"


@pytest.mark.parametrize("name", ["swinir-m-real-x4", "swin2sr-real-x4"])
def test_torch_for_transformers(name: str) -> None:
    card = find_model(name)
    assert choose_backend("auto", CPU, card) == "torch"
    with pytest.raises(SettingsError, match=f"openvino does not run {name}, a network of architecture swin"):
        choose_backend("openvino", CPU, card)


@pytest.mark.parametrize(
    ("name", "device", "model", "precision", "message"),
    [
        ("onnx", "cpu", "compact-x2", "fp32", 'There is no backend called "onnx"'),
        ("openvino", "cuda", "compact-x2", "fp32", "the backend openvino runs on a CPU only"),
        ("winograd", "cuda", "compact-x2", "fp32", "the backend winograd runs on a CPU only"),
        ("winograd", "cpu", "compact-x2", "bf16", "the backend winograd computes in fp32, not in bf16"),
        ("winograd", "cpu", "swinir-m-real-x4", "fp32", "the backend winograd does not run swinir-m-real-x4"),
    ],
)
def test_a_backend_that_cannot_be(name: str, device: str, model: str, precision: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        choose_backend(name, torch.device(device), find_model(model), precision)


def test_without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert choose_backend("auto", CPU, COMPACT) == "torch"
    with pytest.raises(SettingsError, match="openvino is not installed"):
        choose_backend("openvino", CPU, COMPACT)


def test_nothing_reports_to_the_makers_of_openvino() -> None:
    code = "import sys, tasks.models.backends.openvino_network; print('openvino_telemetry' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
