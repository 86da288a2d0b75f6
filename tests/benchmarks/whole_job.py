"""Whole job against the engine alone, on the same frames on the same machine, in one run.

    python tests/benchmarks/whole_job.py [--seconds 60] [--size 640x360] [--model compact-x2] [--video FILE] [--json]

The engine alone runs before and after each job on all frames of the clip, and the median of all its runs is compared
with the median of the jobs: machines drift. The job's rate leaves out start-up, which is reported apart. Beside them
stands what the machine can do at most in a matrix product.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ffmpeg as ffmpeg_python
import numpy as np

from tasks.media import ffmpeg
from tasks.media.decode import decode_frames
from tasks.media.probe import probe
from tasks.media.sample import write_sample
from tasks.media.timestamps import scan_packets

#: Frames decoded ahead of the engine at a time.
_BLOCK_FRAMES = 40


def make_clip(folder: Path, seconds: float, size: tuple[int, int]) -> Path:
    """The sample clip, repeated and scaled."""
    sample, clip = folder / "sample.mp4", folder / "clip.mp4"
    write_sample(sample)
    looped = ffmpeg_python.input(ffmpeg.file_argument(sample), stream_loop=-1)
    # Each repetition starts a little late, after the sound; the frames are put back on one even grid.
    video = looped.video.filter("scale", *size, flags="bicubic").filter("setpts", "N*1001/24000/TB")
    output = ffmpeg_python.output(
        video,
        looped.audio,
        ffmpeg.file_argument(clip),
        t=seconds,
        pix_fmt="yuv420p",
        **{"c:v": "libx264", "c:a": "copy"},
    )
    ffmpeg.run(output.get_args())
    return clip


def engine_alone(clip: Path, model: str) -> dict[str, Any]:
    """Frames per second of the engine on the clip's frames, in a process of its own; planes in, planes out."""
    command = [sys.executable, __file__, "--engine-alone", "--video", str(clip), "--model", model]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure_engine(clip: Path, model: str) -> dict[str, Any]:
    import time

    from tasks.models.cards import find_model
    from tasks.models.engine import Engine
    from tasks.models.hardware import matmul_peak

    facts = probe(clip)
    table = scan_packets(facts).table
    card = find_model(model)
    engine = Engine(card, facts.picture, facts.picture.resized(facts.width * card.scale, facts.height * card.scale))
    engine.warm_up()
    decoded = decode_frames(facts, table, 0, len(table) - 1)
    seconds = 0.0
    while block := list(itertools.islice(decoded, _BLOCK_FRAMES)):
        frames = np.stack(block)
        started = time.perf_counter()
        engine.upscale(frames)
        seconds += time.perf_counter() - started
    rate = len(table) / seconds
    peak = matmul_peak(engine.device, threads=engine.description.threads)
    return {"frames_per_second": rate, "flops": rate * engine.flop_per_frame, "matmul_peak": peak}


def whole_job(clip: Path, model: str, scale: int, folder: Path) -> dict[str, Any]:
    """The JSON of one `superres upscale`."""
    command = [
        sys.executable,
        "-m",
        "flows.cli",
        "upscale",
        str(clip),
        str(folder / "result.mp4"),
        "--json",
        "--overwrite",
    ]
    command += ["--model", model, "--scale", str(scale), "--scratch", str(folder / "scratch"), "--fresh"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--size", default="640x360")
    parser.add_argument("--model", default="compact-x2")
    parser.add_argument("--video", type=Path, help="measure on this clip instead of the generated one")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--engine-alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine_alone:
        print(json.dumps(measure_engine(arguments.video, arguments.model)))
        return

    from tasks.models.cards import find_model

    scale = find_model(arguments.model).scale
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        width, height = (int(side) for side in arguments.size.split("x"))
        clip = arguments.video or make_clip(folder, arguments.seconds, (width, height))
        engines, jobs = [engine_alone(clip, arguments.model)], []
        for _ in range(arguments.repeat):
            jobs.append(whole_job(clip, arguments.model, scale, folder))
            engines.append(engine_alone(clip, arguments.model))
    engine = statistics.median(run["frames_per_second"] for run in engines)
    job = statistics.median(run["fps"] for run in jobs)
    figures = {
        "clip": str(arguments.video or f"{arguments.seconds:g} s of {arguments.size}"),
        "model": arguments.model,
        "frames": jobs[0]["frames_out"],
        "engine_fps": engine,
        "job_fps": job,
        "ratio": job / engine,
        "startup_seconds": statistics.median(run["startup_seconds"] for run in jobs),
        "engine_tflops": statistics.median(run["flops"] for run in engines) / 1e12,
        "matmul_peak_tflops": statistics.median(run["matmul_peak"] for run in engines) / 1e12,
    }
    if arguments.json:
        print(json.dumps(figures))
        return
    print(f"{figures['clip']}, {figures['model']}, {figures['frames']} frames")
    runs = ", ".join(f"{run['frames_per_second']:.2f}" for run in engines)
    print(f"engine alone      {engine:8.2f} frames/s   (runs: {runs})")
    print(f"whole job         {job:8.2f} frames/s   start-up {figures['startup_seconds']:.1f} s apart")
    print(f"job / engine      {figures['ratio']:8.3f}")
    peak = figures["matmul_peak_tflops"]
    print(f"engine            {figures['engine_tflops']:8.3f} TFLOP/s, matrix product peak {peak:.3f} TFLOP/s")


if __name__ == "__main__":
    main()
