"""SwinIR and Swin2SR: against their official definitions, in tiles and odd sizes, and as files of all kinds."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tasks.errors import ModelError, SettingsError
from tasks.models import networks, swin
from tasks.models.cards import ModelCard, find_model
from tasks.models.engine import Engine
from tasks.models.state import load_state
from tests.models.samples import blank_card, picture, picture_format, yuv_frames

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("one_thread")

SWINIR: dict[str, Any] = {"architecture": "swinir", "embed_dim": 12, "depths": (2, 3), "num_heads": (3, 2)}
SWIN2SR: dict[str, Any] = {**SWINIR, "architecture": "swin2sr"}
SHAPES: dict[str, dict[str, Any]] = {
    "swinir-x2": {**SWINIR, "scale": 2, "window_size": 8, "upsampler": "nearest+conv"},
    "swinir-x4": {**SWINIR, "scale": 4, "window_size": 8, "upsampler": "nearest+conv", "resi_connection": "3conv"},
    "swinir-x8": {**SWINIR, "scale": 8, "window_size": 4, "upsampler": "nearest+conv"},
    "swinir-x3-shuffle": {**SWINIR, "scale": 3, "window_size": 7, "upsampler": "pixelshuffle"},
    "swinir-x4-shuffle": {**SWINIR, "scale": 4, "window_size": 8, "upsampler": "pixelshuffle", "mlp_ratio": 4.0},
    "swinir-x2-direct": {**SWINIR, "scale": 2, "window_size": 8, "upsampler": "pixelshuffledirect"},
    "swin2sr-x4": {**SWIN2SR, "scale": 4, "window_size": 8, "upsampler": "nearest+conv"},
    "swin2sr-x2-shuffle": {**SWIN2SR, "scale": 2, "window_size": 4, "upsampler": "pixelshuffle"},
    "swin2sr-x3-direct": {**SWIN2SR, "scale": 3, "window_size": 5, "upsampler": "pixelshuffledirect", "depths": (1, 1)},
}


def definition(card: ModelCard, windows: int = 3) -> nn.Module:
    """The network as the package defines it, made for pictures of some windows."""
    name = {"swinir": "SwinIR", "swin2sr": "Swin2SR"}[card.architecture]
    made = networks.official(f"spandrel.architectures.{name}.__arch.{name}", name)
    fields = ("embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "upsampler", "resi_connection")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = made(
            img_size=windows * card.window_size, upscale=card.scale, **{field: getattr(card, field) for field in fields}
        )
    return network.eval().requires_grad_(False)


def lively(card: ModelCard, seed: int = 0) -> dict[str, Tensor]:
    """A state dict, tables included, whose attention is far from uniform and whose output spans the range."""
    torch.manual_seed(seed)
    network = definition(card)
    for name, weight in network.named_parameters():
        if weight.ndim > 1 and not name.endswith("logit_scale"):
            weight.normal_(0, 1 / weight[0].numel() ** 0.5)
        if name.endswith("relative_position_bias_table"):
            weight.normal_(0, 1)
    last: Any = network.get_submodule("upsample.0" if card.upsampler == "pixelshuffledirect" else "conv_last")
    size = 4 * card.window_size
    deviation = network(torch.rand(1, 3, size, size)).std()
    last.weight *= 0.2 / deviation
    last.bias *= 0.2 / deviation
    return dict(network.state_dict())


@pytest.fixture(scope="session")
def make_swin(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelCard]:
    """Writes lively weights of one of `SHAPES` to a file and returns the card read off it."""

    def make(shape: str) -> ModelCard:
        path = tmp_path_factory.mktemp("swin") / f"{shape}.pth"
        torch.save({"params_ema": lively(blank_card(**SHAPES[shape]))}, path)
        return find_model(path)

    return make


def expected(card: ModelCard, x: Tensor) -> Tensor:
    network = definition(card)
    network.load_state_dict(load_state(card), strict=False)
    with torch.inference_mode():
        return network(x)


def make_engine(card: ModelCard, size: tuple[int, int] = (64, 48), **options: Any) -> Engine:
    source = picture_format(*size)
    target = source.resized(size[0] * card.scale, size[1] * card.scale)
    return Engine(card, source, target, **{"device": "cpu", **options})


@pytest.mark.parametrize("shape", SHAPES)
def test_networks_compute_what_their_definitions_do(shape: str, make_swin: Callable[[str], ModelCard]) -> None:
    card = make_swin(shape)
    network = networks.build(card)
    network.load_state_dict(load_state(card))
    for windows in ((1, 1), (3, 3), (2, 5), (6, 1)):  # smaller than, as, and unlike what the definition was made for
        height, width = (card.window_size * count for count in windows)
        x = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            result = network(x)
        reference = expected(card, x)
        assert reference.std() > 0.05
        torch.testing.assert_close(result, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", ["swinir-x2", "swinir-x3-shuffle", "swin2sr-x4", "swin2sr-x3-direct"])
@pytest.mark.parametrize("size", [(16, 16), (9, 23), (40, 33), (5, 3), (2, 20), (1, 1)])
def test_pictures_of_any_size(shape: str, size: tuple[int, int], make_swin: Callable[[str], ModelCard]) -> None:
    card = make_swin(shape)
    image = picture(*size)
    missing = [(0, -side % card.window_size) for side in size]
    padded = np.pad(image, (*missing, (0, 0)), mode="reflect")
    reference = expected(card, torch.from_numpy(padded).permute(2, 0, 1)[None] / 255)
    reference = reference[0, :, : size[0] * card.scale, : size[1] * card.scale].clamp(0, 1).permute(1, 2, 0) * 255
    ours = make_engine(card).upscale_rgb(image[None])[0]
    assert ours.shape == reference.shape
    assert np.abs(ours.astype(int) - reference.round().numpy()).max() <= 1


@pytest.mark.parametrize("shape", ["swinir-x2", "swin2sr-x2-shuffle", "swinir-x3-shuffle"])
def test_tiles_that_overlap_by_more_than_the_reach_change_nothing(
    shape: str, make_swin: Callable[[str], ModelCard]
) -> None:
    card = make_swin(shape)
    assert card.receptive_field <= 32
    whole, tiled = _whole_and_tiled(card)
    # Not a bit but for the order of sums in products of other sizes.
    assert np.abs(whole - tiled).max() <= 1
    assert (whole != tiled).mean() < 1e-5


@pytest.mark.parametrize(
    "shape",
    [
        {**SWINIR, "scale": 2, "window_size": 8, "upsampler": "nearest+conv"},
        {**SWINIR, "scale": 2, "window_size": 7, "upsampler": "pixelshuffledirect"},
        {**SWIN2SR, "scale": 2, "window_size": 8, "upsampler": "pixelshuffle"},
    ],
    ids=["swinir", "swinir-w7", "swin2sr"],
)
def test_tiles_of_deep_networks_overlap_widely(shape: dict[str, Any], tmp_path: Path) -> None:
    deep = {**shape, "depths": (6, 6, 6), "num_heads": (3, 3, 3)}
    torch.save(lively(blank_card(**deep)), tmp_path / "deep.pth")
    card = find_model(tmp_path / "deep.pth")
    assert card.receptive_field > 64
    whole, tiled = _whole_and_tiled(card)
    assert np.abs(whole - tiled).max() <= 4
    assert 0 < (whole != tiled).mean() < 0.02


def _whole_and_tiled(card: ModelCard) -> list[np.ndarray]:
    image = picture(120, 101)[None]
    return [make_engine(card, (101, 120), tile=tile).upscale_rgb(image).astype(int) for tile in (None, 40)]


def test_frames_whole_and_in_planned_tiles(make_swin: Callable[[str], ModelCard]) -> None:
    engine = make_engine(make_swin("swinir-x2"), (70, 50))
    frames = yuv_frames(engine.source, 2)
    result = engine.upscale(frames)
    assert result.shape == (2, engine.target.frame_bytes)
    tiled = make_engine(engine.card, (70, 50), tile=40).upscale(frames)
    assert np.abs(result.astype(int) - tiled).max() <= 1
    assert (engine.description.backend, engine.description.batch) == ("torch", 1)
    np.testing.assert_array_equal(make_engine(engine.card, (70, 50)).upscale(frames[1:])[0], result[1])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("shape", ["swinir-x2", "swin2sr-x4"])
def test_half_precision(shape: str, precision: str, make_swin: Callable[[str], ModelCard]) -> None:
    engine, half = (make_engine(make_swin(shape), (40, 24)) for _ in range(2))
    half.precision = precision  # Meant for GPUs; a CPU computes it too.
    image = picture(24, 40)[None]
    difference = np.abs(half.upscale_rgb(image).astype(int) - engine.upscale_rgb(image))
    assert set(half._networks) == {"fp32", precision}, "the result was finite at once"
    assert 0 < difference.mean() < {"fp16": 0.2, "bf16": 1.5}[precision]


def test_openvino_does_not_run_them(make_swin: Callable[[str], ModelCard]) -> None:
    with pytest.raises(SettingsError, match="openvino does not run swinir-x2, a network of architecture swinir"):
        make_engine(make_swin("swinir-x2"), backend="openvino")
    with pytest.raises(SettingsError, match="int8"):
        make_engine(make_swin("swinir-x2"), precision="int8")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_tells_its_network(shape: str, suffix: str, tmp_path: Path) -> None:
    fields = SHAPES[shape]
    state = lively(blank_card(**fields))
    path = tmp_path / f"mine{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    card = find_model(path)
    assert {field: getattr(card, field) for field in fields} == fields
    assert card.parameters == sum(weight.numel() for weight in networks.build(card).parameters())
    loaded = load_state(card)
    assert set(state) - set(loaded) == {name for name in state if networks.is_table(name)}
    assert all(torch.equal(loaded[name], state[name]) for name in loaded)


def _without(*names: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if any(part in f".{name}" for part in names)]:
            del state[name]

    return change


def _with(**weights: tuple[int, ...]) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({name.replace("__", "."): torch.zeros(size) for name, size in weights.items()})


@pytest.mark.parametrize(
    ("shape", "change", "message"),
    [
        ("swinir-x2", _with(conv_first__weight=(12, 1, 3, 3)), "does not start with a convolution of an RGB picture"),
        ("swinir-x2", _without("conv_first.weight"), "does not start with a convolution of an RGB picture"),
        ("swinir-x2", _with(conv_last__weight=(1, 64, 3, 3)), "does not end with an RGB picture"),
        ("swinir-x2", _without("conv_up", "conv_hr", "conv_before"), "repairs pictures and does not enlarge them"),
        ("swinir-x2", _with(conv_up3__weight=(64, 64, 3, 3), conv_up2__weight=(64, 64, 3, 3),
                            conv_up4__weight=(64, 64, 3, 3)), "not defined for scale 16"),
        ("swin2sr-x4", _without("conv_up2"), "swin2sr with nearest.conv is not defined for scale 2"),
        ("swin2sr-x2-shuffle", _with(conv_bicubic__weight=(64, 3, 3, 3)), "pixelshuffle_aux is not supported"),
        ("swin2sr-x2-shuffle", _with(conv_after_body_hf__weight=(64, 3, 3, 3)), "pixelshuffle_hf is not supported"),
        ("swinir-x4-shuffle", _without(".upsample."), "steps of its upsampler cannot be told"),
        ("swinir-x4-shuffle", _with(upsample__2__weight=(9 * 64, 64, 3, 3)), "steps of its upsampler cannot be told"),
        ("swinir-x2-direct", _with(upsample__0__weight=(11, 12, 3, 3)), "does not end with an RGB picture of more"),
        ("swinir-x2", _with(conv_before_upsample__0__weight=(48, 12, 3, 3)), "has 48 channels instead of 64"),
        ("swinir-x2", _without("blocks.0.attn.relative_position_bias_table"), "neither SwinIR's nor Swin2SR's"),
        ("swin2sr-x4", _without("relative_"), "window size cannot be told"),
        ("swinir-x2", lambda state: state.update(
            {"layers.0.residual_group.blocks.0.attn.relative_position_index": torch.zeros(49, 49)}),
         "window size cannot be told"),
        ("swinir-x2", _without("attn_mask"), "whether its windows are shifted"),
        ("swinir-x2", _without("layers.0.residual_group.blocks.1."), None),
        ("swinir-x2", _without("layers.1.residual_group.blocks.1."), "blocks are missing"),
        ("swinir-x2", _without("layers.1.residual_group.blocks.0.attn.relative_position_bias"), "heads of layer 1"),
        ("swinir-x2", _without("blocks.0.mlp.fc1"), "width of its perceptrons"),
        ("swinir-x2", _with(conv_before_upsample__0__weight=()), "shapes that no such network has"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_such_network(
    shape: str, change: Callable[[dict[str, Tensor]], None], message: str | None, tmp_path: Path
) -> None:
    state = lively(blank_card(**SHAPES[shape]))
    path = tmp_path / "odd.pth"
    change(state)
    torch.save(state, path)
    if message is None:  # a network all the same
        assert load_state(find_model(path))
        return
    with pytest.raises(ModelError, match=message) as caught:
        find_model(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("qkv.bias"), "lacks 5 weights"),
        (_with(absolute_pos_embed=(1, 64, 12)), "no use for, absolute_pos_embed first"),
        (_with(conv_hr__weight=(64, 32, 3, 3)), "has shape"),
    ],
)
def test_weights_that_do_not_fit(change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path) -> None:
    state = lively(blank_card(**SHAPES["swinir-x2"]))
    change(state)
    path = tmp_path / "odd.pth"
    torch.save(state, path)
    with pytest.raises(ModelError, match=message):
        find_model(path)


@pytest.mark.parametrize("shape", SHAPES)
def test_arithmetic_is_that_of_the_network(shape: str) -> None:
    card = blank_card(**SHAPES[shape])
    network, size = networks.build(card), 3 * card.window_size
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.rand(1, 3, size, size))
    once = 0
    if card.architecture == "swin2sr":  # position bias, from coordinates
        places = (2 * card.window_size - 1) ** 2
        once = sum(d * 2 * places * 512 * (2 + h) for d, h in zip(card.depths, card.num_heads, strict=True))
    assert counter.get_total_flops() - once == card.flop_per_input_pixel * size * size


@pytest.mark.parametrize(
    "shape",
    [
        {**SWINIR, "scale": 2, "window_size": 4, "upsampler": "nearest+conv"},
        {**SWINIR, "scale": 4, "window_size": 5, "upsampler": "pixelshuffle", "resi_connection": "3conv"},
        {**SWIN2SR, "scale": 2, "window_size": 4, "upsampler": "pixelshuffledirect", "depths": (1, 2)},
    ],
    ids=["swinir", "swinir-3conv", "swin2sr"],
)
def test_no_pixel_reaches_farther_than_the_receptive_field(shape: dict[str, Any]) -> None:
    card = blank_card(**shape)
    network = definition(card)
    network.load_state_dict(lively(card))
    network.double()
    window = card.window_size
    size = 2 * (card.receptive_field // window + 2) * window
    reach = 0
    x = torch.rand(1, 3, size, size, dtype=torch.float64)
    with torch.inference_mode():
        still = network(x)
        for middle in range(size // 2, size // 2 + window):
            changed = x.clone()
            changed[:, :, middle, middle] += 10
            moved = (network(changed) != still).any(1)[0].nonzero() // card.scale
            reach = max(reach, int((moved - middle).abs().max()))
    assert card.receptive_field - 1 <= reach <= card.receptive_field


_PEAK = """
import re, sys, torch
from pathlib import Path
from tasks.models import networks
from tasks.models.backends.torch_network import TorchNetwork
from tasks.media.colour import RgbToPlanes
from tests.models.samples import blank_card, picture_format
torch.set_num_threads(1)
card = blank_card(**eval(sys.argv[1]))
to_planes = RgbToPlanes(picture_format(16, 16))
network = TorchNetwork(card, networks.build(card).state_dict(), torch.device("cpu"), torch.float32, to_planes)
def peak(side):
    with torch.inference_mode():
        network.run(torch.rand(1, 3, side, side))
    # Not getrusage: its peak is inherited from the process that started this one.
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
small = peak(16)
print((peak(256) - small) / 256**2 / 4)
"""


@pytest.mark.parametrize("architecture", ["swinir", "swin2sr"])
def test_memory_is_estimated_from_above(architecture: str) -> None:
    shape = {"architecture": architecture, "scale": 4, "embed_dim": 60, "depths": (2,), "num_heads": (6,)}
    shape |= {"window_size": 8, "upsampler": "pixelshuffledirect"}
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, repr(shape)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    estimate = swin.values_per_pixel(blank_card(**shape))
    assert 0.4 * estimate < float(done.stdout) < 1.1 * estimate


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", ["swinir-x2", "swin2sr-x4"])
def test_gpu_gives_what_the_cpu_gives(shape: str, make_swin: Callable[[str], ModelCard]) -> None:
    card = make_swin(shape)
    cpu = make_engine(card, (70, 50))
    frames = yuv_frames(cpu.source, 5)
    whole = cpu.upscale(frames).astype(int)
    for precision, mean in (("fp32", 0.01), ("fp16", 0.2), ("bf16", 2)):
        gpu = make_engine(card, (70, 50), device="cuda", precision=precision, batch=2)
        assert np.abs(gpu.upscale(frames) - whole).mean() < mean
