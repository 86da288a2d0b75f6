"""All new videos under a folder or S3 prefix: the scheduled sweep.

Videos that were upscaled with the same settings already are skipped, by the version of their content; the result of an
earlier version is replaced, anything else that lies where a result is to go is not. Videos run side by side on the same
pools, a few at a time; one that fails does not stop the rest.

Purpose: archives and drop folders, on a schedule.
Cache policy: none of Prefect's; the job ledger says what is done.
Blocks: pools, media store and job ledger, as the options of `upscale-video` name them.
"""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from contextvars import copy_context
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Final, Literal

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from pydantic import Field

from blocks.pools import load_pools
from blocks.site import load_store, load_tracking
from flows.parameters import Form, Source, UpscaleOptions
from flows.records import new_job, result_of
from flows.stopping import LOOK_SECONDS, Pausing, RunCancelled, RunStopped, cancelled, check_stop, stopped_by, watched
from flows.upscale_video import upscale_video
from infra.pools.opening import current_cluster
from tasks.destinations import destination_of, result_name
from tasks.errors import DestinationError, LibraryError, SettingsError, SuperResolutionError
from tasks.ledger import open_ledger
from tasks.ledger.ledger import Ledger
from tasks.ledger.record import JobRecord, JobState, NewJob
from tasks.owner import this_user
from tasks.request import UpscaleRequest
from tasks.stage import look_at
from tasks.store.address import local_path, parse, uri_of
from tasks.store.listing import Found, find_videos
from tasks.store.settings import StoreSettings

#: Failures that the same source with the same settings meets again.
_LASTING: Final = ("source", "unsupported-source", "frame", "settings")

#: Videos after which garbage is collected. What clients of servers leave is in cycles: little for Python, which waits
#: for more of it, and much in what it holds, such as TLS contexts and buffers.
_COLLECT_EVERY: Final = 20

#: Rows of the table in the UI.
_TABLE_ROWS: Final = 1000

Outcome = Literal["published", "skipped", "running", "failed", "failed earlier"]


class LibraryOptions(Form):
    """How a library is swept."""

    upscale: UpscaleOptions = Field(default_factory=UpscaleOptions, title="Upscaling")
    parallel: int = Field(2, ge=1, le=64, title="Parallel", description="Videos at a time.")
    limit: int = Field(0, ge=0, title="Limit", description="Videos per sweep; 0 for all.")
    retry_failed: bool = Field(
        False,
        title="Retry failed",
        description="Also try again what failed for a reason that lies in the video itself.",
    )


@dataclass(frozen=True)
class Row:
    """What became of one video."""

    video: str
    outcome: Outcome
    job_id: str = ""
    output: str = ""
    seconds: float = 0.0
    frames: int = 0
    kind: str = ""
    """Of the failure; see `SuperResolutionError.kind`."""
    reason: str = ""

    def shown(self) -> dict[str, Any]:
        """What people look for first comes first."""
        facts = {"video": self.video, "outcome": self.outcome, "reason": self.reason, "frames": self.frames}
        return {**facts, "seconds": round(self.seconds, 1), "output": self.output, "job": self.job_id}


@flow(name="upscale-library", flow_run_name="{source}", validate_parameters=True)
def upscale_library(
    source: Source,
    destination: Source,
    options: LibraryOptions = LibraryOptions(),  # noqa: B008
) -> dict[str, Any]:
    """Upscale all new videos of a library.

    Args:
        source: Folder, or `s3://bucket/prefix`, that holds them, at any depth.
        destination: Folder, or `s3://bucket/prefix`, for the results, which are named as their videos.
        options: How.

    Returns:
        How many videos had which outcome, and a row for each.

    Raises:
        LibraryError: Some videos failed; the others are published.
        SuperResolutionError: The library cannot be listed.
    """
    try:
        with watched(str(flow_run.get_id() or "")):
            return _upscale_new(source, destination, options)
    except RunCancelled:
        return cancelled("the sweep was cancelled", "Run it again: it leaves out what is published")


def _upscale_new(source: str, destination: str, options: LibraryOptions) -> dict[str, Any]:
    logger = get_run_logger()
    _check_apart(source, destination)
    store = load_store(options.upscale.store)
    sweep = _Sweep(destination, options, store, open_ledger(load_tracking(options.upscale.ledger).ledger))
    rows: list[Row] = []
    with ExitStack() as stack:
        if current_cluster() is None:
            pools = load_pools(options.upscale.pools)
            pools.check()
            stack.enter_context(pools.open(warm=False))
        # Heartbeats are this run's: at its end each run sleeps up to a second for the thread that sends its own.
        stack.enter_context(temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}))
        for row in stack.enter_context(closing(_side_by_side(sweep.upscale, find_videos(store, source), options))):
            rows.append(row)
            if len(rows) % _COLLECT_EVERY == 0:
                gc.collect()
            if row.outcome == "failed":
                logger.warning("%s: %s", row.video, row.reason)
    counts = Counter(row.outcome for row in rows)
    rows.sort(key=lambda row: row.video)
    said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "no videos"
    create_table_artifact([row.shown() for row in rows[:_TABLE_ROWS]], key="library", description=f"{source}: {said}")
    logger.info("%s: %s", source, said)
    if counts["failed"]:
        raise LibraryError(f"{source}: {said}", [asdict(row) for row in rows])
    return {"status": "published", "counts": dict(counts), "rows": [asdict(row) for row in rows]}


def _check_apart(source: str, destination: str) -> None:
    """Refuse results among the videos: the next sweep would take them for new ones."""
    videos, results = (uri_of(where.rstrip("/") + "/x")[:-1] for where in (source, destination))
    if results.startswith(videos):
        raise SettingsError(
            f"the results in {destination} would lie among the videos of {source}", "Choose another destination"
        )


def _side_by_side(
    upscale: Callable[[Found], Row], videos: Iterator[Found], options: LibraryOptions
) -> Generator[Row, None, None]:
    """Upscale a few videos at a time, and give a row for each as it ends; `limit` counts those that were worked on.

    Whoever closes it before its end waits until the videos that are under way have been stopped. In a pause those under
    way are finished, and no others begin.
    """
    pausing = Pausing()
    running: set[Future[Row]] = set()
    worked, limit = 0, options.limit or float("inf")
    stop = threading.Event()
    with stopped_by(stop), ThreadPoolExecutor(options.parallel, "video") as threads:
        try:
            while True:
                check_stop()
                if not (paused := pausing.is_wanted):
                    room = min(options.parallel - len(running), limit - worked - len(running))
                    for video in islice(videos, max(0, int(room))):
                        # A flow that is called here is a part of this one, and uses the pools that are open around it.
                        running.add(threads.submit(copy_context().run, upscale, video))
                if not running:
                    if not paused:
                        return
                    pausing.rest()
                done, running = wait(running, LOOK_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    row = future.result()
                    worked += row.outcome in ("published", "failed")
                    yield row
        finally:
            stop.set()


@dataclass(frozen=True)
class _Sweep:
    """One sweep: what happens to each video of it."""

    destination: str
    options: LibraryOptions
    store: StoreSettings
    ledger: Ledger

    def upscale(self, video: Found) -> Row:
        began, job_id = time.monotonic(), ""
        try:
            target = self._target(video)
            options = self.options.upscale
            request = options.request(video.uri, target)
            job = new_job(look_at(video.uri, self.store), request, options.owner, self.store)
            job_id = job.job_id
            if (row := self._settled(video, job, request)) is not None:
                return row
            if self._is_outdated(job):
                options = options.model_copy(update={"overwrite": True})
            result = upscale_video(video.uri, target, options)
            return Row(video.uri, "published", job_id, result["output"], time.monotonic() - began, result["frames_out"])
        except RunStopped:
            raise
        except SuperResolutionError as error:
            kind, reason = error.kind, str(error)
        except BaseException as error:  # No `Exception`: what Prefect raises in a run that somebody has ended.
            kind, reason = "internal", repr(error)
        return Row(video.uri, "failed", job_id, "", time.monotonic() - began, kind=kind, reason=reason)

    def _target(self, video: Found) -> str:
        """Where the result of a video goes; in a folder that is there."""
        target = f"{self.destination.rstrip('/')}/{result_name(video.name, self.options.upscale.container)}"
        if parse(target) is None:
            folder = local_path(target).parent
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DestinationError(
                    f"the folder {folder} cannot be made ({error.strerror})", "Choose another destination"
                ) from error
        return target

    def _settled(self, video: Found, job: NewJob, request: UpscaleRequest) -> Row | None:
        """The row of a video that needs no work, if it is one."""
        if request.overwrite or request.fresh:
            return None
        if (earlier := result_of(self.ledger, job, self.store)) is not None:
            return Row(video.uri, "skipped", job.job_id, earlier["output"], 0.0, earlier["frames_out"])
        record = self.ledger.find(job.job_id)
        if record is None:
            return None
        if not record.ended and not self.ledger.abandoned(record):
            return Row(video.uri, "running", job.job_id)
        lasting = record.error is not None and record.error.kind in _LASTING
        if record.state == JobState.FAILED and lasting and not self.options.retry_failed:
            assert record.error is not None
            return Row(video.uri, "failed earlier", job.job_id, kind=record.error.kind, reason=record.error.message)
        return None

    def _is_outdated(self, job: NewJob) -> bool:
        """Whether what lies at the destination was made of an earlier version of the source, with the same settings."""
        destination = destination_of(job.destination, self.store)
        return destination.found() is not None and any(
            record.source == job.source
            and record.settings == job.settings
            and record.output is not None
            and destination.keeps(record.output)
            for record in self._published.get(job.destination, ())
        )

    @cached_property
    def _published(self) -> dict[str, list[JobRecord]]:
        """The owner's results by where they are: read once, and only if something lies where a result is to go."""
        found: dict[str, list[JobRecord]] = defaultdict(list)
        for record in self.ledger.by_owner(self.options.upscale.owner or this_user()):
            if record.state == JobState.PUBLISHED:
                found[record.destination].append(record)
        return found
