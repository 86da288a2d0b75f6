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

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_link_artifact
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from blocks.site import load_store, load_tracking
from flows.artifacts import shown
from flows.artifacts.comparison import Comparison
from flows.artifacts.progress import Meter, ProgressShown
from flows.artifacts.report import Story, remedy_of, show_failure, show_result
from flows.artifacts.timeline import draw_timeline
from flows.chunk_runs import FinishedChunk, run_chunks, watch_transfer
from flows.outcome import UpscaleResult, summarise
from flows.parameters import Destination, UpscaleOptions
from flows.parameters import Source as SourceName
from flows.pools import cluster_of_flow_run, pools_of_flow_run, site_of_flow_run
from flows.records import await_predecessor, end_record, has_result, name_record, new_job
from flows.staging import reachable
from flows.stopping import Pausing, RunCancelled, cancelled, result_of_task, watched
from infra.pools import PoolTaskRunner
from tasks.assemble import assemble
from tasks.calibrate import calibrate, sample
from tasks.chunk_report import StageReport
from tasks.destinations import Output, destination_of
from tasks.encode import is_encoded
from tasks.errors import FrameError, SourceError, StoreError, SuperResolutionError
from tasks.ledger import open_ledger
from tasks.ledger.ledger import DoneBeforeError
from tasks.ledger.record import JobRecord, JobState
from tasks.metrics import open_metrics
from tasks.models.weights import content_hash
from tasks.plan import Plan, plan, save_plan
from tasks.progress import STAGING, TransferNote, tell
from tasks.publish import publish
from tasks.receipt import clear_away, find_published, published
from tasks.request import UpscaleRequest, check_request, check_scratch, check_settings, scratch_folder
from tasks.scratch import note_job, own_job
from tasks.stage import Source, look_at, staging_note
from tasks.store.address import uri_of
from tasks.store.settings import StoreSettings
from tasks.track import JobTracker, describe, tracked
from tasks.verify import verify


def _run_name() -> str:
    """For example `bbb-10s x2 compact`."""
    given = flow_run.parameters
    options = UpscaleOptions.model_validate(given["options"])
    size = f"{options.height} rows" if options.height else f"x{options.scale}"
    return f"{Path(given['source']).stem} {size} {Path(options.weights or options.model).stem}"


@flow(
    name="upscale-video",
    flow_run_name=_run_name,
    task_runner=PoolTaskRunner(pools_of_flow_run),  # type: ignore[arg-type]
    validate_parameters=True,
    on_cancellation=[end_record],
    on_crashed=[end_record],
)
def upscale_video(
    source: SourceName,
    destination: Destination,
    options: UpscaleOptions = UpscaleOptions(),  # noqa: B008
) -> dict[str, Any]:
    """Upscale one video.

    Args:
        source: Path or `s3://` URI of the video.
        destination: Path or `s3://` URI of the result; its ending (.mp4, .mov, .mkv) names the container. One that ends
            in a slash is a folder, in which the result is named as the source.
        options: Scale, model, encoder and the rest.

    Returns:
        The fields of `UpscaleResult`.

    Raises:
        SuperResolutionError: The request was refused, or the job failed; nothing was published.
    """
    run_id = str(flow_run.get_id() or "")
    try:
        with watched(run_id):
            return _upscale(source, destination, options, run_id)
    except RunCancelled:
        return cancelled("the run was cancelled", "Run it again to continue from the finished chunks")


def _upscale(source: str, destination: str, options: UpscaleOptions, run_id: str) -> dict[str, Any]:
    """Do the job with a record, or find that it is done."""
    started = time.time()
    store, tracking = load_store(options.store), load_tracking(options.ledger)
    ledger = open_ledger(tracking.ledger)
    request = options.request(source, destination)
    seen, refusal = _seen(source, store)
    new = new_job(seen, request, options.owner, store)
    link = f"{tracking.portal}/jobs/{new.job_id}/result" if tracking.portal else ""
    name_record(run_id, new.job_id, options.ledger)
    if flow_run.get_run_count() > 1:
        await_predecessor(ledger, new.job_id, run_id)

    def is_done(record: JobRecord) -> bool:
        return not (options.overwrite or options.fresh) and has_result(record, store)

    try:
        with tracked(ledger, open_metrics(tracking.metrics), new, flow_run_id=run_id, is_done=is_done) as tracker:
            story = Story(seen.uri)
            with _failure_shown(story, tracker):
                if refusal is not None:
                    raise refusal
                result = _run(seen, request, options, store, tracker, started, story, link).to_dict()
    except DoneBeforeError as done:
        result = {**done.record.result, "skipped": True}
        get_run_logger().info("%s has been upscaled with these settings: %s", source, result["output"])
    if link:
        with shown("the link"):
            create_link_artifact(link, "Result, for the owner", key="link")
    return result


@contextmanager
def _failure_shown(story: Story, tracker: JobTracker) -> Iterator[None]:
    """Show why a run failed, and let it fail."""
    try:
        yield
    except Exception as error:
        show_failure(story, describe(error, str(tracker.record.state)), remedy_of(error))
        raise


def _seen(source: str, store: StoreSettings) -> tuple[Source, SuperResolutionError | None]:
    """The source; one that is not there has no version, and the error says why."""
    try:
        return look_at(source, store), None
    except (SourceError, StoreError) as refusal:
        return Source(uri_of(source), "", 0), refusal


def _run(
    source: Source,
    request: UpscaleRequest,
    options: UpscaleOptions,
    store: StoreSettings,
    tracker: JobTracker,
    started: float,
    story: Story,
    link: str,
) -> UpscaleResult:
    logger = get_run_logger()
    site = site_of_flow_run(options)
    scratch = scratch_folder(request.scratch or site.scratch)
    request = replace(request, scratch=str(scratch))
    check_settings(request, store)
    check_scratch(scratch)
    progress = ProgressShown(cluster_of_flow_run)
    with _staged(source, request, store, tracker, progress) as path:
        checked = check_request(replace(request, source=path), site.capacity, store)
        job = plan(checked, content_hash(checked.card))
        logger.info(
            "%s: %d frames %dx%d at %s fps -> %dx%d with %s in %d chunks",
            Path(source.uri).name, job.frames, job.facts.width, job.facts.height, job.table.rate,
            job.target.width, job.target.height, job.card.name, len(job.chunks),
        )  # fmt: skip
        for note in job.notes:
            logger.warning("%s: %s", Path(source.uri).name, note)
        for index, reason in job.carried.left_out.items():
            logger.warning("stream %d is left out: %s", index, reason)
        tracker.note(
            probe=job.facts.to_dict(),
            model=job.card.name,
            model_hash=job.model_hash,
            work_folder=str(job.folder),
            frames_total=job.frames,
        )
        story.job, cluster = job, cluster_of_flow_run()
        with _cleared_if_in_vain(job.folder, story), own_job(job.folder, fresh=options.fresh):
            note_job(job.folder, tracker.record.job_id)
            story.job = job = _calibrated(job)
            path = str(save_plan(job))
            reused = list(job.chunks)
            output = published(job.folder, job.destination)
            if output is None:
                reused = [chunk for chunk in job.chunks if is_encoded(job, chunk)]
                if reused:
                    logger.info("%d chunks were finished by an earlier run", len(reused))
                meter = Meter(job, tracker, progress)
                # A picture costs a task: more than a video of less than a second takes altogether.
                comparison = Comparison(job, path, wanted=options.pictures and job.frames >= job.table.rate)

                def finished(done: FinishedChunk) -> None:
                    story.finished.append(done)
                    comparison.encoded(done.chunk)

                missing = [chunk for chunk in job.chunks if chunk not in reused]
                run_chunks(job, path, missing, site.capacity.window, meter, tracker, finished, comparison.look)
                output, found = _finish(job, path, source, meter, tracker)
                for note in found:
                    logger.warning("%s: %s", Path(source.uri).name, note)
                job = replace(job, notes=(*job.notes, *found))
                comparison.look()
                meter.report("done")
            node_seconds = cluster.leases.node_seconds(started)
            result = summarise(
                job,
                output,
                tracker.record.job_id,
                story.finished,
                len(reused),
                started,
                node_seconds,
                site.cost(node_seconds),
            )
            tracker.publish(
                output,
                frames_done=job.frames,
                node_seconds=node_seconds,
                cost=result.cost,
                result=result.to_dict(),
            )
            show_result(story, result, output, link)
            _write_timeline(story.reports, options.timeline)
        clear_away(job.folder)
    logger.info("published %s: %d frames, verified", result.output, result.frames_out)
    return result


@contextmanager
def _cleared_if_in_vain(folder: Path, story: Story) -> Iterator[None]:
    """Keep no chunks of a source with which another attempt would fail too."""
    try:
        yield
    except (SourceError, FrameError):
        clear_away(folder)
        story.is_cleared = True
        raise


@contextmanager
def _staged(
    source: Source, request: UpscaleRequest, store: StoreSettings, tracker: JobTracker, progress: ProgressShown
) -> Iterator[str]:
    """Have the source where all workers can read it while the block runs.

    Yields:
        Its path.
    """
    tracker.reach(JobState.STAGING)
    scratch = Path(request.scratch or "")
    if source.is_stored:
        destination = destination_of(request.destination, store)
        destination.check(None, overwrite=request.overwrite or find_published(scratch, destination))
    began = time.monotonic()

    def told(done: int, total: int) -> None:
        staging = replace(STAGING, bytes_done=done, bytes_total=total)
        tell(staging)
        progress.show(staging)

    def staged(future: PrefectFuture[Any]) -> str:
        watch_transfer(future, TransferNote(staging_note(source, scratch)), told)
        path = str(future.result())
        tracker.phase_took("stage", time.monotonic() - began)
        return path

    with reachable(source, scratch, store, tracker.record.job_id, staged) as path:
        yield path


def _finish(job: Plan, path: str, source: Source, meter: Meter, tracker: JobTracker) -> tuple[Output, tuple[str, ...]]:
    """Assemble, verify and publish; a pause comes before it, or before the result is published.

    Returns:
        Where the result is, and what came up on the way.
    """
    tracker.reach(JobState.ENCODING)
    pausing = Pausing()
    pausing.rest(lambda: meter.report("paused"))
    began = time.monotonic()
    meter.report("assembling")
    muxed = result_of_task(assemble.submit(path))
    tracker.phase_took("assemble", (assembled := time.monotonic()) - began)
    tracker.reach(JobState.VERIFYING)
    meter.report("verifying")
    result_of_task(verify.submit(path, muxed))
    tracker.phase_took("verify", (verified := time.monotonic()) - assembled)
    pausing.rest(lambda: meter.report("paused"))
    meter.report("publishing")
    record = tracker.record
    notes = {"source": source.uri, "source-version": source.version, "job": record.job_id}
    future = publish.submit(path, {**notes, "model": job.card.name, "model-hash": job.model_hash})
    watch_transfer(future, TransferNote(job.publishing), meter.transferred)
    output = future.result()
    tracker.phase_took("publish", time.monotonic() - verified)
    return output, muxed.notes


def _calibrated(job: Plan) -> Plan:
    """With what `int8` needs to know, if that was asked for and is good enough for the video."""
    wanted = job.request.precision == "int8" and job.frames > 1  # One frame has nothing to be tested on.
    if not wanted or published(job.folder, job.destination):
        return job
    path, logger = str(save_plan(job)), get_run_logger()
    sampled = [sample.submit(path)] if job.known_verdict() is None else []
    found = result_of_task(calibrate.submit(path, return_state=False, wait_for=sampled))
    if found is None:
        logger.warning("int8 is for CPUs; this job runs on a GPU, in fp16")
        return replace(job, request=replace(job.request, precision="auto"))
    if found.is_good:
        logger.info("int8 keeps %.1f dB against fp32", found.psnr)
    else:
        logger.warning("int8 would keep only %.1f dB against fp32, which is used instead", found.psnr)
    return replace(job, calibrated=found)


def _write_timeline(reports: list[StageReport], picture: str) -> None:
    """Write the picture of who did what, if one was asked for."""
    if picture and reports:
        try:
            Path(picture).write_text(draw_timeline(reports))
        except OSError as error:  # The result is published already.
            get_run_logger().warning("the timeline %s cannot be written: %s", picture, error.strerror)
