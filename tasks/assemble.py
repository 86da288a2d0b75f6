"""Assemble: join the encoded chunks with the other streams of the source into one file in scratch."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.errors import VerificationError
from tasks.failures import at
from tasks.media.encoders import read_encoded
from tasks.media.mux import MuxReport, mux
from tasks.plan import Plan, load_plan


@task(name="assemble", task_run_name="assemble", tags={"pool:cpu"}, cache_policy=NO_CACHE)
def assemble(plan: str) -> MuxReport:
    """Write the result of the plan at path `plan` into the job's folder."""
    with at("assemble"):
        return assemble_result(load_plan(Path(plan)))


def assemble_result(plan: Plan) -> MuxReport:
    """Join all chunks.

    Raises:
        VerificationError: A chunk is missing or damaged.
    """
    for chunk in plan.chunks:
        if read_encoded(plan.encoded(chunk), chunk.frames) is None:
            raise VerificationError(
                f"chunk {chunk.index} (frames {chunk.first}-{chunk.last}) is missing or damaged",
                "Run the same command again",
            )
    chunks = [plan.encoded(chunk) for chunk in plan.chunks]
    said = plan.sample_aspect_ratio if plan.profile.shapeless else None
    return mux(plan.facts, plan.table, chunks, plan.carried, plan.result, plan.muxer, said)
