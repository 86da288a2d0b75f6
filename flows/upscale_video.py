"""One video in, one verified video out: the main job.

The three stages of each chunk stream through two pools: chunk 0 is being encoded on the `cpu` pool while chunk 1 is on
the `gpu` pool and chunk 2 is being decoded. The result appears at the destination only after it was read back and
compared with the source.

Purpose: any single video, by hand, from a schedule or from `upscale-library`.
Cache policy: none of Prefect's; chunk files in scratch are keyed by content and checked before they are used.
Blocks: none needed. The parameter `pools` can name a block of type Slurm pools or Local pools; pools that are open
around the flow come first.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, cast
from uuid import UUID

from prefect import flow
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows.parameters import UpscaleOptions
from flows.pools import cluster_of_flow_run, pools_of_flow_run, site_of_flow_run
from flows.timeline import draw_timeline
from infra.pools import PoolTaskRunner
from tasks.assemble import assemble
from tasks.calibrate import calibrate, sample
from tasks.chunk_report import StageReport
from tasks.chunks import Chunk
from tasks.encode import encode, is_encoded
from tasks.errors import ChunkFileError, PoolError, SuperResolutionError
from tasks.extract import extract
from tasks.media.ffmpeg import FfmpegError
from tasks.models.weights import content_hash
from tasks.plan import Plan, own_job, plan, save_plan
from tasks.progress import ProgressMeter, tell
from tasks.publish import publish
from tasks.receipt import clear_away, is_published
from tasks.request import check_request
from tasks.stage import stage
from tasks.upscale import upscale
from tasks.verify import verify

#: Attempts at one chunk before the job gives up. Only failures that another attempt can mend are repeated; lost workers
#: are not counted here, the task runner has already repeated those.
CHUNK_ATTEMPTS: Final = 3

#: Chunks that may fail for good before the others are given up too: by then it is not the chunks.
FAILED_CHUNKS: Final = 3

#: Rows of the table of chunks in the UI.
_TABLE_ROWS: Final = 1000

#: Seconds between two looks at the progress, and between two updates of the progress artifact in the UI.
_LOOK_SECONDS: Final = 1.0
_ARTIFACT_SECONDS: Final = 10.0


@dataclass(frozen=True)
class UpscaleResult:
    """What a finished job reports."""

    status: Literal["published"]
    output: str
    job_id: str
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
    not_carried: dict[int, str]
    """Source streams that the result could not hold, and why."""
    damaged_frames: int
    """Frames left out by `--salvage`."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _run_name() -> str:
    """For example `bbb-10s x2 compact`."""
    given = flow_run.parameters
    options = UpscaleOptions.model_validate(given["options"])
    size = f"{options.height} rows" if options.height else f"x{options.scale}"
    return f"{Path(given['source']).stem} {size} {Path(options.model).stem}"


@flow(
    name="upscale-video",
    flow_run_name=_run_name,
    task_runner=PoolTaskRunner(pools_of_flow_run),  # type: ignore[arg-type]
    validate_parameters=True,
)
def upscale_video(source: str, destination: str, options: UpscaleOptions = UpscaleOptions()) -> dict[str, Any]:  # noqa: B008
    """Upscale one video.

    Args:
        source: Path of the video.
        destination: Path of the result; its ending (.mp4, .mov, .mkv) names the container.
        options: Scale, model, encoder and the rest.

    Returns:
        The fields of `UpscaleResult`.

    Raises:
        SuperResolutionError: The request was refused, or the job failed; nothing was published.
    """
    started = time.time()
    logger = get_run_logger()
    request = options.request(stage.fn(source), destination)
    site = site_of_flow_run(options)
    checked = check_request(replace(request, scratch=request.scratch or site.scratch), site.capacity)
    job = plan(checked, content_hash(checked.card))
    logger.info(
        "%s: %d frames %dx%d at %s fps -> %dx%d with %s in %d chunks",
        Path(source).name, job.frames, job.facts.width, job.facts.height, job.table.rate,
        job.target.width, job.target.height, job.card.name, len(job.chunks),
    )  # fmt: skip
    for index, reason in job.carried.left_out.items():
        logger.warning("stream %d is left out: %s", index, reason)
    cluster = cluster_of_flow_run()
    with own_job(job.folder, fresh=options.fresh):
        job = _calibrated(job)
        path = str(save_plan(job))
        reports: list[StageReport] = []
        reused = list(job.chunks)
        if not is_published(job.folder, job.request.destination_path):
            reused = [chunk for chunk in job.chunks if is_encoded(job, chunk)]
            meter = _Meter(job)
            missing = [chunk for chunk in job.chunks if chunk not in reused]
            reports = _run_chunks(job, path, missing, site.capacity.window, meter)
            meter.report("assembling")
            muxed = assemble.submit(path).result()
            meter.report("verifying")
            verify.submit(path, muxed).result()
            meter.report("publishing")
            publish.submit(path).result()
            meter.report("done")
        result = _summarise(job, reports, len(reused), started, cluster.leases.node_seconds(started))
        _show_workers(reports, options.timeline)
        create_markdown_artifact(_report(result), key="result", description=f"Result of {Path(source).name}")
    clear_away(job.folder)
    logger.info("published %s: %d frames, verified", result.output, result.frames_out)
    return result.to_dict()


def _calibrated(job: Plan) -> Plan:
    """With what `int8` needs to know, if that was asked for and is good enough for the video."""
    wanted = job.request.precision == "int8" and job.frames > 1  # One frame has nothing to be tested on.
    if not wanted or is_published(job.folder, job.request.destination_path):
        return job
    path, logger = str(save_plan(job)), get_run_logger()
    sampled = [sample.submit(path)] if job.known_verdict() is None else []
    found = calibrate.submit(path, return_state=False, wait_for=sampled).result()
    if found is None:
        logger.warning("int8 is for CPUs; this job runs on a GPU, in fp16")
        return replace(job, request=replace(job.request, precision="auto"))
    if found.is_good:
        logger.info("int8 keeps %.1f dB against fp32", found.psnr)
    else:
        logger.warning("int8 would keep only %.1f dB against fp32, which is used instead", found.psnr)
    return replace(job, calibrated=found)


class _Meter:
    """Progress to whoever watches: the command line once a second, the UI every few seconds."""

    def __init__(self, job: Plan) -> None:
        self._meter = ProgressMeter(job)
        # Typed as maybe a coroutine; in a flow that is not async it is the identifier.
        self._artifact = cast(UUID, create_progress_artifact(0.0, key="progress", description="Frames upscaled"))
        self._updated = time.monotonic()
        self._looked = 0.0
        self.report("upscaling")

    def report(self, phase: str) -> None:
        if phase == "upscaling" and time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        progress = self._meter.look(phase)
        tell(progress)
        if time.monotonic() - self._updated >= _ARTIFACT_SECONDS or phase == "done":
            self._updated = time.monotonic()
            update_progress_artifact(self._artifact, 100.0 * progress.frames_done / progress.frames_total)


@dataclass
class _ChunkRun:
    """One attempt at one chunk: its three futures, in order."""

    chunk: Chunk
    attempt: int
    futures: tuple[PrefectFuture[StageReport], ...]


def _run_chunks(job: Plan, path: str, chunks: list[Chunk], window: int, meter: _Meter) -> list[StageReport]:
    """Stream chunks through the stages in plan order, at most `window` at a time.

    A chunk that fails for good does not stop the others: what they finish need not be done again.

    Raises:
        SuperResolutionError: A chunk failed for good; carries the error of the first one.
    """
    waiting = deque((chunk, 1) for chunk in chunks)
    settled: queue.SimpleQueue[_ChunkRun] = queue.SimpleQueue()
    reports: list[StageReport] = []
    failures: list[BaseException] = []
    running = 0
    while waiting or running:
        while waiting and running < window:
            _submit(job, path, *waiting.popleft(), settled.put)
            running += 1
        meter.report("upscaling")
        try:
            run = settled.get(timeout=_LOOK_SECONDS)
        except queue.Empty:
            continue
        running -= 1
        failure = _failure(run)
        if failure is None:
            reports += [future.result() for future in run.futures]
        elif run.attempt < CHUNK_ATTEMPTS and isinstance(failure, ChunkFileError | FfmpegError):
            get_run_logger().warning(
                "chunk %d (frames %d-%d), attempt %d: %s",
                run.chunk.index,
                run.chunk.first,
                run.chunk.last,
                run.attempt,
                failure,
            )
            waiting.appendleft((run.chunk, run.attempt + 1))
        else:
            failures.append(_naming(run.chunk, run.attempt, failure))
            get_run_logger().error("chunk %d failed for good: %s", run.chunk.index, failures[-1])
            # What is wrong with the source or the model is wrong for all chunks.
            if not isinstance(failure, PoolError | ChunkFileError | FfmpegError) or len(failures) == FAILED_CHUNKS:
                break
    if failures:
        raise failures[0]
    return reports


def _submit(job: Plan, path: str, chunk: Chunk, attempt: int, settled: Callable[[_ChunkRun], None]) -> None:
    label = f"{chunk.index + 1}/{len(job.chunks)} frames {chunk.first}-{chunk.last}"
    extracted = extract.submit(path, chunk.index, label)
    upscaled = upscale.submit(path, chunk.index, label, return_state=False, wait_for=[extracted])
    encoded = encode.submit(path, chunk.index, label, return_state=False, wait_for=[upscaled])
    run = _ChunkRun(chunk, attempt, (extracted, upscaled, encoded))
    encoded.add_done_callback(lambda _: settled(run))


def _failure(run: _ChunkRun) -> BaseException | None:
    """The error of the first stage that failed; later stages only say that they could not start."""
    for future in run.futures:
        future.wait()
        if not future.state.is_completed():
            outcome = future.state.result(raise_on_failure=False)
            if isinstance(outcome, BaseException):
                return outcome
            return PoolError(f"task run {future.task_run_id} ended {future.state.name}: {future.state.message}")
    return None


def _naming(chunk: Chunk, attempt: int, failure: BaseException) -> BaseException:
    """The chunk's own error if it is one of ours, else one that names the chunk."""
    if isinstance(failure, SuperResolutionError):
        return failure
    named = PoolError(
        f"chunk {chunk.index} (frames {chunk.first}-{chunk.last}) failed after {attempt} attempts: {failure}",
        "Run the same command again to continue from the finished chunks",
    )
    named.__cause__ = failure
    return named


def _summarise(
    job: Plan, reports: list[StageReport], reused: int, started: float, node_seconds: dict[str, float]
) -> UpscaleResult:
    upscaled = [report for report in reports if report.stage == "upscale" and not report.was_reused]
    begun = min((report.started for report in upscaled), default=time.time())
    seconds = time.time() - begun
    frames = sum(job.chunks[report.chunk].frames for report in upscaled)
    return UpscaleResult(
        status="published",
        output=str(job.request.destination_path),
        job_id=job.key,
        folder=str(job.folder),
        frames_in=job.frames + job.damaged_frames,
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
        not_carried=job.carried.left_out,
        damaged_frames=job.damaged_frames,
    )


def _report(result: UpscaleResult) -> str:
    rows = [f"| {name.replace('_', ' ')} | {value} |" for name, value in result.to_dict().items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _show_workers(reports: list[StageReport], picture: str) -> None:
    """Say which worker did what: a table in the UI, and a picture if one was asked for."""
    by_chunk: dict[int, dict[str, Any]] = {}
    for report in sorted(reports, key=lambda report: (report.chunk, report.started)):
        row = by_chunk.setdefault(report.chunk, {"chunk": report.chunk})
        row[report.stage] = f"{report.seconds:.1f} s on {report.where}"
        if report.where.log:
            row[f"{report.stage} log"] = report.where.log
    if by_chunk:
        create_table_artifact(
            list(by_chunk.values())[:_TABLE_ROWS],
            key="chunks",
            description="Who worked on which chunk, and for how long",
        )
    if picture and reports:
        try:
            Path(picture).write_text(draw_timeline(reports))
        except OSError as error:  # The result is published already.
            get_run_logger().warning("the timeline %s cannot be written: %s", picture, error.strerror)
