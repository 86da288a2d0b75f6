"""Training of one compact or standard model on procedural pictures, on a CPU or a GPU, resumable."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from tasks.models.training.degradation import shrink
from tasks.models.training.device_samples import DeviceSamples
from tasks.models.training.evaluate import enlarge, load_network, luma_psnr, network_upscaler
from tasks.models.training.network import CompactNetwork
from tasks.models.training.pool import HELD_OUT_SEED, REFRESH_STEPS, PicturePool
from tasks.models.training.procedural import picture

logger = logging.getLogger(__name__)

RECIPE_VERSION = "2"

_WARM_UP_STEPS = 200
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class TrainingPlan:
    """What to train and for how long; stored with each checkpoint.

    Attributes:
        scale: Upscaling factor, 2 or 4.
        seed: Seed of the weights, the pictures and the crops.
        steps: Length of the learning-rate schedule in steps, or None if `minutes` sets it.
        minutes: Length of the schedule in minutes of training time. Only a plan in steps is reproducible bit for bit,
            because with minutes the learning rate follows the machine's speed.
        batch: Samples per step.
        patch: Side of a low-resolution sample in pixels.
        rate: Peak learning rate.
        convolutions: Hidden convolutions of the network.
        features: Channels between them.
        name: What the weights are called, before their scale.
    """

    scale: int
    seed: int = 0
    steps: int | None = None
    minutes: float | None = None
    batch: int = 8
    patch: int = 40
    rate: float = 1.5e-3
    convolutions: int = 8
    features: int = 32
    name: str = "compact"

    def __post_init__(self) -> None:
        """Check that exactly one length is given."""
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("a training plan needs one length: either steps or minutes")

    def progress(self, step: int, seconds: float) -> float:
        """Tell how much of the schedule is done, 0..1, after so many steps and seconds of training."""
        done = step / self.steps if self.steps is not None else seconds / (60.0 * (self.minutes or 1.0))
        return min(done, 1.0)


def as_batch(pictures: NDArray[np.uint8]) -> Tensor:
    """Convert uint8 pictures (count, h, w, 3) to a float32 tensor (count, 3, h, w), 0..1, channels-last in memory."""
    # The permuted view already has the channels-last layout, which is the faster one for convolutions on a CPU.
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(255.0)


def restoration_loss(output: Tensor, target: Tensor) -> Tensor:
    """Charbonnier distance on RGB plus the same on luma, where the eye and the measurements look.

    Args:
        output: Shape (batch, 3, height, width), float.
        target: Same shape.

    Returns:
        Scalar.
    """
    difference = output - target
    luma = (difference * difference.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1)
    epsilon = 1e-6
    return (difference.square() + epsilon).sqrt().mean() + (luma.square() + epsilon).sqrt().mean()


class Trainer:
    """One training run: weights, their running average, optimiser and position in the schedule."""

    def __init__(self, plan: TrainingPlan, initial: Mapping[str, Tensor] | None = None, device: str = "cpu") -> None:
        """Start a run at step 0.

        Args:
            plan: What to train.
            initial: Weights to start from; tensors whose shape differs are left fresh.
            device: Where to train.
        """
        torch.manual_seed(plan.seed)
        self.plan = plan
        self.step = 0
        self.seconds = 0.0
        network = CompactNetwork(plan.scale, plan.convolutions, plan.features)
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if initial is not None:
            own = network.state_dict()
            fitting = {k: v for k, v in initial.items() if k in own and v.shape == own[k].shape}
            network.load_state_dict({**own, **fitting})
        self.network: CompactNetwork = network.to(device)
        self.average = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=plan.rate, betas=(0.9, 0.99))

    @property
    def done(self) -> bool:
        """Whether the plan's schedule is complete."""
        return self.plan.progress(self.step, self.seconds) >= 1.0

    def advance(self, inputs: Tensor, targets: Tensor) -> float:
        """Take one optimiser step.

        Args:
            inputs: Shape (batch, 3, height, width), float 0..1.
            targets: Shape (batch, 3, height * scale, width * scale), float 0..1.

        Returns:
            The loss before the step.
        """
        began = time.monotonic()
        warm_up = min(1.0, (self.step + 1) / _WARM_UP_STEPS)
        decay = 0.5 * (1.0 + math.cos(math.pi * self.plan.progress(self.step, self.seconds)))
        for group in self.optimiser.param_groups:
            group["lr"] = self.plan.rate * warm_up * max(decay, 0.01)
        self.optimiser.zero_grad()
        loss = restoration_loss(self.network(inputs), targets)
        loss.backward()
        self.optimiser.step()
        # The average follows closely at first, so that early exports are not dominated by the random start.
        keep = min(0.999, (1 + self.step) / (10 + self.step))
        for name, value in self.network.state_dict().items():
            self.average[name].lerp_(value, 1.0 - keep)
        self.step += 1
        value = float(loss.detach())  # On a GPU, when it has got that far.
        self.seconds += time.monotonic() - began
        return value

    def save(self, path: Path) -> None:
        """Write a checkpoint from which `resume` continues exactly."""
        state = {
            "plan": asdict(self.plan),
            "step": self.step,
            "seconds": self.seconds,
            "network": self.network.state_dict(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
        }
        # Written aside and renamed, so that a run killed in the middle leaves the previous checkpoint intact.
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    @classmethod
    def resume(cls, path: Path, plan: TrainingPlan, device: str = "cpu") -> Trainer:
        """Continue from a checkpoint.

        Args:
            path: File written by `save`.
            plan: Plan of the continued run; must have the checkpoint's scale, seed and size.
            device: Where to train.

        Returns:
            A trainer in the saved state.

        Raises:
            ValueError: If the checkpoint belongs to another scale, seed or size.
        """
        state = torch.load(path, weights_only=True, map_location=device)
        for field in ("scale", "seed", "convolutions", "features"):
            if state["plan"][field] != getattr(plan, field):
                raise ValueError(f"{path} was trained with {field} {state['plan'][field]}, not {getattr(plan, field)}")
        trainer = cls(plan, device=device)
        trainer.network.load_state_dict(state["network"])
        trainer.average = state["average"]
        trainer.optimiser.load_state_dict(state["optimiser"])
        trainer.step, trainer.seconds = state["step"], state["seconds"]
        return trainer

    def export(self, path: Path) -> None:
        """Write the averaged weights as a safetensors file with a descriptive header."""
        header = {
            "name": f"{self.plan.name}-x{self.plan.scale}",
            "architecture": "SRVGGNetCompact",
            "num_feat": str(self.plan.features),
            "num_conv": str(self.plan.convolutions),
            "act_type": "prelu",
            "scale": str(self.plan.scale),
            "training_steps": str(self.step),
            "recipe_version": RECIPE_VERSION,
        }
        partial = path.with_suffix(".partial")
        save_file({k: v.cpu().contiguous() for k, v in self.average.items()}, partial, metadata=header)
        # The writer makes files private to the user; weights are there to be shared.
        partial.chmod(0o644)
        partial.replace(path)


def held_out_gain(network: CompactNetwork, pictures: int = 12, size: int = 256) -> float:
    """Measure luma PSNR against bicubic on procedural pictures that are never trained on.

    Args:
        network: What to measure.
        pictures: Number of held-out pictures.
        size: Their side in pixels.

    Returns:
        Mean gain over bicubic in decibels.
    """
    upscale, scale = network_upscaler(network), network.scale
    gains = []
    for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + pictures):
        full = picture(seed, size)
        small = shrink(full, scale)
        gains.append(luma_psnr(upscale(small), full, scale) - luma_psnr(enlarge(small, scale), full, scale))
    return float(np.mean(gains))


def train(
    plan: TrainingPlan,
    out: Path,
    pool_folder: Path | None = None,
    initial: Path | None = None,
    resume: bool = False,
    first_pictures: int = 240,
    workers: int = 1,
    device: str = "cpu",
    checkpoint_minutes: float = 3.0,
) -> Path:
    """Run a plan to its end, writing a checkpoint and the averaged weights every few minutes.

    Args:
        plan: What to train.
        out: Folder for the checkpoint, the weights and, by default, the picture pool.
        pool_folder: Picture pool shared with another run of the same seed.
        initial: Weights file of the other scale to start from.
        resume: Continue from the checkpoint in `out` if there is one.
        first_pictures: Pictures to generate before the first step.
        workers: Processes that draw pictures.
        device: Where to train.
        checkpoint_minutes: Time between checkpoints.

    Returns:
        Path of the weights file.
    """
    out.mkdir(parents=True, exist_ok=True)
    name = f"{plan.name}-x{plan.scale}"
    checkpoint, weights = out / f"{name}.pt", out / f"{name}.safetensors"
    if resume and checkpoint.exists():
        trainer = Trainer.resume(checkpoint, plan, device)
    else:
        trainer = Trainer(plan, load_file(initial) if initial else None, device)
    on_gpu = device != "cpu"
    logger.info("plan %s, starting at step %d", json.dumps(asdict(plan)), trainer.step)
    losses: list[float] = []
    saved = time.monotonic()
    refresh_steps = None if on_gpu else REFRESH_STEPS  # On a GPU, pictures are copied there once.
    with PicturePool(
        pool_folder or out / "pool", plan.seed, first=first_pictures, refresh_steps=refresh_steps, workers=workers
    ) as pool:
        on_device = DeviceSamples(*pool.pictures(plan.scale), plan.seed, device) if on_gpu else None
        while not trainer.done:
            if on_device is not None:
                inputs, targets = on_device(trainer.step, plan.batch, plan.patch)
            else:
                cut = pool.samples(trainer.step, plan.scale, plan.batch, plan.patch)
                inputs, targets = map(as_batch, cut)
            losses.append(trainer.advance(inputs, targets))
            elapsed = time.monotonic() - saved
            if elapsed > 60.0 * checkpoint_minutes or trainer.done:
                trainer.save(checkpoint)
                trainer.export(weights)
                logger.info(
                    "step %d, %.1f min trained, %.2f steps/s, loss %.5f, %+.3f dB over bicubic on held-out pictures",
                    trainer.step,
                    trainer.seconds / 60.0,
                    len(losses) / elapsed,
                    np.mean(losses),
                    held_out_gain(load_network(weights)),
                )
                losses.clear()
                saved = time.monotonic()
    return weights
