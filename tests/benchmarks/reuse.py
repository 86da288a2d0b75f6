"""What keeping unchanged parts of pictures saves, on clips made here: time, and that the result is the same.

    python tests/benchmarks/reuse.py [--model compact-x2] [--size 640x360] [--turns 3] [--json]

`cel` is drawn animation as studios make it: still backgrounds, a face of which only the mouth moves, figures on ones,
twos and threes, a pan in which everything moves; coded by x264 at several qualities. `twice` shows each frame of a
film-like clip two times, losslessly coded; `once`, the same with every second frame another by one code value here and
there, is what the job on it is compared with. Engines with and without reuse take turns on each clip.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import ffmpeg as ffmpeg_python
import numpy as np
from PIL import Image, ImageDraw

from tasks.media import ffmpeg
from tasks.media.decode import decode_frames
from tasks.media.probe import probe
from tasks.media.sample import write_sample
from tasks.media.timestamps import scan_packets
from tasks.models.cards import find_model
from tasks.models.engine import Engine

RATE = 24


def cel_animation(size: tuple[int, int], seconds_per_shot: int = 2) -> Iterator[np.ndarray]:
    """uint8 `[h, w, 3]` frames of five shots: a talking face, walks on twos and threes, a run on ones, a pan."""
    width, height = size
    random = np.random.default_rng(5)
    for shot, cadence in enumerate((3, 2, 3, 1, 2)):
        background = _painting(2 * width, height, random)
        for frame in range(seconds_per_shot * RATE):
            pose = frame // cadence
            pan = (4 * frame if shot == 4 else 0) % width
            picture = background.crop((pan, 0, pan + width, height))
            draw = ImageDraw.Draw(picture)
            if shot == 0:
                _figure(draw, width // 2, height // 2, height // 3, mouth=(0.1, 0.4, 0.25, 0.6)[pose % 4])
            else:
                x = int(width * (0.15 + 0.012 * pose) % width)
                y = int(height * (0.55 + 0.03 * np.sin(pose)))
                _figure(draw, x, y, height // 6, mouth=0.2)
                if shot == 2:  # A second one, that moves when the first does not.
                    _figure(draw, width - int(0.01 * width * ((frame + 1) // 3)) % width, y, height // 8, mouth=0.5)
            yield np.asarray(picture)


def _painting(width: int, height: int, random: np.random.Generator) -> Image.Image:
    """A background as it is painted: soft fields of colour with a grain of its own that stands still."""
    fields = random.integers(60, 220, (6, 10, 3)).astype(np.uint8)
    image = Image.fromarray(fields).resize((width, height), Image.Resampling.BICUBIC)
    grain = random.normal(0, 3, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))


def _figure(draw: ImageDraw.ImageDraw, x: int, y: int, radius: int, mouth: float) -> None:
    ink = {"outline": (20, 20, 30), "width": max(2, radius // 20)}
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(240, 205, 170), **ink)
    for side in (-1, 1):
        eye, size = x + side * radius // 3, radius // 7
        draw.ellipse((eye - size, y - radius // 3 - size, eye + size, y - radius // 3 + size), fill="white", **ink)
    wide, open_ = radius // 3, max(1, int(radius * mouth / 2))
    draw.ellipse((x - wide, y + radius // 2 - open_, x + wide, y + radius // 2 + open_), fill=(150, 40, 50), **ink)


def write_cel(path: Path, size: tuple[int, int], crf: int) -> None:
    """`cel_animation`, coded by x264 with its defaults."""
    source = ffmpeg_python.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{size[0]}x{size[1]}", r=RATE)
    tags = source.filter("scale", out_color_matrix="bt709", out_range="tv")
    output = tags.output(ffmpeg.file_argument(path), vcodec="libx264", crf=crf, pix_fmt="yuv420p", colorspace="bt709")
    with ffmpeg.FfmpegProcess(output.get_args(), stdin=True) as process:
        for frame in cel_animation(size):
            process.stdin.write(frame.tobytes())


def write_twice(path: Path, size: tuple[int, int], *, really: bool, loops: int = 3) -> None:
    """The sample clip over and over with each frame two times, or with one of each two slightly another."""
    sample = path.with_name("sample.mp4")
    write_sample(sample)
    video = ffmpeg_python.input(ffmpeg.file_argument(sample), stream_loop=loops).video.filter(
        "scale", *size, flags="bicubic"
    )
    video = video.filter("setpts", "2*N/24/TB").filter("fps", RATE)
    if not really:
        video = video.filter("geq", lum="lum(X,Y)+mod(N,2)*not(mod(X+Y,64))", cb="cb(X,Y)", cr="cr(X,Y)")
    ffmpeg.run(video.output(ffmpeg.file_argument(path), vcodec="libx264", qp=0, pix_fmt="yuv420p").get_args())


def measure_engine(clip: Path, model: str, turns: int) -> dict[str, Any]:
    """Engines with and without reuse on the frames of a clip, in turns."""
    facts = probe(clip)
    table = scan_packets(facts).table
    frames = np.stack(list(decode_frames(facts, table, 0, len(table) - 1)))
    card = find_model(model)
    target = facts.picture.resized(card.scale * facts.width, card.scale * facts.height)
    reusing, plain = (Engine(card, facts.picture, target, reuse=reuse) for reuse in (True, False))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    results = {}
    for _ in range(turns):
        for reuse, engine in ((True, reusing), (False, plain)):
            started = time.perf_counter()
            digest = [part.tobytes() for part in engine.stream([frames])]
            seconds[reuse].append(time.perf_counter() - started)
            results[reuse] = hash(tuple(map(hash, digest)))
    return {
        "frames": len(frames),
        "kept": reusing.work.kept,
        "identical": results[True] == results[False],
        "time_ratio": median(a / b for a, b in zip(seconds[True], seconds[False], strict=True)),
        "fps": len(frames) / median(seconds[True]),
        "fps_without": len(frames) / median(seconds[False]),
    }


def measure_job(clip: Path, model: str, folder: Path) -> float:
    """Frames per second of a whole job, start-up left out."""
    command = [sys.executable, "-m", "flows.cli", "upscale", str(clip), str(folder / "result.mp4"), "--model", model]
    done = subprocess.run([*command, "--overwrite", "--fresh", "--json"], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])["fps"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="compact-x2")
    parser.add_argument("--size", default="640x360")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    columns, rows = map(int, arguments.size.split("x"))
    size = (columns, rows)
    results: dict[str, Any] = {}

    def tell(clip: str, result: dict[str, Any]) -> None:
        results[clip] = result
        if not arguments.json:
            same = "identical" if result["identical"] else "NOT IDENTICAL"
            rates = f"{result['fps']:.2f} against {result['fps_without']:.2f} frames/s"
            print(f"{clip}: {result['kept']:.0%} kept, time x {result['time_ratio']:.2f}, {rates}, {same}", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for crf in (0, 18, 23):
            write_cel(folder / f"cel-{crf}.mp4", size, crf)
            tell(f"cel, crf {crf}", measure_engine(folder / f"cel-{crf}.mp4", arguments.model, arguments.turns))
        for kind in ("twice", "once"):
            write_twice(folder / f"{kind}.mkv", size, really=kind == "twice")
        tell("twice", measure_engine(folder / "twice.mkv", arguments.model, arguments.turns))
        rates = [
            {kind: measure_job(folder / f"{kind}.mkv", arguments.model, folder) for kind in ("twice", "once")}
            for _ in range(arguments.turns)
        ]
        results["twice"]["job_time_ratio"] = median(pair["once"] / pair["twice"] for pair in rates)
    if arguments.json:
        print(json.dumps(results))
    else:
        print(f"twice, whole job: time x {results['twice']['job_time_ratio']:.2f} of that on frames that all differ")


if __name__ == "__main__":
    main()
