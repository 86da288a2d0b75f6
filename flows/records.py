"""What flows do with records of jobs beyond tracking their own: find an earlier result, end what was left open."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State

from blocks.site import load_store, load_tracking
from flows.parameters import UpscaleOptions
from tasks.destinations import Output, destination_of
from tasks.errors import LedgerError, SuperResolutionError
from tasks.ledger import open_ledger
from tasks.ledger.ledger import Ledger
from tasks.ledger.record import JobError, JobRecord, JobState, NewJob
from tasks.owner import this_user
from tasks.receipt import published
from tasks.request import UpscaleRequest
from tasks.stage import Source
from tasks.store.settings import StoreSettings

#: Labels of a flow run that say which record is its own, and in which ledger.
_JOB_LABEL: Final = "superres.job"
_LEDGER_LABEL: Final = "superres.ledger"

#: Seconds that the end of an earlier process of the same flow run is waited for.
_PREDECESSOR_SECONDS: Final = 90.0


def new_job(source: Source, request: UpscaleRequest, owner: str, store: StoreSettings) -> NewJob:
    """The job that a request on a source is; the same for every way in which it may be started."""
    return NewJob(
        owner=owner or this_user(),
        source=source.uri,
        source_version=source.version,
        source_bytes=source.bytes,
        destination=destination_of(request.destination, store).uri,
        settings=request.settings(),
    )


def result_of(ledger: Ledger, job: NewJob, store: StoreSettings) -> dict[str, Any] | None:
    """What an earlier run of the same job returned, if what it published lies there still.

    A ledger that cannot be read knows of none.

    Raises:
        SuperResolutionError: The store cannot be asked.
    """
    try:
        record = ledger.find(job.job_id)
    except LedgerError:
        return None
    if record is None or record.owner != job.owner or not has_result(record, store):
        return None
    return dict(record.result)


def has_result(record: JobRecord, store: StoreSettings) -> bool:
    """Whether a job is published, and what it published lies there still.

    Raises:
        SuperResolutionError: The store cannot be asked.
    """
    is_published = record.state == JobState.PUBLISHED and record.output is not None
    return is_published and destination_of(record.destination, store).keeps(record.output or {})


def name_record(run_id: str, job_id: str, ledger: str) -> None:
    """Note on a flow run which record is its own, for `end_record` and for whoever looks at it."""
    if run_id:
        with get_client(sync_client=True) as client:
            client.update_flow_run_labels(UUID(run_id), {_JOB_LABEL: job_id, _LEDGER_LABEL: ledger})


def await_predecessor(ledger: Ledger, job_id: str, run_id: str) -> None:
    """Let an earlier process of the same flow run end: one that is paused or retried may do so while the next begins.

    A ledger that cannot be read says nothing; who begins the job will hear of it.
    """
    deadline = time.monotonic() + _PREDECESSOR_SECONDS
    with suppress(LedgerError):
        while (record := ledger.find(job_id)) is not None and record.flow_run_id == run_id and run_id:
            if record.ended or ledger.abandoned(record) or time.monotonic() > deadline:
                return
            time.sleep(1.0)


def end_record(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook: end the record of a flow run whose process could not do it itself."""
    with get_client(sync_client=True) as client:  # A worker gives the run as it was before it had these labels.
        labels = client.read_flow_run(flow_run.id).labels
    job_id, ledger = labels.get(_JOB_LABEL), labels.get(_LEDGER_LABEL)
    if not job_id:
        return
    was_cancelled = state.is_cancelled() or state.is_cancelling()
    with suppress(SuperResolutionError):  # Housekeeping will find it.
        store = load_store(UpscaleOptions.model_validate(flow_run.parameters.get("options") or {}).store)
        opened = open_ledger(load_tracking(str(ledger or "")).ledger)
        record = opened.find(str(job_id))
        if record is not None and not record.ended and record.flow_run_id == str(flow_run.id):
            why = state.message or f"the flow run ended while {state.name}"
            close_record(opened, record, why, was_cancelled, store)


def output_of(record: JobRecord, store: StoreSettings) -> Output | None:
    """What the process of a job published, if it was killed before it could say so.

    Raises:
        StoreError: The store does not tell.
    """
    if not record.work_folder:
        return None
    return published(Path(record.work_folder), destination_of(record.destination, store))


def close_record(ledger: Ledger, record: JobRecord, why: str, cancelled: bool, store: StoreSettings) -> JobRecord:
    """End the record of a job that nobody works on any more: as published, if it was just before its end.

    Args:
        ledger: Where it is.
        record: The record.
        why: What is known of the end of its flow run.
        cancelled: Whether somebody wanted that.
        store: How to reach S3.

    Raises:
        StoreError: The store does not tell whether the result was published.
        LedgerError: The ledger cannot be reached, or the job is somebody else's now.
    """
    output = output_of(record, store)
    if output is not None:
        return ledger.publish(record, asdict(output), frames_done=record.frames_total)
    if cancelled:
        return ledger.cancel(record, why)
    return ledger.fail(record, JobError(phase=str(record.state), kind="lost", message=why))
