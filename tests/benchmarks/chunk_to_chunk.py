"""How fast chunks are upscaled from file to file, beside the engine alone and beside writing alone.

    python -m tests.benchmarks.chunk_to_chunk VIDEO [--model compact-x2] [--scratch FOLDER] [--turns 3] [--json]

The engine from memory to memory, the upscale task's loop from a chunk file to a chunk file, and the writer with results
that are there already take turns on frames of a video. The loop cannot be faster than the slower of the other two. How
far results are from those of torch in fp32 is told for three of the frames.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from tasks.media.chunk_file import ChunkReader, ChunkWriter
from tasks.media.decode import decode_frames
from tasks.media.probe import probe
from tasks.media.timestamps import scan_packets
from tasks.models.calibration import psnr
from tasks.models.cards import find_model
from tasks.models.engine import Engine
from tasks.upscale import run_engine

#: Bytes of results that writing takes from memory, again and again: few enough for any machine.
_RESULT_BYTES: Final = 2**30


def measure(video: Path, model: str, scratch: Path, turns: int, chunk_bytes: int, precision: str) -> dict[str, Any]:
    """Rates in frames per second, medians of the turns, and the distance from fp32 in dB."""
    facts = probe(video)
    card = find_model(model)
    source = facts.picture
    target = source.resized(card.scale * source.width, card.scale * source.height)
    count = max(4, chunk_bytes // target.frame_bytes)
    table = scan_packets(facts).table
    decoded = np.stack(list(decode_frames(facts, table, 0, min(count, len(table)) - 1)))
    # Forwards and backwards, so that no frame repeats the one before.
    there_and_back = np.concatenate((decoded, decoded[-2:0:-1]))
    frames = there_and_back[np.arange(count) % len(there_and_back)]
    engine = Engine(card, source, target, precision=precision, reuse=False)
    results = np.concatenate(list(engine.stream([frames[: max(1, _RESULT_BYTES // target.frame_bytes)]])))
    chunk, upscaled = scratch / "chunk.raw", scratch / "upscaled.raw"
    with ChunkWriter(chunk, source) as writer:
        writer.write(frames)

    def compute() -> None:
        step = engine.feed
        for _ in engine.stream(frames[i : i + step] for i in range(0, count, step)):
            pass

    def upscale() -> None:
        with ChunkWriter(upscaled, target) as writer:
            run_engine(engine, ChunkReader(chunk), writer, 0)

    def write() -> None:
        with ChunkWriter(upscaled, target) as writer:
            while len(writer) < count:
                for first in range(0, min(len(results), count - len(writer)), engine.batch):
                    writer.write(results[first : first + engine.batch])

    contenders = {"engine": compute, "task": upscale, "writing": write}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(turns + 1):
        for name, run in contenders.items():
            rates[name].append(count / _seconds(run))
            upscaled.unlink(missing_ok=True)
            os.sync()  # What one leaves to the disk must not slow the next.
    # The first turn warms up.
    fps = {name: median(turn[1:]) for name, turn in rates.items()}
    share = median(task / alone for task, alone in zip(rates["task"][1:], rates["engine"][1:], strict=True))
    return {
        "model": card.name,
        "source": f"{source.width}x{source.height}",
        **{key: getattr(engine.description, key) for key in ("device", "backend", "precision", "batch")},
        "frames": count,
        "fps": fps,
        "share_of_engine": share,
        "written_gb_per_second": fps["writing"] * target.frame_bytes / 1e9,
        "psnr": _distance(engine, frames[:: max(1, count // 3)][:3]),
    }


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _distance(engine: Engine, frames: np.ndarray) -> list[float]:
    """PSNR of each frame's result against that of torch in fp32, in dB."""
    exact = Engine(engine.card, engine.source, engine.target, backend="torch", precision="fp32", reuse=False)
    return [round(psnr(engine.upscale(frame[None]), exact.upscale(frame[None])), 2) for frame in frames]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("--model", default="compact-x2")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--scratch", type=Path, help="folder for chunk files; a temporary one by default")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the upscaled chunk")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        result = measure(
            arguments.video,
            arguments.model,
            Path(folder),
            arguments.turns,
            int(1e9 * arguments.gigabytes),
            arguments.precision,
        )
    if arguments.json:
        print(json.dumps(result))
        return
    fps = result["fps"]
    print(
        f"{result['model']} at {result['source']} in {result['precision']} on {result['device']}: "
        f"engine {fps['engine']:.2f} frames/s, file to file {fps['task']:.2f} ({result['share_of_engine']:.0%}), "
        f"writing alone {fps['writing']:.1f} ({result['written_gb_per_second']:.2f} GB/s); "
        f"PSNR to fp32 {', '.join(f'{value:.1f}' for value in result['psnr'])} dB"
    )


if __name__ == "__main__":
    main()
