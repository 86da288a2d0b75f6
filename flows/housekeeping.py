"""Reconcile the ledger with what is still running, and clear scratch of what nobody needs any more.

Purpose: a schedule, every hour or so; by hand after an accident.
Cache policy: none.
Blocks: media store and job ledger, as the options name them.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final
from uuid import UUID

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Crashed
from pydantic import Field

from blocks.pools import load_pools
from blocks.site import load_store, load_tracking
from flows.parameters import Form, LedgerName, PoolsName, Scratch, StoreName
from flows.records import close_record, output_of
from infra.pools.slurm import cancel_jobs, running_jobs
from tasks.errors import SuperResolutionError
from tasks.ledger import open_ledger
from tasks.ledger.holder import is_gone
from tasks.ledger.ledger import Ledger
from tasks.ledger.record import ENDS, JobError, JobRecord, JobState
from tasks.request import scratch_folder
from tasks.scratch import Leftover, find_leftovers, remove
from tasks.store.settings import StoreSettings
from tasks.store.upload import abort, unfinished_upload

#: Seconds after the lapse of its lease in which a job is left alone, unless its process is surely gone: its writes may
#: be slow, and its clock behind ours. AWS bears a quarter of an hour between clocks.
_GRACE_SECONDS: Final = 900.0

#: Rows of the table in the UI.
_TABLE_ROWS: Final = 1000


class HousekeepingOptions(Form):
    """What is kept, and where to look."""

    finished_hours: float = Field(
        24.0,
        ge=0,
        title="Keep finished",
        description="Hours that files of published and cancelled jobs stay in scratch.",
    )
    failed_days: float = Field(
        7.0,
        ge=0,
        title="Keep failed",
        description="Days that files of failed and unknown jobs stay: running such a job again continues from them.",
    )
    dry_run: bool = Field(False, title="Dry run", description="Only say what would be done.")
    scratch: Scratch = ""
    pools: PoolsName = Field("local", description="Whose scratch it is: `local`, `slurm`, or the name of a block.")
    store: StoreName = ""
    ledger: LedgerName = ""


@flow(name="housekeeping", validate_parameters=True)
def housekeeping(options: HousekeepingOptions = HousekeepingOptions()) -> dict[str, Any]:  # noqa: B008
    """End the records of jobs whose process is gone, cancel their Slurm jobs, and clear scratch.

    A source is never removed, nor a file of a job that runs. Files are kept from the end of their job on, or from when
    they were last written, if that is later.

    Args:
        options: What is kept, and where to look.

    Returns:
        What was done, or would be: jobs ended, Slurm jobs cancelled, folders removed, bytes freed.

    Raises:
        SuperResolutionError: The ledger or scratch cannot be read.
    """
    logger = get_run_logger()
    ledger, store = open_ledger(load_tracking(options.ledger).ledger), load_store(options.store)
    ended = {record.job_id: record for record in _end_lost_jobs(ledger, store, options.dry_run)}
    cancelled = _cancel_orphans(ledger, ended, options.dry_run)
    scratch = scratch_folder(options.scratch or load_pools(options.pools).scratch_directory or None)
    freed, removed = 0, []
    for leftover in find_leftovers(scratch):
        if not _has_lapsed(leftover, ledger, ended, options):
            continue
        gone = leftover.bytes if options.dry_run else _remove(leftover, store)
        if gone is not None:
            freed += gone
            removed.append(leftover)
    rows = [
        *({"what": f"job {each.state}", "name": each.job_id, "why": _why(each)} for each in ended.values()),
        *({"what": "Slurm job cancelled", "name": job, "why": "its flow is gone"} for job in cancelled),
        *({"what": "folder removed", "name": str(each.folder), "why": f"{each.bytes} bytes"} for each in removed),
    ]
    said = "would free" if options.dry_run else "freed"
    create_table_artifact(
        rows[:_TABLE_ROWS], key="housekeeping", description=f"{len(rows)} things; {said} {freed} bytes"
    )
    logger.info("%d jobs ended, %d folders removed, %s %d bytes", len(ended), len(removed), said, freed)
    return {
        "dry_run": options.dry_run,
        "jobs_ended": [
            {"job": each.job_id, "state": str(each.state), "source": each.source, "why": _why(each)}
            for each in ended.values()
        ],
        "slurm_jobs_cancelled": cancelled,
        "folders_removed": [asdict(each) | {"folder": str(each.folder)} for each in removed],
        "bytes_freed": freed,
    }


@dataclass(frozen=True)
class _Verdict:
    """Why a job has ended."""

    why: str
    wanted: bool
    """Whether somebody cancelled it."""
    flow_run: FlowRun | None = None
    """That Prefect takes for running."""


def _unfinished(ledger: Ledger) -> Iterator[JobRecord]:
    for state in JobState:
        if state not in ENDS:
            yield from ledger.by_state(state)


def _end_lost_jobs(ledger: Ledger, store: StoreSettings, dry_run: bool) -> Iterator[JobRecord]:
    """End the records of jobs that nobody works on, with what Prefect knows of their flow runs."""
    with get_client(sync_client=True) as client:
        for listed in list(_unfinished(ledger)):
            record = ledger.find(listed.job_id)  # The list may be seconds old.
            verdict = _verdict(client, record) if record is not None and ledger.abandoned(record) else None
            if record is None or verdict is None:
                continue
            try:
                if dry_run:
                    yield _as_ended(record, verdict, store)
                    continue
                if verdict.flow_run is not None:
                    state = Cancelled if verdict.wanted else Crashed
                    client.set_flow_run_state(verdict.flow_run.id, state(message=verdict.why), force=True)
                yield close_record(ledger, record, verdict.why, verdict.wanted, store)
            except SuperResolutionError as error:  # Begun again meanwhile, or the store does not answer: another time.
                get_run_logger().warning("job %s: %s", record.job_id, error)


def _verdict(client: SyncPrefectClient, record: JobRecord) -> _Verdict | None:
    """Why a job has ended; `None` if it may be going on."""
    try:
        run = client.read_flow_run(UUID(record.flow_run_id))
    except (ObjectNotFound, ValueError):
        run = None
    if run is not None and run.state is not None and run.state.is_final():
        return _Verdict(run.state.message or f"its flow run ended {run.state.name}", run.state.is_cancelled())
    if run is not None and run.state is not None and run.state.is_scheduled():
        return None  # It is about to be tried again.
    if not (is_gone(record.holder) or time.time() > record.lease_until + _GRACE_SECONDS):
        return None
    why = f"its process on {record.holder} is gone"
    if run is None or run.state is None:
        return _Verdict(f"{why}, and this Prefect server does not know its flow run", wanted=False)
    return _Verdict(why, run.state.is_cancelling(), run)


def _as_ended(record: JobRecord, verdict: _Verdict, store: StoreSettings) -> JobRecord:
    """The record as `close_record` would leave it, as far as housekeeping goes by it."""
    state = JobState.CANCELLED if verdict.wanted else JobState.FAILED
    if output_of(record, store) is not None:
        return replace(record, state=JobState.PUBLISHED, updated_at=time.time())
    return replace(record, state=state, updated_at=time.time(), error=JobError(record.state, "lost", verdict.why))


def _why(record: JobRecord) -> str:
    if record.state == JobState.PUBLISHED or record.error is None:
        return "its result is there; its process ended before it could say so"
    return record.error.message


def _cancel_orphans(ledger: Ledger, ended: Collection[str], dry_run: bool) -> list[str]:
    """Cancel the Slurm jobs of lost jobs, unless a running job uses them too."""
    orphans = {job for job_id in ended if (lost := ledger.find(job_id)) is not None for job in lost.slurm_jobs}
    if not orphans:
        return []
    for record in _unfinished(ledger):
        if record.job_id not in ended:
            orphans -= set(record.slurm_jobs)
    still = sorted(orphans & running_jobs())
    if still and not dry_run:
        cancel_jobs(still)
    return still


def _has_lapsed(
    leftover: Leftover, ledger: Ledger, ended: Mapping[str, JobRecord], options: HousekeepingOptions
) -> bool:
    """Whether a folder has been kept long enough. Jobs that this ledger does not know may have failed in another."""
    found = [ended.get(job_id) or ledger.find(job_id) for job_id in leftover.job_ids]
    records = [record for record in found if record is not None]
    if any(not record.ended for record in records):
        return False
    is_done = bool(found) and all(record is not None and not _may_go_on(record) for record in found)
    keep = 3600 * options.finished_hours if is_done else 86_400 * options.failed_days
    return time.time() - max([leftover.touched, *(record.updated_at for record in records)]) >= keep


def _may_go_on(record: JobRecord) -> bool:
    """Whether somebody may want to continue a job that has ended: it failed, or was paused."""
    was_paused = record.error is not None and record.error.kind == "paused"
    return record.state == JobState.FAILED or was_paused


def _remove(leftover: Leftover, store: StoreSettings) -> int | None:
    """Remove a folder, and what its job had begun to upload."""
    upload = unfinished_upload(leftover.folder / "upload.json")
    freed = remove(leftover)
    if freed is not None and upload is not None:
        try:
            abort(store, *upload)
        except SuperResolutionError as error:  # A rule of the bucket may end it.
            get_run_logger().warning("%s", error)
    return freed
