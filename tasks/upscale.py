"""Upscale: run the model over one chunk file, the only stage that belongs on a GPU.

Reading and checking the next frames, inference, and checking and writing the last ones overlap through two bounded
queues, so the device waits for neither and memory stays at a few batches. The model is loaded once per worker process
and shared by all its chunks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.chunk_report import StageReport
from tasks.chunks import Chunk
from tasks.errors import FrameError, ModelError
from tasks.media.chunk_file import ChunkReader, ChunkWriter, is_valid
from tasks.media.pixels import PictureFormat
from tasks.models.cards import find_model
from tasks.models.engine import Engine
from tasks.models.quantisation import Quantised
from tasks.models.weights import content_hash
from tasks.plan import Plan, load_plan

#: Batches that may wait for the disk before inference waits for it.
_WRITES_PENDING = 2


@task(name="upscale", task_run_name="upscale {label}", tags={"pool:gpu"}, cache_policy=NO_CACHE)
def upscale(plan: str, index: int, label: str) -> StageReport:
    """Make the upscaled chunk file of chunk `index` of the plan at path `plan`."""
    loaded = load_plan(Path(plan))
    return upscale_chunk(loaded, loaded.chunks[index])


def upscale_chunk(plan: Plan, chunk: Chunk) -> StageReport:
    """Upscale the frames of a chunk and remove its extracted file.

    Raises:
        ChunkFileError: The extracted file is missing or damaged.
        FrameError: The model gave another number of frames.
    """
    started = time.time()
    path = plan.upscaled(chunk)
    if plan.encoded(chunk).exists() or is_valid(path, plan.target, chunk.frames):
        plan.extracted(chunk).unlink(missing_ok=True)
        return StageReport.reused("upscale", chunk.index)
    engine = shared_engine(
        plan.model,
        plan.model_hash,
        plan.facts.picture,
        plan.target,
        plan.precision,
        plan.quantised,
        plan.request.tolerance,
    )
    before = engine.work
    reader = ChunkReader(plan.extracted(chunk))
    with ChunkWriter(path, plan.target) as writer:
        run_engine(engine, reader, writer, chunk.first)
        if len(writer) != chunk.frames:
            frame = chunk.first + len(writer)
            raise FrameError(f"frame {frame} was not upscaled ({len(writer)} of {chunk.frames} frames)", frame=frame)
    plan.extracted(chunk).unlink(missing_ok=True)
    return StageReport(
        "upscale",
        chunk.index,
        started,
        time.time() - started,
        engine=asdict(engine.description),
        bytes=path.stat().st_size,
        kept=(engine.work - before).kept,
    )


def run_engine(engine: Engine, reader: ChunkReader, writer: ChunkWriter, first_frame: int) -> None:
    """Pass all frames of `reader` through `engine` into `writer`, with reading and writing in threads of their own."""
    written: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1, "read") as reading, ThreadPoolExecutor(1, "write") as writing:
        for frames in engine.stream(_read_ahead(reader.batches(engine.feed), reading), first_frame):
            written.append(writing.submit(writer.write, frames))
            if len(written) > _WRITES_PENDING:
                written.popleft().result()
        for write in written:
            write.result()


def _read_ahead(batches: Iterator[NDArray[np.uint8]], reading: ThreadPoolExecutor) -> Iterator[NDArray[np.uint8]]:
    ahead = reading.submit(next, batches, None)
    while (frames := ahead.result()) is not None:
        ahead = reading.submit(next, batches, None)
        yield frames


@lru_cache(maxsize=1)
def shared_engine(
    model: str,
    model_hash: str,
    source: PictureFormat,
    target: PictureFormat,
    precision: str,
    quantised: Path | None,
    tolerance: int,
) -> Engine:
    """The engine of this worker process; another model, picture size or precision replaces it.

    Raises:
        ModelError: The weights on this node are not those the job was planned with.
    """
    card = find_model(model)
    if content_hash(card) != model_hash:
        raise ModelError(
            f"the weights of {model} on this node differ from those of the plan", "Use one model folder for all nodes"
        )
    in_bytes = Quantised.load(quantised) if quantised else None
    return Engine(card, source, target, precision=precision, quantised=in_bytes, tolerance=tolerance)
