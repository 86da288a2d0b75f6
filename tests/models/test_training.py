"""The training of the bundled models: pictures, degradation, resuming, and the quality of the shipped weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tasks.errors import ModelError
from tasks.models import networks
from tasks.models.training.__main__ import main
from tasks.models.training.degradation import code_h264, degrade, shrink
from tasks.models.training.device_samples import DeviceSamples
from tasks.models.training.evaluate import (
    BUNDLED,
    compare,
    load_network,
    luma_psnr,
    luma_ssim,
    network_upscaler,
    report,
    score_clip,
)
from tasks.models.training.network import CompactNetwork
from tasks.models.training.pool import HELD_OUT_SEED, PicturePool
from tasks.models.training.procedural import picture
from tasks.models.training.train import Trainer, TrainingPlan, as_batch, held_out_gain

ROOT = Path(__file__).resolve().parents[2]
CLIPS = ("bbb-10s.mp4", "nasa_13013.mp4")
MARGINS = {2: 1.0, 4: 0.6}
"""Decibels of luma PSNR by which the bundled model of a scale has to beat bicubic on clean frames."""

PARAMETERS = {
    (name, scale): (3 * 9 + 1) * c + n * (c * 9 + 1) * c + (n + 1) * c + (c * 9 + 1) * 3 * scale**2
    for name, scale, c, n in [
        ("compact", 2, 32, 5),
        ("compact", 4, 32, 8),
        ("standard", 2, 64, 12),
        ("standard", 4, 64, 12),
    ]
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Compute on one thread: on busy cores, threads that wait for each other at every tiny step take minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _bundled(scale: int, name: str = "compact") -> Path:
    return BUNDLED / f"{name}-x{scale}.safetensors"


def _media() -> Path:
    folder = Path(os.environ.get("SUPERRES_TEST_MEDIA") or ROOT.parent / "shared" / "media")
    missing = [name for name in CLIPS if not (folder / name).is_file()]
    if missing:
        pytest.skip(f"no test clips: {', '.join(missing)} not in {folder} (set SUPERRES_TEST_MEDIA)")
    return folder


def _tiny_batch(scale: int) -> tuple[Tensor, Tensor]:
    full = picture(3, 48)
    return as_batch(np.stack([shrink(full, scale)])), as_batch(np.stack([full]))


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    return {**trainer.network.state_dict(), **{f"average {k}": v for k, v in trainer.average.items()}}


def test_pictures_depend_on_the_seed_alone() -> None:
    pictures = [picture(seed, 64) for seed in range(8)]
    for seed, drawn in enumerate(pictures):
        assert drawn.shape == (64, 64, 3)
        assert drawn.dtype == np.uint8
        np.testing.assert_array_equal(drawn, picture(seed, 64))
    assert len({drawn.tobytes() for drawn in pictures}) == len(pictures)


def test_pictures_are_varied() -> None:
    pictures = np.stack([picture(seed, 64) for seed in range(16)]).astype(float)
    means = pictures.mean(axis=(1, 2, 3))
    contrasts = pictures.std(axis=(1, 2)).mean(axis=1)
    assert np.ptp(means) > 80
    assert np.ptp(contrasts) > 30
    # Grey pictures alone would not teach colour edges.
    assert np.median(np.ptp(pictures.mean(axis=(1, 2)), axis=1)) > 5


@pytest.mark.parametrize("scale", [2, 4])
def test_degradation_keeps_shape_and_content(scale: int) -> None:
    full = picture(7, 128)
    plain = shrink(full, scale).astype(float)
    frames = [degrade(full, scale, np.random.default_rng(seed)) for seed in range(24)]
    for frame in frames:
        assert frame.shape == (128 // scale, 128 // scale, 3)
        assert frame.dtype == np.uint8
        # Mild, and not shifted: a displaced or swapped frame would differ much more.
        assert np.abs(frame - plain).mean() < 16
    exact = sum(bool((frame == plain).all()) for frame in frames)
    assert 6 <= exact <= 20
    np.testing.assert_array_equal(frames[3], degrade(full, scale, np.random.default_rng(3)))


def test_h264_coding_keeps_order_and_gets_worse_with_crf() -> None:
    full = picture(5, 128)
    frames = [np.ascontiguousarray(full[i * 4 : i * 4 + 64, :96]) for i in range(6)]
    fine, coarse = code_h264(frames, 10), code_h264(frames, 40)
    assert [f.shape for f in fine] == [f.shape for f in frames]
    for index, frame in enumerate(frames):
        others = [luma_psnr(fine[index], other, 2) for j, other in enumerate(frames) if j != index]
        assert luma_psnr(fine[index], frame, 2) > max(others)
        assert luma_psnr(fine[index], frame, 2) > luma_psnr(coarse[index], frame, 2) + 3


@pytest.mark.parametrize("scale", [2, 4])
def test_a_few_steps_lower_the_loss(scale: int) -> None:
    trainer = Trainer(TrainingPlan(scale=scale, steps=100, rate=0.02))
    batch = _tiny_batch(scale)
    losses = [trainer.advance(*batch) for _ in range(25)]
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0]


def test_resumed_training_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    plan = TrainingPlan(scale=2, steps=6, batch=2, patch=16)

    def advance(trainer: Trainer, pool: PicturePool, until: int) -> None:
        while trainer.step < until:
            inputs, targets = pool.samples(trainer.step, plan.scale, plan.batch, plan.patch)
            trainer.advance(as_batch(inputs), as_batch(targets))

    straight, stopped = Trainer(plan), Trainer(plan)
    with PicturePool(tmp_path / "pool", plan.seed, first=1, refresh_steps=3, capacity=1) as pool:
        advance(straight, pool, 6)
        # The pool holds one picture and is ahead by now; going back has to bring the first one back.
        advance(stopped, pool, 4)
    stopped.save(tmp_path / "run.pt")
    continued = Trainer.resume(tmp_path / "run.pt", plan)
    assert continued.step == 4
    with PicturePool(tmp_path / "empty", plan.seed, first=1, refresh_steps=3, capacity=1) as pool:
        advance(continued, pool, 6)
    expected = _weights(straight)
    assert all(torch.equal(value, expected[name]) for name, value in _weights(continued).items())
    assert not all(torch.equal(value, expected[name]) for name, value in _weights(stopped).items())


def test_a_checkpoint_of_another_scale_is_refused(tmp_path: Path) -> None:
    Trainer(TrainingPlan(scale=2, steps=1)).save(tmp_path / "run.pt")
    with pytest.raises(ValueError, match="scale 2, not 4"):
        Trainer.resume(tmp_path / "run.pt", TrainingPlan(scale=4, steps=1))


def test_the_other_scale_starts_from_the_same_body() -> None:
    smaller = Trainer(TrainingPlan(scale=2, steps=1, seed=1)).network.state_dict()
    larger = Trainer(TrainingPlan(scale=4, steps=1), smaller).network.state_dict()
    last = max(int(name.split(".")[1]) for name in smaller)
    for name, value in larger.items():
        same = value.shape == smaller[name].shape and torch.equal(value, smaller[name])
        assert same == (f"body.{last}." not in name)


def test_a_plan_has_exactly_one_length() -> None:
    with pytest.raises(ValueError, match="one length"):
        TrainingPlan(scale=2)
    with pytest.raises(ValueError, match="one length"):
        TrainingPlan(scale=2, steps=1, minutes=1.0)
    assert TrainingPlan(scale=2, minutes=2.0).progress(10**6, 60.0) == 0.5


@pytest.mark.parametrize("scale", [2, 4])
def test_samples_on_a_device_are_parts_of_the_pictures(scale: int) -> None:
    small = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
    full = small.repeat(scale, 1).repeat(scale, 2)
    samples = DeviceSamples(small, full, 0, "cpu")
    found = set()
    for step in range(6):
        inputs, targets = samples(step, 4, 5)
        assert inputs.shape == (4, 3, 5, 5)
        # Targets are cut, turned and mirrored as the samples are, or they would not be these pixels enlarged.
        assert torch.equal(targets, inputs.repeat_interleave(scale, 2).repeat_interleave(scale, 3))
        assert torch.equal(inputs, samples(step, 4, 5)[0])
        found |= {sample.numpy().tobytes() for sample in inputs}
    assert len(found) == 24


def test_training_seeds_never_reach_the_held_out_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed 1000"):
        PicturePool(tmp_path, seed=1000)


def test_the_network_equals_the_official_one() -> None:
    try:
        official = networks.official("realesrgan.archs.srvgg_arch", "SRVGGNetCompact")
    except ModelError as error:
        pytest.skip(str(error))
    theirs = official(num_feat=32, num_conv=8, upscale=2, act_type="prelu").eval()
    ours = CompactNetwork(2, convolutions=8).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(1, 3, 12, 10, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(("name", "scale"), PARAMETERS)
def test_bundled_weights_are_complete(name: str, scale: int) -> None:
    with safe_open(_bundled(scale, name), "pt") as file:
        header = file.metadata()
    assert header["name"] == f"{name}-x{scale}"
    assert int(header["training_steps"]) > 1000
    weights = load_file(_bundled(scale, name))
    assert all(bool(torch.isfinite(value).all()) and value.dtype == torch.float32 for value in weights.values())
    assert sum(value.numel() for value in weights.values()) == PARAMETERS[name, scale]
    network = load_network(_bundled(scale, name))
    assert network.scale == scale


@pytest.mark.parametrize("scale", [2, 4])
def test_bundled_models_beat_bicubic_and_the_larger_the_smaller_on_held_out_pictures(scale: int) -> None:
    assert HELD_OUT_SEED >= 10**9
    compact, standard = (
        held_out_gain(load_network(_bundled(scale, name)), pictures=6, size=128) for name in ("compact", "standard")
    )
    assert standard > compact > MARGINS[scale]


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("scale", [2, 4])
def test_bundled_model_beats_bicubic_on_real_frames(scale: int, clip: str) -> None:
    scores = score_clip(_media() / clip, scale, {"model": network_upscaler(load_network(_bundled(scale)))}, count=3)
    clean = scores.gains("clean")
    assert len(clean) == 3
    assert np.mean(clean) >= MARGINS[scale]
    assert min(clean) > 0.0
    assert np.mean(scores.gains("crf23")) >= 0.0


def test_report_has_a_row_per_clip_condition_and_mean(tmp_path: Path) -> None:
    clip = tmp_path / "short.mp4"
    _write_clip(clip, [picture(2, 96)] * 3 + [np.zeros((96, 96, 3), np.uint8)])
    rows = report([clip], [_bundled(2)], count=4).splitlines()[2:]
    assert [[cell.strip() for cell in row.split("|")[1:4]] for row in rows] == [
        ["compact-x2", name, condition] for condition in ("clean", "crf23") for name in ("short", "all frames")
    ]
    assert not any("inf" in row or "nan" in row for row in rows)


def test_models_are_compared_by_scale(tmp_path: Path) -> None:
    clip = tmp_path / "short.mp4"
    _write_clip(clip, [picture(2, 96)] * 3)
    rows = compare([clip], ["compact-x4", "compact-x2"], count=1).splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    methods = [("2", "bicubic"), ("2", "lanczos"), ("2", "compact-x2")]
    methods += [("4", "bicubic"), ("4", "lanczos"), ("4", "compact-x4")]
    assert [(scale, method) for scale, method, *_ in cells] == methods
    assert all(0 < float(ssim) < 1 for row in cells for ssim in (row[3], row[5]))
    assert float(cells[2][2]) > float(cells[0][2])
    assert [bool(row[6]) for row in cells] == [False, False, True] * 2


def test_structural_similarity_is_that_of_its_definition() -> None:
    random = np.random.default_rng(1)
    reference = np.repeat(random.integers(0, 256, (13, 14, 1), np.uint8), 3, axis=2)
    output = np.clip(reference * 0.8 + random.integers(0, 40, (13, 14, 1)), 0, 255).astype(np.uint8)
    distance = np.arange(11) - 5
    weights = np.exp(-(distance[:, None] ** 2 + distance[None] ** 2) / 4.5)
    weights /= weights.sum()
    values = []
    for top in range(1, 2):
        for left in range(1, 3):
            a, b = (grey[top : top + 11, left : left + 11, 0].astype(float) for grey in (output, reference))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            both = (weights * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = 6.5025, 58.5225
            values.append(
                (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
            )
    assert luma_ssim(output, reference, border=1) == pytest.approx(np.mean(values), abs=1e-9)
    assert luma_ssim(reference, reference, border=1) == pytest.approx(1)


def test_command_line_trains_and_exports(tmp_path: Path) -> None:
    options = ["--scale", "4", "--steps", "2", "--first-pictures", "1", "--batch", "1", "--patch", "12"]
    main([*options, "--threads", "1", "--out", str(tmp_path), "--resume"])
    with safe_open(tmp_path / "compact-x4.safetensors", "pt") as file:
        assert file.metadata()["training_steps"] == "2"


def _write_clip(path: Path, frames: list[np.ndarray]) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "10"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in [*(av.VideoFrame.from_ndarray(f, format="rgb24") for f in frames), None]:
            container.mux(stream.encode(frame))
