"""Extract: decode the frames of one chunk into a chunk file."""

from __future__ import annotations

import time
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.chunk_report import StageReport
from tasks.chunks import Chunk
from tasks.cores import usable_cores
from tasks.errors import ChunkFileError
from tasks.failures import at
from tasks.media.chunk_file import ChunkWriter, is_valid
from tasks.media.decode import decode_frames
from tasks.plan import Plan, load_plan


@task(name="extract", task_run_name="extract {label}", tags={"pool:cpu"}, cache_policy=NO_CACHE)
def extract(plan: str, index: int, label: str) -> StageReport:
    """Make the extracted chunk file of chunk `index` of the plan at path `plan`, unless a later stage is done."""
    loaded = load_plan(Path(plan))
    with at("extract", chunk := loaded.chunks[index]):
        return extract_chunk(loaded, chunk)


def extract_chunk(plan: Plan, chunk: Chunk) -> StageReport:
    """Decode the frames of a chunk.

    Raises:
        FrameError: A frame does not decode.
    """
    started = time.time()
    path = plan.extracted(chunk)
    if (
        plan.encoded(chunk).exists()
        or plan.upscaled(chunk).exists()
        or is_valid(path, plan.facts.picture, chunk.frames)
    ):
        return StageReport.reused("extract", chunk.index)
    with ChunkWriter(path, plan.facts.picture) as writer:
        for frame in decode_frames(plan.facts, plan.table, chunk.first, chunk.last, threads=usable_cores()):
            writer.write(frame[None])
        if len(writer) != chunk.frames:
            raise ChunkFileError(
                f"{path}: {len(writer)} of {chunk.frames} frames were decoded", "Run the same command again"
            )
    return StageReport("extract", chunk.index, started, time.time() - started, bytes=path.stat().st_size)
