"""Excerpts of one video through several models, side by side on the pools: the work of a preview.

A flow of its own, so that its pools are closed when the pictures are there: nothing is held while people look at them.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash
from prefect import flow
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from blocks.site import load_store
from flows.forecast import earlier_jobs, forecast
from flows.parameters import PreviewOptions
from flows.pools import Site, pools_of_flow_run, site_of_flow_run
from flows.preview_checks import check_folder, check_models, pictures_folder
from flows.staging import reachable
from flows.stopping import result_of_task
from infra.pools import PoolTaskRunner
from tasks.chunk_report import StageReport
from tasks.chunks import Chunk
from tasks.errors import DestinationError
from tasks.extract import extract
from tasks.models.weights import content_hash
from tasks.plan import Plan, make_plan, save_plan
from tasks.preview import choose, compare
from tasks.request import check_room, check_scratch, scratch_folder
from tasks.scratch import give_up, own_job
from tasks.stage import Source, look_at
from tasks.upscale import upscale


@flow(
    name="preview-excerpts",
    flow_run_name="{source}",
    task_runner=PoolTaskRunner(pools_of_flow_run),  # type: ignore[arg-type]
    validate_parameters=True,
)
def compare_models(source: str, options: PreviewOptions) -> dict[str, Any]:
    """Upscale excerpts of a video with each model, and make the pictures that compare them.

    Args:
        source: Path or `s3://` URI of the video.
        options: Which models, how many excerpts, and where.

    Returns:
        What `preview` returns.

    Raises:
        SuperResolutionError: The request was refused, or an excerpt failed.
    """
    store, site = load_store(options.store), site_of_flow_run(options)
    seen = look_at(source, store)
    scratch = scratch_folder(options.scratch or site.scratch)
    folder = pictures_folder(options, Path(seen.uri).stem, str(flow_run.get_id() or ""))
    check_folder(folder)
    check_scratch(scratch)
    with reachable(seen, scratch, store, str(flow_run.get_id() or "")) as path:
        jobs = [
            make_plan(checked, content_hash(checked.card))
            for checked in check_models(path, options, site.capacity, store, str(scratch))
        ]
        return _compare(seen, jobs, options, site, folder)


def _compare(source: Source, jobs: list[Plan], options: PreviewOptions, site: Site, folder: Path) -> dict[str, Any]:
    logger, rate = get_run_logger(), float(jobs[0].table.rate)
    frames = max(1, round(options.seconds * rate))
    _check_room(jobs, options.excerpts * min(frames, jobs[0].frames))
    with ExitStack() as stack:
        for job in (small := [_of_excerpts(job) for job in jobs]):
            stack.callback(give_up, job.folder)
            stack.enter_context(own_job(job.folder))
        chosen = result_of_task(choose.submit(str(save_plan(small[0])), options.excerpts, frames))
        chunks = tuple(Chunk(index, first, last) for index, (first, last) in enumerate(chosen))
        logger.info(
            "%s: excerpts %s", Path(source.uri).name, ", ".join(f"{chunk.first}-{chunk.last}" for chunk in chunks)
        )
        small = [replace(job, chunks=chunks) for job in small]
        paths = [str(save_plan(job)) for job in small]
        speeds = _upscale_all(small, paths)
        pictures = _pictures(paths, chunks, options.frames, folder, Path(source.uri).stem)
    earlier = earlier_jobs(options.ledger, options.owner)
    models = []
    for job, speed in zip(jobs, speeds, strict=True):
        expected = forecast(job, site, earlier, (1 / speed.frames_per_second, speed.device))
        models.append(
            {
                "model": job.card.name,
                "frames_per_second": round(speed.frames_per_second, 3),
                "wall_seconds": round(expected.wall_seconds, 1),
                "gpu_seconds": round(expected.gpu_seconds, 1),
                "cost": expected.cost,
                "basis": expected.basis,
            }
        )
    return {
        "source": source.uri,
        "frames": jobs[0].frames,
        "width": jobs[0].target.width,
        "height": jobs[0].target.height,
        "excerpts": [
            {
                "first": chunk.first,
                "last": chunk.last,
                "start_seconds": round(jobs[0].table.seconds(chunk.first) - jobs[0].table.seconds(0), 3),
            }
            for chunk in chunks
        ],
        "models": models,
        "pictures": pictures,
    }


def _of_excerpts(job: Plan) -> Plan:
    """The same plan with a folder of its own: excerpts are no chunks of the job, and nobody else waits for them."""
    key = xxhash.xxh3_128_hexdigest(f"{job.key}\npreview\n{flow_run.get_id()}".encode())[:16]
    return replace(job, key=key, folder=job.folder.with_name(key))


def _check_room(jobs: Sequence[Plan], frames: int) -> None:
    """Refuse excerpts for which scratch has no room: all of them lie there raw, for all models.

    Raises:
        ScratchError: How much is missing.
    """
    scratch = jobs[0].folder.parent
    needed = len(jobs) * frames * (jobs[0].facts.picture.frame_bytes + jobs[0].target.frame_bytes)
    check_room(scratch, needed, "the excerpts need", "or ask for fewer or shorter excerpts")


@dataclass(frozen=True)
class _Speed:
    """How fast a model is."""

    frames_per_second: float
    """Of one device, without loading."""
    device: str


def _upscale_all(jobs: Sequence[Plan], paths: Sequence[str]) -> list[_Speed]:
    """Decode and upscale all excerpts, model by model.

    Returns:
        How fast each model was.
    """
    runs: list[list[tuple[PrefectFuture[StageReport], PrefectFuture[StageReport]]]] = []
    try:
        for job, path in zip(jobs, paths, strict=True):
            runs.append([])
            for chunk in job.chunks:
                label = f"{job.card.name} frames {chunk.first}-{chunk.last}"
                extracted = extract.submit(path, chunk.index, label)
                upscaled = upscale.submit(path, chunk.index, label, return_state=False, wait_for=[extracted])
                runs[-1].append((extracted, upscaled))
        speeds = []
        for job, futures in zip(jobs, runs, strict=True):
            # The first that failed has the error; what waits for it only says that it could not start.
            reports = [(result_of_task(extracted), result_of_task(upscaled))[1] for extracted, upscaled in futures]
            speeds.append(_speed(job, reports))
        return speeds
    except Exception:
        for future in (future for pairs in runs for pair in pairs for future in pair):
            future.wait()  # What still runs writes into a folder that is about to be removed.
        raise


def _speed(job: Plan, reports: Sequence[StageReport]) -> _Speed:
    """Speed in the excerpts, but for the first one of each worker, if there are others: a device gets ready in it."""
    warm, begun = [], set()
    for report in sorted(reports, key=lambda report: report.started):
        worker = (report.where.node, report.where.process)
        warm += [report] if worker in begun else []
        begun.add(worker)
    counted = warm or reports
    frames = sum(job.chunks[report.chunk].frames for report in counted)
    seconds = max(1e-6, sum(report.device_seconds for report in counted))
    return _Speed(frames / seconds, str((reports[0].engine or {}).get("device", "an unknown device")))


def _pictures(paths: list[str], chunks: Sequence[Chunk], each: int, folder: Path, name: str) -> list[str]:
    """Make the pictures on the pools, and keep them in the folder for them.

    Raises:
        DestinationError: They cannot be written there.
    """
    futures = [compare.submit(paths, chunk.index, each) for chunk in chunks]
    made = [Path(picture) for future in futures for picture in result_of_task(future)]
    kept = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in made:
            kept.append(str(folder / f"{name}-{path.name.removeprefix('picture-')}"))
            shutil.copyfile(path, kept[-1])
    except OSError as error:
        raise DestinationError(
            f"cannot write pictures into {folder} ({error.strerror})", "Choose another folder for them"
        ) from error
    return kept
