"""Command line of the training: `python -m tasks.models.training --scale 2 --minutes 60 --out DIR`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from tasks.models.training.network import SIZES


def main(command_line: Sequence[str] | None = None) -> None:
    """Parse the command line, by default the process's own, and train."""
    parser = argparse.ArgumentParser(prog="python -m tasks.models.training", description=__doc__)
    parser.add_argument("--scale", type=int, choices=(2, 4), required=True)
    parser.add_argument("--network", choices=sorted(SIZES), default="compact")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="schedule length in minutes of training time")
    length.add_argument("--steps", type=int, help="schedule length in steps (reproducible bit for bit)")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, weights and pictures")
    parser.add_argument("--pool", type=Path, help="picture pool to share with another run of the same seed")
    parser.add_argument("--initial", type=Path, help="weights of the other scale to start from")
    parser.add_argument("--first-pictures", type=int, default=240, help="pictures generated before the first step")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--batch", type=int, default=8, help="samples per step")
    parser.add_argument("--patch", type=int, default=40, help="side of a low-resolution sample in pixels")
    parser.add_argument("--convolutions", type=int, help="hidden convolutions; default: the bundled model's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for the arithmetic")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw pictures")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; on a GPU no pictures are added later on")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    arguments = parser.parse_args(command_line)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    import torch

    from tasks.models.hardware import keep_freed_memory
    from tasks.models.training.train import TrainingPlan, train

    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    features, convolutions = SIZES[arguments.network][arguments.scale]
    plan = TrainingPlan(
        scale=arguments.scale,
        seed=arguments.seed,
        steps=arguments.steps,
        minutes=arguments.minutes,
        batch=arguments.batch,
        patch=arguments.patch,
        rate=arguments.rate,
        convolutions=arguments.convolutions or convolutions,
        features=features,
        name=arguments.network,
    )
    train(
        plan,
        arguments.out,
        pool_folder=arguments.pool,
        initial=arguments.initial,
        resume=arguments.resume,
        first_pictures=arguments.first_pictures,
        workers=arguments.workers,
        device=arguments.device,
    )


if __name__ == "__main__":
    main()
