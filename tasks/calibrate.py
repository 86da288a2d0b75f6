"""Calibrate: decide whether the model may be computed in bytes for this video.

Two short tasks before the first chunk of a job that asks for `int8`: one decodes a few frames from all over the video,
the other, where the model runs, brings it into bytes and tests it on them. What they find is kept in the job's folder.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Final

import numpy as np
import xxhash
from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.cores import usable_cores
from tasks.media.chunk_file import ChunkReader, ChunkWriter
from tasks.media.decode import decode_frames
from tasks.models import calibration
from tasks.models.calibration import Verdict
from tasks.plan import Plan, load_plan

#: Frames that are looked at; every third one only tests what the others taught.
SAMPLE_FRAMES: Final = 9


@task(name="sample", task_run_name="sample", tags={"pool:cpu"}, cache_policy=NO_CACHE)
def sample(plan: str) -> None:
    """Decode some frames from all over the video of the plan at path `plan`."""
    sample_frames(load_plan(Path(plan)))


@task(name="calibrate", task_run_name="calibrate", tags={"pool:gpu"}, cache_policy=NO_CACHE)
def calibrate(plan: str) -> Verdict | None:
    """Calibrate the model on the sample; `None` where there is a GPU, which has better precisions."""
    return calibrate_job(load_plan(Path(plan)))


def sample_frames(plan: Plan) -> None:
    """Write the sample.

    Raises:
        FrameError: A frame does not decode.
    """
    count = min(SAMPLE_FRAMES, plan.frames)
    with ChunkWriter(plan.sample, plan.facts.picture) as writer:
        for i in range(count):
            index = (2 * i + 1) * plan.frames // (2 * count)
            for frame in decode_frames(plan.facts, plan.table, index, index, threads=usable_cores()):
                writer.write(frame[None])


def calibrate_job(plan: Plan) -> Verdict | None:
    """Bring the network into bytes, test it, and remove the sample.

    Raises:
        ChunkFileError: The sample is missing or damaged.
    """
    import torch

    if torch.cuda.is_available():
        return None
    if (known := plan.known_verdict()) is not None:
        return known
    frames = np.concatenate(list(ChunkReader(plan.sample).batches(1)))
    quantised, psnr = calibration.calibrate(plan.card, plan.facts.picture, plan.target, frames)
    partial = plan.verdict.with_suffix(".partial")
    quantised.save(partial)
    verdict = Verdict(psnr, f"int8-{xxhash.xxh3_128_hexdigest(partial.read_bytes())[:16]}.safetensors")
    os.replace(partial, plan.folder / verdict.file)
    partial.write_text(json.dumps(asdict(verdict)))
    os.replace(partial, plan.verdict)
    plan.sample.unlink()
    return verdict
