"""The engine against the official implementation, against itself in tiles, and in trouble."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.errors import FrameError, ModelError, SettingsError
from tasks.media.changes import planes
from tasks.media.colour import PlanesToRgb, RgbToPlanes
from tasks.media.pixels import PictureFormat
from tasks.models import engine as engine_module
from tasks.models import hardware, networks, weights
from tasks.models.backends import torch_network
from tasks.models.backends.openvino_network import OpenVinoNetwork
from tasks.models.backends.torch_network import TorchNetwork
from tasks.models.backends.winograd_network import WinogradNetwork
from tasks.models.calibration import psnr
from tasks.models.cards import ModelCard, find_model
from tasks.models.engine import Engine, Work
from tasks.models.hardware import matmul_peak
from tasks.models.state import load_state
from tests.models.conftest import MakeModel
from tests.models.samples import CPU_BACKENDS, picture, picture_format, yuv_frames

SHARED_WEIGHTS = Path(__file__).parents[3] / "shared" / "weights"

pytestmark = pytest.mark.usefixtures("one_thread")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def make_engine(
    card: ModelCard, size: tuple[int, int] = (64, 48), target: tuple[int, int] | None = None, **options: Any
) -> Engine:
    source = picture_format(*size)
    target = target or (size[0] * card.scale, size[1] * card.scale)
    return Engine(card, source, source.resized(*target), **{"device": "cpu", **options})


def official(card: ModelCard, folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """`RealESRGANer.enhance` in fp32, whole frames, RGB in and out."""
    upscaler = networks.official("realesrgan.utils", "RealESRGANer")
    path = folder / "params.pth"
    torch.save({"params": load_state(card)}, path)
    reference = upscaler(card.scale, str(path), model=networks.build(card), pre_pad=0, device=torch.device("cpu"))
    return lambda rgb: reference.enhance(rgb[:, :, ::-1])[0][:, :, ::-1]


def official_card(name: str, monkeypatch: pytest.MonkeyPatch) -> ModelCard:
    card = find_model(name)
    if not weights.is_present(card):
        if not (SHARED_WEIGHTS / card.file_name).exists():
            pytest.skip(f"{card.file_name} is neither in SUPERRES_MODEL_DIR nor in the cache")
        monkeypatch.setenv("SUPERRES_MODEL_DIR", str(SHARED_WEIGHTS))
    return card


@pytest.mark.parametrize("name", ["compact-x2", "compact-x4", "realesr-animevideov3"])
def test_equals_the_official_implementation(
    name: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = official_card(name, monkeypatch)
    image = picture(90, 110)
    ours = make_engine(card, backend=backend).upscale_rgb(image[None])[0]
    theirs = official(card, tmp_path)(image)
    assert ours.shape == theirs.shape == (90 * card.scale, 110 * card.scale, 3)
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("size", [(16, 16), (17, 16), (16, 17), (33, 21), (3, 5)])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_odd_sizes_of_networks_that_need_even_ones(
    rrdb_x2: ModelCard, backend: str, size: tuple[int, int], tmp_path: Path
) -> None:
    image = picture(*size)
    ours = make_engine(rrdb_x2, backend=backend).upscale_rgb(image[None])[0]
    assert ours.shape == (2 * size[0], 2 * size[1], 3)
    assert np.abs(ours.astype(int) - official(rrdb_x2, tmp_path)(image)).max() <= 1
    engine = make_engine(rrdb_x2, (size[1], size[0]), backend=backend)
    frames = yuv_frames(engine.source, 1)
    assert engine.upscale(frames).shape == (1, engine.target.frame_bytes)


@pytest.mark.parametrize("tile", [32, 64, 101])
@pytest.mark.parametrize("model", ["srvgg_x2", "srvgg_x4"])
def test_tiles_change_no_bit(model: str, tile: int, backend: str, request: pytest.FixtureRequest) -> None:
    card = request.getfixturevalue(model)
    whole = make_engine(card, (150, 131), backend=backend)
    tiled = make_engine(card, (150, 131), backend=backend, tile=tile)
    frames = yuv_frames(whole.source, 1)
    assert whole.tile is None
    assert tiled.tile == tile
    np.testing.assert_array_equal(whole.upscale(frames), tiled.upscale(frames))
    image = picture(131, 150)[None]
    np.testing.assert_array_equal(whole.upscale_rgb(image), tiled.upscale_rgb(image))


def test_strips_change_no_bit(srvgg_x2: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(srvgg_x2, (150, 131), backend="torch", reuse=False)
    frames = yuv_frames(engine.source, 1)
    whole = engine.upscale(frames)
    monkeypatch.setattr(torch_network, "_WHOLE_BYTES", 0)
    monkeypatch.setattr(torch_network, "_STRIP_BYTES", 1 << 18)
    np.testing.assert_array_equal(engine.upscale(frames), whole)


@pytest.mark.parametrize("model", ["rrdb_x2", "rrdb_x4"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_tiles_of_dense_networks_overlap_widely(model: str, backend: str, request: pytest.FixtureRequest) -> None:
    card = request.getfixturevalue(model)
    image = picture(75, 90)[None]
    engines = (make_engine(card, (90, 75), backend=backend, tile=tile) for tile in (None, 33))
    whole, tiled = (engine.upscale_rgb(image) for engine in engines)
    assert np.abs(whole.astype(int) - tiled).max() <= 1


def test_a_frame_does_not_depend_on_its_company(srvgg_x2: ModelCard, backend: str) -> None:
    engine = make_engine(srvgg_x2, backend=backend)
    frames = yuv_frames(engine.source, 4)
    together = engine.upscale(frames)
    for i in (2, 0, 3, 1):
        np.testing.assert_array_equal(engine.upscale(frames[i : i + 1])[0], together[i])
    np.testing.assert_array_equal(make_engine(srvgg_x2, backend=backend).upscale(frames[1:3]), together[1:3])
    np.testing.assert_array_equal(make_engine(srvgg_x2, backend=backend, threads=2).upscale(frames), together)
    np.testing.assert_array_equal(make_engine(srvgg_x2, backend=backend, threads=3, batch=2).upscale(frames), together)
    assert engine.upscale(frames[:0]).shape == (0, engine.target.frame_bytes)


@pytest.mark.parametrize("size", [(160, 90), (426, 240)])
def test_threads_change_no_bit(size: tuple[int, int], backend: str) -> None:
    card = find_model("compact-x2")
    one, two, divided = (
        make_engine(card, size, backend=backend, threads=threads, batch=batch)
        for threads, batch in ((1, 1), (2, 1), (2, 2))
    )
    frames = yuv_frames(one.source, 8)
    expected = one.upscale(frames)
    np.testing.assert_array_equal(two.upscale(frames), expected)
    np.testing.assert_array_equal(divided.upscale(frames), expected)


def test_another_thread_and_read_only_frames(srvgg_x2: ModelCard, backend: str) -> None:
    engine = make_engine(srvgg_x2, backend=backend)
    frames = yuv_frames(engine.source, 1)
    frames.flags.writeable = False
    results: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: results.append(engine.upscale(frames))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], engine.upscale(frames))


def test_repeated_frames_are_computed_once(srvgg_x2: ModelCard, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, plain = (make_engine(srvgg_x2, backend=backend, reuse=reuse) for reuse in (True, False))
    a, b = yuv_frames(engine.source, 2)
    frames = np.stack([a, a, b, b, b, a])
    expected = plain.upscale(frames)
    computed = 0

    def count(_: Tensor) -> None:
        nonlocal computed
        computed += 1

    before_each_run(count, monkeypatch)
    np.testing.assert_array_equal(engine.upscale(frames), expected)
    assert computed == 3
    np.testing.assert_array_equal(engine.upscale(frames[5:]), expected[5:])  # equal to the last of the call before
    assert computed == 3
    np.testing.assert_array_equal(engine.upscale(frames[:3]), expected[:3])
    assert computed == 4


def scenes(picture: PictureFormat, seed: int = 0) -> np.ndarray:
    """Frames in which more and more of a still picture changes: a sample, patches here and there, everything."""
    random = np.random.default_rng(seed)
    frames = [yuv_frames(picture, 1, seed)[0]]
    for _ in range(12):
        frame = frames[-1].copy()
        for plane in planes(frame, picture):
            for _ in range(random.integers(3)):
                top, left = random.integers(plane.shape[0]), random.integers(plane.shape[1])
                part = plane[top : top + random.integers(1, 12), left : left + random.integers(1, 20)]
                part[:] = random.integers(16, 235, part.shape)
        frames.append(frame)
    return np.stack([*frames, *yuv_frames(picture, 2, seed + 1)])


@pytest.mark.parametrize("size", [(320, 180), (203, 151)])
@pytest.mark.parametrize(
    ("model", "scale"), [("compact-x2", 2), ("srvgg_x4", 4), ("srvgg_x4", 2), ("srvgg_x4", 1), ("srvgg_x3", 3)]
)
def test_kept_parts_change_no_bit(
    model: str, scale: int, size: tuple[int, int], backend: str, make_model: MakeModel, request: pytest.FixtureRequest
) -> None:
    if model == "srvgg_x3":
        card = make_model(architecture="srvgg", scale=3, num_feat=8, num_conv=3)
    else:
        card = find_model(model) if "-" in model else request.getfixturevalue(model)
    target = (scale * size[0], scale * size[1])
    engine, plain = (make_engine(card, size, target, backend=backend, reuse=reuse) for reuse in (True, False))
    frames = scenes(engine.source)
    np.testing.assert_array_equal(engine.upscale(frames), plain.upscale(frames))
    assert 0.05 < engine.work.kept < 1
    assert plain.work.kept == 0


def test_parts_are_kept_across_calls(srvgg_x2: ModelCard, backend: str) -> None:
    engine, plain = (make_engine(srvgg_x2, (320, 180), backend=backend, reuse=reuse) for reuse in (True, False))
    frames = scenes(engine.source)
    results = [engine.upscale(frames[i : i + 1]) for i in range(len(frames))]
    np.testing.assert_array_equal(np.concatenate(results), plain.upscale(frames))
    assert engine.work.kept > 0.05


def test_results_resized_by_a_fraction_are_kept_whole_only(srvgg_x4: ModelCard, backend: str) -> None:
    engine, plain = (
        make_engine(srvgg_x4, (320, 180), (800, 450), backend=backend, reuse=reuse) for reuse in (True, False)
    )
    frames = scenes(engine.source)[[0, 0, 1, 1]]
    np.testing.assert_array_equal(engine.upscale(frames), plain.upscale(frames))
    assert engine.work.kept == 0.5


def test_small_differences_are_left_out_if_asked(srvgg_x2: ModelCard, backend: str) -> None:
    engine, plain = (make_engine(srvgg_x2, (320, 180), backend=backend, tolerance=steps) for steps in (2, 0))
    frame = yuv_frames(engine.source, 1)[0].clip(16, 200)
    creeping = np.stack([frame + step for step in range(7)])  # One code value brighter each time.
    results = engine.upscale(creeping)
    exact = plain.upscale(creeping)
    for shown, computed in enumerate([0, 0, 0, 3, 3, 3, 6]):
        np.testing.assert_array_equal(results[shown], exact[computed])
    # What was computed before is not shown: another job's frames, or another chunk's.
    np.testing.assert_array_equal(engine.upscale(creeping[5:]), exact[[5, 5]])


def before_each_run(act: Callable[[Tensor], None], patch: pytest.MonkeyPatch) -> None:
    """Call `act` with what a network is given, each time."""

    def acting(then: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, x: Tensor, *more: Any) -> Any:
            act(x)
            return then(self, x, *more)

        return run

    for network in (TorchNetwork, OpenVinoNetwork, WinogradNetwork):
        for method in ("run", "codes") if network is not TorchNetwork else ("run",):
            patch.setattr(network, method, acting(getattr(network, method)))


def out_of_memory_above(pixels: int, error: BaseException, patch: pytest.MonkeyPatch) -> None:
    """Let networks fail for inputs of more than that many pixels."""

    def limit(x: Tensor) -> None:
        if x.shape[2] * x.shape[3] > pixels:
            raise error

    before_each_run(limit, patch)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        RuntimeError("Exception from src/inference/src/cpp/infer_request.cpp:224: std::bad_alloc"),
    ],
    ids=["torch", "python", "allocator", "openvino"],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_out_of_memory_means_smaller_tiles(
    srvgg_x4: ModelCard, backend: str, threads: int, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(srvgg_x4, (150, 131), backend=backend, threads=threads)
    frames = yuv_frames(engine.source, 3)
    expected = make_engine(srvgg_x4, (150, 131), backend=backend).upscale(frames)
    out_of_memory_above(60 * 60, error, monkeypatch)
    np.testing.assert_array_equal(engine.upscale(frames), expected)
    assert engine.tile == 37
    assert engine.description.tile == 37


def test_never_enough_memory_names_the_frame(
    srvgg_x2: ModelCard, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(srvgg_x2, (100, 80), backend=backend)
    out_of_memory_above(100, MemoryError(), monkeypatch)
    with pytest.raises(FrameError, match=r"Frame 41 \(100x80\) does not fit into the memory") as caught:
        engine.upscale(yuv_frames(engine.source, 2), first_frame=41)
    assert caught.value.frame == 41


def test_other_errors_are_not_taken_for_lack_of_memory(srvgg_x2: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(srvgg_x2)
    out_of_memory_above(0, RuntimeError("something else"), monkeypatch)
    with pytest.raises(RuntimeError, match="something else"):
        engine.upscale(yuv_frames(engine.source, 1))


def test_tiles_are_planned_by_free_memory(rrdb_x4: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_engine(rrdb_x4, (640, 360), backend="openvino").tile is None
    monkeypatch.setattr(engine_module, "free_memory", lambda _: 400 << 20)
    assert make_engine(rrdb_x4, (640, 360), backend="openvino").tile == 160
    few = make_engine(rrdb_x4, (160, 90), backend="openvino", threads=16)
    assert few.tile is None
    assert 1 < few.batch < 16


def test_values_that_are_not_finite_fail_the_frame(make_model: MakeModel, backend: str) -> None:
    card = make_model(architecture="srvgg", scale=2, num_feat=4, num_conv=2, gain=1e30)
    engine = make_engine(card, backend=backend)
    frames = yuv_frames(engine.source, 2)
    with pytest.raises(FrameError, match="not finite for frame 7") as caught:
        engine.upscale(frames, first_frame=7)
    assert caught.value.frame == 7


def test_overflow_in_half_precision_is_repeated(make_model: MakeModel) -> None:
    # 16-bit floats end at 65504: the network's features pass it for bright frames, its output does not.
    card = make_model(architecture="srvgg", scale=2, num_feat=8, num_conv=2, gain=1.0)
    state = torch.load(str(card.path))["params"]
    state["body.0.weight"] *= 1e6
    state["body.2.weight"] *= 1e-6
    torch.save({"params": state}, Path(str(card.path)))
    engine = make_engine(find_model(str(card.path)), backend="torch")
    black = np.full(engine.source.frame_bytes, 128, np.uint8)
    black[: 64 * 48] = 16
    frames = np.stack([black, yuv_frames(engine.source, 1)[0]])
    exact = engine.upscale(frames).astype(int)
    half = make_engine(find_model(str(card.path)), backend="torch")
    half.precision = "fp16"
    result = half.upscale(frames).astype(int)
    assert np.abs(result - exact).max() <= 4
    half.precision = "bf16"
    np.testing.assert_array_equal(half.upscale(frames[1:])[0], result[1])
    assert set(half._networks) == {"fp32", "fp16", "bf16"}


@pytest.mark.skipif(not hardware.computes_in_bf16(), reason="needs a CPU that computes in bf16")
@pytest.mark.parametrize(("model", "least"), [("compact-x2", 55), ("compact-x4", 55), ("rrdb_x2", 40), ("rrdb_x4", 40)])
def test_bf16_on_a_cpu(model: str, least: float, request: pytest.FixtureRequest) -> None:
    card = find_model(model) if "-" in model else request.getfixturevalue(model)
    exact, quick = (make_engine(card, (150, 131), precision=precision) for precision in ("fp32", "bf16"))
    frames = yuv_frames(exact.source, 2)
    result = quick.upscale(frames)
    assert quick.description.precision == "bf16"
    assert least < psnr(exact.upscale(frames), result) < 100
    for options in ({"threads": 2}, {"batch": 1, "threads": 2}, {"reuse": False}):
        np.testing.assert_array_equal(
            make_engine(card, (150, 131), precision="bf16", **options).upscale(frames), result
        )
    tiled = make_engine(card, (150, 131), precision="bf16", tile=64).upscale(frames)
    if card.architecture == "srvgg":
        np.testing.assert_array_equal(tiled, result)
    else:
        assert psnr(tiled, result) > least


def test_half_precisions_that_a_cpu_does_not_have(srvgg_x2: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="fp16 on a CPU is slower"):
        make_engine(srvgg_x2, precision="fp16")
    monkeypatch.setattr(hardware, "computes_in_bf16", lambda: True)
    with pytest.raises(SettingsError, match="backend torch computes in fp32"):
        make_engine(srvgg_x2, precision="bf16", backend="torch")
    monkeypatch.setattr(hardware, "computes_in_bf16", lambda: False)
    with pytest.raises(SettingsError, match="this CPU does not compute in bf16"):
        make_engine(srvgg_x2, precision="bf16")


@pytest.mark.parametrize("target", [(96, 72), (128, 96), (101, 75), (40, 36)])
def test_any_size_up_to_the_scale(srvgg_x2: ModelCard, target: tuple[int, int]) -> None:
    engine = make_engine(srvgg_x2, (64, 48), target)
    frames = yuv_frames(engine.source, 2)
    result = engine.upscale(frames)
    assert result.shape == (2, engine.target.frame_bytes)
    with torch.inference_mode():
        rgb = PlanesToRgb(engine.source)(torch.from_numpy(frames)).clamp(0, 1)
        network = networks.build(srvgg_x2)
        network.load_state_dict(load_state(srvgg_x2))
        larger = network(rgb).clamp(0, 1)
        if target != (128, 96):
            larger = F.interpolate(larger, target[::-1], mode="bicubic", antialias=True).clamp(0, 1)
        expected = RgbToPlanes(engine.target)(larger).numpy()
    assert np.abs(result.astype(int) - expected).max() <= 1


def test_bundled_models_keep_the_picture() -> None:
    for name in ("compact-x2", "compact-x4"):
        engine = make_engine(find_model(name), (96, 64))
        frames = yuv_frames(engine.source, 1)
        larger = PlanesToRgb(engine.target)(torch.from_numpy(engine.upscale(frames)))
        back = F.interpolate(larger, (64, 96), mode="bicubic", antialias=True)
        source = PlanesToRgb(engine.source)(torch.from_numpy(frames))
        assert float((back - source).square().mean()) < 10**-2.6  # 26 dB, colours included


def test_larger_than_the_scale_is_refused(srvgg_x2: ModelCard) -> None:
    with pytest.raises(ModelError, match="2 times, 3 times is asked for") as caught:
        make_engine(srvgg_x2, (64, 48), (192, 144))
    assert "realesr-animevideov3" in str(caught.value)
    assert "x2" not in str(caught.value.remedy)
    with pytest.raises(ModelError, match="Ask for a smaller size"):
        make_engine(srvgg_x2, (64, 48), (640, 480))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:7"}, "not on this machine"),
        ({"device": "abacus"}, "no device called"),
        ({"device": "meta"}, "not supported"),
        ({"precision": "fp16"}, "on a CPU"),
        ({"precision": "fp8"}, "no precision called"),
        ({"tile": 5}, "tile is 5"),
        ({"threads": 0}, "threads is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"backend": "onnx"}, "no backend called"),
    ],
)
def test_impossible_settings(srvgg_x2: ModelCard, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_engine(srvgg_x2, **options)


def test_wrong_arrays(srvgg_x2: ModelCard) -> None:
    engine = make_engine(srvgg_x2)
    for bad in (np.zeros((1, 10), np.uint8), np.zeros(engine.source.frame_bytes, np.uint8)):
        with pytest.raises(ValueError, match="frames are"):
            engine.upscale(bad)
    with pytest.raises(ValueError, match="frames are"):
        engine.upscale_rgb(np.zeros((1, 4, 4, 3), np.float32))


def test_description_and_yardstick(srvgg_x2: ModelCard) -> None:
    engine = make_engine(srvgg_x2, threads=1)
    assert engine.warm_up() > 0
    description = engine.description
    assert (description.model, description.precision, description.threads) == (srvgg_x2.name, "fp32", 1)
    assert (description.tile, description.batch) == (None, 1)
    assert description.backend == CPU_BACKENDS[-1]
    assert make_engine(srvgg_x2, backend="torch").description.backend == "torch"
    assert engine.flop_per_frame == srvgg_x2.flop_per_input_pixel * 64 * 48
    assert matmul_peak("cpu", seconds=0.1) > 1e9


def test_an_engine_leaves_torch_its_threads(srvgg_x2: ModelCard) -> None:
    torch.set_num_threads(2)
    engine = make_engine(srvgg_x2)
    engine.upscale(yuv_frames(engine.source, 3))
    seen = [torch.get_num_threads()]
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert engine.description.batch == 2
    assert seen == [2, 2]


def test_frames_come_out_while_others_go_in(srvgg_x2: ModelCard) -> None:
    engine = make_engine(srvgg_x2, threads=2)
    frames = yuv_frames(engine.source, 9)
    taken = 0

    def batches() -> Iterator[np.ndarray]:
        nonlocal taken
        for i in range(0, 9, 3):
            taken += 3
            yield frames[i : i + 3]

    stream = engine.stream(batches())
    first = next(stream)
    assert taken == 3
    rest = list(stream)
    assert taken == 9
    np.testing.assert_array_equal(np.concatenate([first, *rest]), make_engine(srvgg_x2).upscale(frames))


def test_a_stream_that_is_left_frees_the_engine(srvgg_x2: ModelCard) -> None:
    engine = make_engine(srvgg_x2, threads=2)
    frames = yuv_frames(engine.source, 6)
    stream = engine.stream([frames])
    next(stream)
    stream.close()
    np.testing.assert_array_equal(engine.upscale(frames), make_engine(srvgg_x2).upscale(frames))


def in_thread(function: Callable[[], Any]) -> Any:
    """What a function returns in a thread of its own, which may hang without hanging the tests."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(60)
    assert results, "it hangs or has failed"
    return results[0]


@pytest.mark.parametrize("tolerance", [0, 2])
def test_a_stream_begins_when_the_one_before_has_given_its_last_frame(srvgg_x2: ModelCard, tolerance: int) -> None:
    engine = make_engine(srvgg_x2, (320, 180), threads=2, tolerance=tolerance)
    before, after = yuv_frames(engine.source, 3), scenes(engine.source, seed=9)
    first_work, work = Work(), Work()
    stream = engine.stream([before], work=first_work)
    results = [next(stream), next(stream)]  # Two go side by side, so the third is in the works.
    later = in_thread(lambda: np.concatenate(list(engine.stream([after], work=work))))
    results += list(stream)
    pixels = engine.source.width * engine.source.height
    assert (first_work.given, engine.work.given) == (3 * pixels, (3 + len(after)) * pixels)
    assert work.computed < work.given == pixels * len(after)
    for frames, found in ((before, np.concatenate(results)), (after, later)):
        fresh = make_engine(srvgg_x2, (320, 180), threads=2, tolerance=tolerance)
        np.testing.assert_array_equal(found, fresh.upscale(frames))
    again = make_engine(srvgg_x2, (320, 180), threads=2, tolerance=tolerance)
    np.testing.assert_array_equal(engine.upscale(after), again.upscale(after))


def test_a_stream_waits_while_another_one_gives_frames(srvgg_x2: ModelCard) -> None:
    engine = make_engine(srvgg_x2, threads=2)
    frames = yuv_frames(engine.source, 8)
    given: list[str] = []

    def batches(name: str) -> Iterator[np.ndarray]:
        for frame in frames:
            given.append(name)
            yield frame[None]

    stream = engine.stream(batches("first"))
    next(stream)
    thread = threading.Thread(target=lambda: list(engine.stream(batches("second"))), daemon=True)
    thread.start()
    thread.join(0.1)
    list(stream)
    thread.join(60)
    assert given == ["first"] * 8 + ["second"] * 8


def test_a_stream_that_fails_at_its_end_leaves_the_next_one_alone(srvgg_x2: ModelCard) -> None:
    engine = make_engine(srvgg_x2, threads=2)
    frames = yuv_frames(engine.source, 3)
    stream = engine.stream([frames])
    next(stream), next(stream)
    following = engine.stream([frames])
    first = next(following)
    stream.close()
    rest = list(following)
    np.testing.assert_array_equal(np.concatenate([first, *rest]), make_engine(srvgg_x2).upscale(frames))


@needs_gpu
@pytest.mark.parametrize("model", ["srvgg_x2", "srvgg_x4", "rrdb_x2", "rrdb_wide"])
def test_gpu_gives_what_the_cpu_gives(model: str, request: pytest.FixtureRequest) -> None:
    card = request.getfixturevalue(model)
    cpu = make_engine(card, (150, 130))
    frames = yuv_frames(cpu.source, 11)
    expected = cpu.upscale(frames).astype(int)
    for precision, tolerance in (("fp32", 1), ("fp16", 3)):
        gpu = make_engine(card, (150, 130), device="cuda", precision=precision, batch=4)
        assert np.abs(gpu.upscale(frames) - expected).max() <= tolerance
        assert gpu.description.batch == 4
        image = picture(75, 90)[None]
        assert np.abs(gpu.upscale_rgb(image).astype(int) - cpu.upscale_rgb(image)).max() <= tolerance


@needs_gpu
def test_gpu_results_do_not_depend_on_grouping(srvgg_x2: ModelCard) -> None:
    first, second = (make_engine(srvgg_x2, (150, 130), device="cuda", batch=4) for _ in range(2))
    frames = yuv_frames(first.source, 7)
    together = first.upscale(frames)
    np.testing.assert_array_equal(together, np.concatenate([second.upscale(frames[i : i + 3]) for i in (0, 3, 6)]))


@needs_gpu
def test_gpu_streams_follow_one_another_before_the_last_result_is_taken(srvgg_x2: ModelCard) -> None:
    engine, other = (make_engine(srvgg_x2, (150, 130), device="cuda", batch=4) for _ in range(2))
    frames = yuv_frames(engine.source, 7)
    stream = engine.stream([frames[:4], frames[4:]])
    results = [next(stream)]
    results.append(next(stream))  # The generator is still open.
    np.testing.assert_array_equal(in_thread(lambda: engine.upscale(frames)), other.upscale(frames))
    np.testing.assert_array_equal(np.concatenate(results), other.upscale(frames))


@needs_gpu
def test_gpu_out_of_memory(srvgg_x4: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(srvgg_x4, (150, 131), device="cuda", precision="fp32", batch=4)
    frames = yuv_frames(engine.source, 6)
    expected = engine.upscale(frames).astype(int)
    engine._last = None
    out_of_memory_above(60 * 60, torch.OutOfMemoryError("out of memory"), monkeypatch)
    assert np.abs(engine.upscale(frames) - expected).max() <= 1
    assert (engine.batch, engine.tile) == (1, 37)
