"""Encode: turn one upscaled chunk file into closed groups of pictures, and check that they decode to what they should.

Each decoded frame is compared with its source, decoded anew: what any stage before may have confused shows here. What
was found goes into the manifest of the chunk, and `verify` judges it.
"""

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
from tasks.media.chunk_file import remove_leftover
from tasks.media.closeness import Closeness
from tasks.media.decode import decode_frames
from tasks.media.encoders import encode_chunk, read_encoded
from tasks.plan import Plan, load_plan


@task(name="encode", task_run_name="encode {label}", tags={"pool:cpu"}, cache_policy=NO_CACHE)
def encode(plan: str, index: int, label: str) -> StageReport:
    """Make the encoded chunk `index` of the plan at path `plan`."""
    loaded = load_plan(Path(plan))
    with at("encode", chunk := loaded.chunks[index]):
        return encode_upscaled(loaded, chunk)


def encode_upscaled(plan: Plan, chunk: Chunk) -> StageReport:
    """Encode a chunk and remove its upscaled file.

    Raises:
        ChunkFileError: The upscaled file is missing or damaged; it is removed, so that the next attempt makes it anew.
        FrameError: A frame did not survive encoding.
        FfmpegError: ffmpeg was killed or failed.
    """
    started = time.time()
    path, source = plan.encoded(chunk), plan.upscaled(chunk)
    manifest = read_encoded(path, chunk.frames)
    if manifest is None:
        try:
            frames = decode_frames(plan.facts, plan.table, chunk.first, chunk.last, threads=usable_cores())
            manifest = encode_chunk(
                source,
                path,
                plan.profile,
                rate=plan.table.rate,
                sample_aspect_ratio=plan.sample_aspect_ratio,
                first_frame=chunk.first,
                concurrency=usable_cores(),
                closeness=Closeness.to(frames, plan.facts.picture),
            )
        except ChunkFileError:
            source.unlink(missing_ok=True)
            raise
        report = StageReport("encode", chunk.index, started, time.time() - started, bytes=manifest.bytes)
    else:
        report = StageReport.reused("encode", chunk.index)
    source.unlink(missing_ok=True)
    for leftover in plan.unfinished(chunk):  # Of workers that were lost; nobody works on this chunk any more.
        remove_leftover(leftover)
    return report


def is_encoded(plan: Plan, chunk: Chunk) -> bool:
    """Whether an earlier attempt finished this chunk."""
    return read_encoded(plan.encoded(chunk), chunk.frames) is not None
