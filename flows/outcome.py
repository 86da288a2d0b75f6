"""What a finished job reports."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from flows.chunk_runs import FinishedChunk
from tasks.destinations import Output
from tasks.plan import Plan


@dataclass(frozen=True)
class UpscaleResult:
    """What a finished job reports."""

    status: Literal["published"]
    output: str
    job_id: str
    """Of its record in the ledger."""
    folder: str
    """The job's folder in scratch."""
    frames_in: int
    frames_out: int
    width: int
    height: int
    seconds: float
    """Wall time from the first chunk reaching the model to publication."""
    flow_started: float
    """When the flow began, seconds since the epoch."""
    startup_seconds: float
    """Wall time from the flow's start to the first chunk reaching the model."""
    fps: float
    """Frames upscaled by this run per second of `seconds`."""
    chunks: int
    chunks_reused: int
    """Chunks that an earlier, interrupted run had finished."""
    model: str
    encoder: str
    engine: dict[str, Any]
    int8_psnr: float | None
    """What `int8` keeps against `fp32` on frames of this video, in dB, if it was asked for."""
    kept: float
    """Share of the picture that was not computed, because nothing within reach of the model had changed."""
    verified: bool
    node_seconds: dict[str, float]
    """Seconds that workers of each pool held their nodes, since the flow began."""
    cost: float | None
    """What these seconds cost, if the pools say what an hour does."""
    not_carried: dict[int, str]
    """Source streams that the result could not hold, and why."""
    damaged_frames: int
    """Frames left out by `--salvage`."""
    notes: list[str]
    """How the source was treated where that is not as it is: fields, pixel layouts, ranges."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise(
    job: Plan,
    output: Output,
    job_id: str,
    finished: Sequence[FinishedChunk],
    reused: int,
    started: float,
    node_seconds: dict[str, float],
    cost: float | None,
) -> UpscaleResult:
    """Put together what a job reports.

    Args:
        job: The job.
        output: Where the result is.
        job_id: Of its record.
        finished: The chunks of this run.
        reused: How many chunks an earlier run had finished.
        started: When the flow began, seconds since the epoch.
        node_seconds: Seconds that workers of each pool held their nodes.
        cost: Of these.
    """
    reports = [report for chunk in finished for report in chunk.reports]
    upscaled = [report for report in reports if report.stage == "upscale" and not report.was_reused]
    begun = min((report.started for report in upscaled), default=time.time())
    seconds = time.time() - begun
    frames = sum(job.chunks[report.chunk].frames for report in upscaled)
    return UpscaleResult(
        status="published",
        output=output.uri,
        job_id=job_id,
        folder=str(job.folder),
        frames_in=len(job.table.stream_pts) + job.damaged_frames,
        frames_out=job.frames,
        width=job.target.width,
        height=job.target.height,
        seconds=round(seconds, 3),
        flow_started=started,
        startup_seconds=round(begun - started, 3),
        fps=round(frames / seconds, 3) if seconds and frames else 0.0,
        chunks=len(job.chunks),
        chunks_reused=reused,
        model=job.card.name,
        encoder=job.profile.name,
        engine=next((report.engine for report in upscaled if report.engine), {}),
        int8_psnr=round(job.calibrated.psnr, 2) if job.calibrated else None,
        kept=round(sum(report.kept * job.chunks[report.chunk].frames for report in upscaled) / max(1, frames), 4),
        verified=True,
        node_seconds=node_seconds,
        cost=cost,
        not_carried=job.carried.left_out,
        damaged_frames=job.damaged_frames,
        notes=list(job.notes),
    )
