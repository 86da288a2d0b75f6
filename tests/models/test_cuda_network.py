"""Networks run by the project's CUDA kernel, on a CPU that plays its instructions, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tasks.errors import SettingsError
from tasks.media.colour import RgbToPlanes
from tasks.media.pixels import Colour, PictureFormat
from tasks.models.backends import choose_backend, cuda_network, cuda_program
from tasks.models.backends.cuda_network import CudaNetwork, codes_filter
from tasks.models.backends.torch_network import TorchNetwork
from tasks.models.cards import ModelCard, find_model
from tasks.models.state import load_state
from tests.models.conftest import MakeModel
from tests.models.cuda_on_cpu import COMPILER, kernel_on_cpu
from tests.models.samples import CPU_BACKENDS, blank_card, picture, picture_format

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HOPPER, AMPERE = (9, 0), (8, 6)

#: Neither side is a multiple of a tile's.
SIZE = (19, 21)


@pytest.fixture(params=["warps", "groups of warps", "GPU"])
def device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> torch.device:
    """Where kernels run."""
    if request.param == "GPU":
        if not cuda_network.is_available(GPU):
            pytest.skip("needs a CUDA device")
        return GPU
    if COMPILER is None:
        pytest.skip("needs g++")
    folder = Path(tmp_path_factory.getbasetemp())
    monkeypatch.setattr(cuda_network, "_kernel", lambda shape, _: kernel_on_cpu(shape, folder))
    capability = HOPPER if request.param == "groups of warps" else AMPERE
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return CPU


@pytest.fixture(scope="session")
def rrdb(make_model: MakeModel) -> Iterator[Any]:
    yield partial(make_model, architecture="rrdb", num_feat=16, num_block=1, num_grow=16, gain=1.5)


def an_image(height: int = SIZE[0], width: int = SIZE[1], count: int = 1) -> torch.Tensor:
    """Half `[count, 3, height, width]` in 0..1."""
    images = torch.stack([torch.from_numpy(picture(height, width, seed)) for seed in range(count)])
    return (images.permute(0, 3, 1, 2).float() / 255).half()


def both(card: ModelCard, device: torch.device, target: PictureFormat) -> tuple[CudaNetwork, TorchNetwork]:
    state = load_state(card)
    reference = TorchNetwork(card, state, CPU, torch.float32, RgbToPlanes(target))
    return CudaNetwork(card, state, device, RgbToPlanes(target, device)), reference


@pytest.mark.parametrize("scale", [2, 4])
def test_srvgg_gives_what_torch_gives(scale: int, device: torch.device, make_model: MakeModel) -> None:
    card = make_model(architecture="srvgg", scale=scale, num_feat=32, num_conv=2)
    network, reference = both(card, device, picture_format(scale * SIZE[1], scale * SIZE[0]))
    x = an_image(count=2)
    with torch.inference_mode():
        result, expected = network.run(x.to(device)).cpu().float(), reference.run(x.float())
    assert result.shape == expected.shape
    assert (result - expected).abs().max() < 2e-3


@pytest.mark.parametrize("scale", [2, 4])
def test_rrdb_gives_what_torch_gives(scale: int, device: torch.device, rrdb: Any) -> None:
    network, reference = both(rrdb(scale=scale), device, picture_format(32, 32))
    x = an_image(10, 6)
    with torch.inference_mode():
        result, expected = network.run(x.to(device)).cpu().float(), reference.run(x.float())
    assert result.shape == expected.shape
    assert (result - expected).abs().max() < 4e-3


@pytest.mark.parametrize(
    ("scale", "pix_fmt", "location"),
    [(4, "yuv420p", "left"), (2, "yuv420p10le", "topleft"), (2, "yuv444p", "left"), (4, "yuv422p", "left")],
)
def test_code_values_are_those_of_torch(
    scale: int, pix_fmt: str, location: str, device: torch.device, make_model: MakeModel
) -> None:
    card = make_model(architecture="srvgg", scale=scale, num_feat=16, num_conv=1)
    colour = Colour("bt709", full_range=False, chroma_location=location)
    target = PictureFormat(scale * SIZE[1], scale * SIZE[0], pix_fmt, colour)
    network, reference = both(card, device, target)
    x = an_image()
    with torch.inference_mode():
        gains = RgbToPlanes(target).edge_gains(scale, *SIZE)
        luma, chroma, finite = network.codes(x.to(device), (gains[0].to(device), gains[1].to(device)))
        # From the same phases, in halves, so that nothing but the codes can differ.
        phases = network.run(x.to(device)).cpu().float().clamp(0, 1).half().float()
        expected = reference._to_planes.codes(phases, scale, gains)
    assert finite.tolist() == [True]
    for got, wanted in zip((luma, chroma), expected, strict=True):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        difference = (got.cpu().int() - wanted.int()).abs()
        assert difference.max() <= 1  # On the edge between two of them.
        assert (difference > 0).float().mean() < 1e-3


def test_what_is_not_finite_is_told_for_each_image(device: torch.device, make_model: MakeModel) -> None:
    card = make_model(architecture="srvgg", scale=2, num_feat=16, num_conv=1)
    network, reference = both(card, device, picture_format(2 * SIZE[1], 2 * SIZE[0]))
    x = an_image(count=3)
    x[1, 0, 3, 4] = torch.inf
    gains = reference._to_planes.edge_gains(2, *SIZE)
    with torch.inference_mode():
        *_, finite = network.codes(x.to(device), (gains[0].to(device), gains[1].to(device)))
    assert finite.tolist() == [True, False, True]


def test_a_part_of_an_image_gives_the_same_bits(device: torch.device, make_model: MakeModel) -> None:
    card = make_model(architecture="srvgg", scale=2, num_feat=16, num_conv=1)
    network, _ = both(card, device, picture_format(2 * SIZE[1], 2 * SIZE[0]))
    x = an_image().to(device)
    with torch.inference_mode():
        whole, part = network.run(x), network.run(x[:, :, 2:, 1:18])
    field = card.receptive_field
    assert torch.equal(whole[:, :, 2 + field :, 1 + field : 18 - field], part[:, :, field:, field:-field])


def test_the_filter_of_code_values_is_that_of_the_steps() -> None:
    to_planes = RgbToPlanes(picture_format(64, 48))
    phases = torch.rand(1, 48, 12, 16)
    gains = to_planes.edge_gains(4, 12, 16)
    filters, bias = codes_filter(to_planes.kernels(4))
    sums = F.conv2d(phases, filters, padding=filters.shape[2] // 2)
    sums[:, 16:] *= gains[0] * gains[1]
    codes = (sums + bias.view(1, -1, 1, 1)).clamp(0, 255).to(torch.uint8)
    for got, wanted in zip(codes.split([16, 8], 1), to_planes.codes(phases, 4, gains), strict=True):
        assert (got.int() - wanted.int()).abs().max() <= 1
        assert (got != wanted).float().mean() < 1e-3


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ({"architecture": "srvgg", "scale": 4, "num_feat": 64, "num_conv": 16}, True),
        ({"architecture": "srvgg", "scale": 3, "num_feat": 64, "num_conv": 16}, False),
        ({"architecture": "srvgg", "scale": 2, "num_feat": 24, "num_conv": 8}, False),
        ({"architecture": "srvgg", "scale": 2, "num_feat": 128, "num_conv": 8}, False),
        ({"architecture": "rrdb", "scale": 4, "num_feat": 64, "num_block": 23, "num_grow": 32}, True),
        ({"architecture": "rrdb", "scale": 1, "num_feat": 64, "num_block": 23, "num_grow": 24}, False),
        ({"architecture": "swinir", "scale": 4, "window_size": 8}, False),
    ],
)
def test_models_it_runs(shape: dict[str, Any], fits: bool) -> None:
    assert cuda_network.runs(blank_card(**shape)) == fits


@pytest.mark.parametrize("name", ["compact-x2", "compact-x4", "realesr-animevideov3", "RealESRGAN_x2plus"])
def test_it_runs_the_cards(name: str) -> None:
    assert cuda_network.runs(find_model(name))


class TestChoice:
    @pytest.fixture(autouse=True)
    def with_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda_network, "is_available", lambda device: device.type == "cuda")

    def test_it_is_the_choice_for_halves_on_a_gpu(self) -> None:
        card = find_model("compact-x2")
        assert choose_backend("auto", GPU, card, "fp16") == "cuda"
        assert choose_backend("auto", GPU, card, "bf16") == "torch"
        assert choose_backend("auto", GPU, find_model("swinir-m-real-x4"), "fp16") == "torch"
        assert choose_backend("auto", CPU, card) == CPU_BACKENDS[-1]

    @pytest.mark.parametrize(
        ("device", "model", "precision", "problem"),
        [
            (CPU, "compact-x2", "fp32", "compute capability 8.0"),
            (GPU, "swinir-m-real-x4", "fp16", "does not run swinir-m-real-x4"),
            (GPU, "compact-x2", "bf16", "not in bf16"),
        ],
    )
    def test_what_it_cannot_do_is_said(self, device: torch.device, model: str, precision: str, problem: str) -> None:
        with pytest.raises(SettingsError, match=problem):
            choose_backend("cuda", device, find_model(model), precision)


class TestCache:
    """Of compiled kernels."""

    @pytest.fixture
    def compilations(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
        done: list[str] = []
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(cuda_program, "_version", lambda: (13, 0))

        def compile_(source: str, target: str) -> bytes:
            done.append(source)
            return f"{source} for {target}".encode()

        monkeypatch.setattr(cuda_program, "_compile", compile_)
        return done

    def test_a_program_is_compiled_once(self, compilations: list[str], tmp_path: Path) -> None:
        programs = [cuda_program.compiled("a", "sm_90a") for _ in range(3)]
        assert (programs, compilations) == ([b"a for sm_90a"] * 3, ["a"])
        assert [path.suffix for path in (tmp_path / "media-super-resolution" / "kernels").iterdir()] == [".cubin"]

    def test_whatever_it_depends_on_makes_another_one(
        self, compilations: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cuda_program.compiled("a", "sm_90a")
        cuda_program.compiled("b", "sm_90a")
        cuda_program.compiled("a", "sm_80")
        monkeypatch.setattr(cuda_program, "_version", lambda: (13, 1))
        cuda_program.compiled("a", "sm_90a")
        assert compilations == ["a", "b", "a", "a"]

    def test_a_cache_that_cannot_be_written_is_done_without(
        self, compilations: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert cuda_program.compiled("a", "sm_90a") == b"a for sm_90a"
        assert compilations == ["a"]
