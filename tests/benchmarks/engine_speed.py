"""Speed of the engine alone: planes in, planes out, no files, no processes around it.

    python tests/benchmarks/engine_speed.py --model compact-x2 --size 640x360 --json

Prints frames per second, the floating point operations per second they amount to, and their share of the fastest matrix
product measured on the same device just before and after. Use the share to compare machines, and runs on a busy one.
`--reference` also measures `RealESRGANer.enhance`, the official code path, on the CPU or GPU the engine ran on.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from tasks.media.pixels import Colour, PictureFormat
from tasks.models import networks
from tasks.models.cards import ModelCard, find_model
from tasks.models.engine import Engine, matmul_peak
from tasks.models.state import load_state


def measure(
    card: ModelCard, size: tuple[int, int], target: tuple[int, int] | None, seconds: float, **options: Any
) -> dict[str, Any]:
    """Frames per second of the engine on noise.

    Args:
        card: The model.
        size: Columns and rows of the source.
        target: Columns and rows of the result, the network's own size if `None`.
        seconds: How long to measure.
        options: Passed to `Engine`.
    """
    source = PictureFormat(*size, "yuv420p", Colour("bt709", full_range=False))
    wanted = source.resized(*(target or (size[0] * card.scale, size[1] * card.scale)))
    engine = Engine(card, source, wanted, reuse=False, **options)
    warm_up = engine.warm_up()
    call = 4 * engine.batch if engine.batch > 1 else 1
    frames = np.random.default_rng(0).integers(16, 236, (call, source.frame_bytes), dtype=np.uint8)
    engine.upscale(frames)
    peak_before = matmul_peak(engine.device, engine.precision, threads=engine.description.threads)
    wall: list[float] = []
    processor: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(wall) < 3 or time.perf_counter() < deadline:
        started, used = time.perf_counter(), time.process_time()
        engine.upscale(frames)
        wall.append((time.perf_counter() - started) / call)
        processor.append((time.process_time() - used) / call)
    peak = max(peak_before, matmul_peak(engine.device, engine.precision, threads=engine.description.threads))
    rate = 1 / median(wall)
    return {
        **asdict(engine.description),
        "size": f"{size[0]}x{size[1]}",
        "target": f"{wanted.width}x{wanted.height}",
        "fps": rate,
        "fps_best": 1 / min(wall),
        "cpu_seconds_per_frame": median(processor),
        "tflops": rate * engine.flop_per_frame / 1e12,
        "matmul_peak_tflops": peak / 1e12,
        "share_of_peak": rate * engine.flop_per_frame / peak,
        "warm_up_seconds": warm_up,
        "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated() if engine.device.type == "cuda" else None,
    }


def measure_reference(card: ModelCard, size: tuple[int, int], device: torch.device, seconds: float) -> dict[str, Any]:
    """Frames per second of `RealESRGANer.enhance` as its scripts call it: half precision on a GPU, whole frames."""
    upscaler = networks.official("realesrgan.utils", "RealESRGANer")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "params.pth"
        torch.save({"params": load_state(card)}, path)
        half = device.type == "cuda"
        network = networks.build(card)
        reference = upscaler(card.scale, str(path), model=network, pre_pad=0, half=half, device=device)
    image = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    reference.enhance(image)
    wall: list[float] = []
    processor: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(wall) < 3 or time.perf_counter() < deadline:
        started, used = time.perf_counter(), time.process_time()
        reference.enhance(image)
        wall.append(time.perf_counter() - started)
        processor.append(time.process_time() - used)
    return {"reference_fps": 1 / median(wall), "reference_cpu_seconds_per_frame": median(processor)}


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="compact-x2", help="name or path of a model")
    parser.add_argument("--size", default="640x360", help="source size")
    parser.add_argument("--target", help="result size, by default the network's own")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to measure")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tile", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--autotune", action="store_true", help="let cuDNN time its algorithms")
    parser.add_argument("--reference", action="store_true", help="measure RealESRGANer.enhance too")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    card = find_model(arguments.model)
    width, height = (int(side) for side in arguments.size.split("x"))
    target = None
    if arguments.target:
        columns, rows = (int(side) for side in arguments.target.split("x"))
        target = (columns, rows)
    options = {
        name: getattr(arguments, name)
        for name in ("device", "backend", "precision", "threads", "tile", "batch", "autotune")
    }
    reference = {}
    if arguments.reference:
        # First, before the engine changes how this process allocates memory.
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        device = torch.device("cuda" if torch.cuda.is_available() and arguments.device != "cpu" else "cpu")
        reference = measure_reference(card, (width, height), device, arguments.seconds)
    result = {**measure(card, (width, height), target, arguments.seconds, **options), **reference}
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:32} {value:.4g}" if isinstance(value, float) else f"{name:32} {value}")


if __name__ == "__main__":
    main()
