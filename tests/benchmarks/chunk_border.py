"""How long the device waits between two chunks, with the real engine on a worker process of this machine.

    python -m tests.benchmarks.chunk_border [--chunks 12] [--size 160x96] [--json]

All chunks are extracted beforehand, so the next one is always ready; the flow only upscales. The worker notes when each
frame (on a GPU each batch) is computed, and a wait is what lies between the end of the last one of a chunk and the
begin of the first one of the next; below zero where they are computed side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # As the command line does, before Prefect is imported.

from prefect import flow

from infra.pools import LocalWorker, Pool, PoolTaskRunner, open_pools
from infra.pools.pool import cuda_devices, inference_settings
from tasks.chunk_report import StageReport
from tasks.cores import usable_cores
from tasks.extract import extract_chunk
from tasks.models.cards import find_model
from tasks.models.engine import Engine
from tasks.models.weights import content_hash
from tasks.plan import load_plan, make_plan, save_plan
from tasks.request import UpscaleRequest, check_request
from tasks.upscale import upscale
from tests.benchmarks.pool_overhead import await_workers, private_api
from tests.flows.jobs import GROUP, make_film

MODULE: Final = "tests.benchmarks.chunk_border"

#: In a worker, the file to note computations in.
NOTES: Final = "CHUNK_BORDER_NOTES"


def _note_computations(path: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noting(name: str, frame_of: int) -> None:
        method = getattr(Engine, name)

        @wraps(method)
        def noted(*arguments: Any, **named: Any) -> Any:
            started = time.time()
            try:
                return method(*arguments, **named)
            finally:
                os.write(file, f"{arguments[frame_of]} {started!r} {time.time()!r}\n".encode())

        setattr(Engine, name, noted)

    noting("_upscale_on_cpu", 2)
    noting("_upscale_batch", 2)


if NOTES in os.environ:
    _note_computations(os.environ[NOTES])


@flow(name="chunk-border", task_runner=PoolTaskRunner())
def upscale_all(path: str, chunks: int) -> list[StageReport]:
    """Upscale all chunks of a plan."""
    return [future.result() for future in [upscale.submit(path, index, str(index)) for index in range(chunks)]]


def measure(chunks: int, size: str) -> dict[str, Any]:
    """One run."""
    with tempfile.TemporaryDirectory(prefix="chunk-border-") as name:
        folder = Path(name)
        film = make_film(folder / "film.mp4", chunks * GROUP, size, sound=())
        request = UpscaleRequest(
            str(film), str(folder / "out.mp4"), scale=2, chunk_seconds=1.0, scratch=str(folder / "scratch")
        )
        checked = check_request(request)
        plan = make_plan(checked, content_hash(find_model(checked.card.name)))
        plan.folder.mkdir(parents=True)
        path = save_plan(plan)
        for chunk in load_plan(path).chunks:
            extract_chunk(plan, chunk)
        env = {**inference_settings(usable_cores()), NOTES: str(folder / "notes")}
        start = LocalWorker(env=env, devices=cuda_devices(), imports=("infra.pools.remote", MODULE))
        with private_api(folder), open_pools([Pool("gpu", minimum=1, start=start)], warm=True) as cluster:
            await_workers(cluster, 1)
            reports = upscale_all(str(path), len(plan.chunks))
        notes = [tuple(map(float, line.split())) for line in (folder / "notes").read_text().splitlines()]
    spans = []
    for chunk in plan.chunks:
        own = [(begin, end) for frame, begin, end in notes if chunk.first <= frame <= chunk.last]
        spans.append((min(begin for begin, _ in own), max(end for _, end in own)))
    waits = sorted(1000 * (after[0] - before[1]) for before, after in pairwise(spans))
    return {
        "chunks": len(spans),
        "size": size,
        "device": reports[0].engine["device"] if reports[0].engine else "",
        "chunk_seconds": statistics.median(end - begin for begin, end in spans),
        "wait_ms": {"median": statistics.median(waits), "p90": waits[int(0.9 * (len(waits) - 1))], "most": waits[-1]},
        "seconds": spans[-1][1] - spans[0][0],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="How long the device waits between two chunks.")
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--size", default="160x96", help="of the clip; the chunks have 24 frames")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.chunks, arguments.size)
    if arguments.json:
        print(json.dumps(result))
        return
    wait = result["wait_ms"]
    print(f"{result['chunks']} chunks of {result['chunk_seconds']:.2f} s on {result['device']}")
    print(f"wait between chunks: median {wait['median']:.1f} ms, p90 {wait['p90']:.1f} ms, most {wait['most']:.1f} ms")


if __name__ == "__main__":
    main()
