"""Jobs for tests of the ledger."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from tasks.ledger import Ledger
from tasks.ledger.holder import Holder
from tasks.ledger.record import JobError, JobRecord, JobState, NewJob

JOB: Final = NewJob("ann", "s3://in/film.mov", "v1", "s3://out/film.mp4", {"scale": 2}, 10_000)

#: A process that cannot be looked at from here.
ELSEWHERE: Final = Holder("elsewhere", 4711, "another boot/another name space/1")

ERROR: Final = JobError("upscaling", "frame", "a frame could not be upscaled", 3, 7, "node-2", "815", "/logs/815.log")

OUTPUT: Final = {"uri": "s3://out/film.mp4", "version_id": "v7", "etag": '"e"', "digest": "d", "bytes": 40_000}


def job(number: int, owner: str = "ann") -> NewJob:
    return replace(JOB, owner=owner, source_version=f"version {number}")


def begin(ledger: Ledger, new: NewJob = JOB) -> JobRecord:
    """A job whose holder cannot be looked at."""
    return ledger.begin(new, ELSEWHERE, "run-1", "node-1")


def move(ledger: Ledger, record: JobRecord, state: JobState, write_id: str = "") -> JobRecord:
    """Bring a job into a state in the way that is meant for it."""
    match state:
        case JobState.PUBLISHED:
            return ledger.publish(record, OUTPUT, write_id=write_id)
        case JobState.FAILED:
            return ledger.fail(record, ERROR, write_id=write_id)
        case JobState.CANCELLED:
            return ledger.cancel(record, "no longer wanted", write_id=write_id)
    return ledger.advance(record, state, write_id=write_id)
