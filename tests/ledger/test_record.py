"""What a record holds, in which order states follow, and which requests are the same job."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.errors import LedgerError, SettingsError
from tasks.ledger.record import FACTS, JobError, JobRecord, JobState, NewJob, Transition, job_id_of, may_follow, plain
from tests.ledger.jobs import JOB

ORDER = ["created", "staging", "extracting", "upscaling", "encoding", "verifying"]
ENDS = ["published", "failed", "cancelled"]


def test_states_go_forward_and_never_out_of_an_end() -> None:
    assert [str(state) for state in JobState] == ORDER + ENDS
    allowed = {(old, new) for index, old in enumerate(ORDER) for new in ORDER[index + 1 :] + ENDS}
    assert {(str(old), str(new)) for old, new in product(JobState, JobState) if may_follow(old, new)} == allowed


def test_the_same_request_on_the_same_content_is_the_same_job() -> None:
    job = job_id_of("s", "v", "d", {"scale": 2, "folder": Path("/a"), "rate": Fraction(24000, 1001)})
    assert job == job_id_of("s", "v", "d", {"rate": "24000/1001", "folder": "/a", "scale": 2})
    assert len(job) == 16
    assert int(job, 16)
    others = [("t", "v", "d", {}), ("s", "w", "d", {}), ("s", "v", "e", {}), ("s", "v", "d", {"scale": 4})]
    assert len({job, *(job_id_of(*other) for other in others)}) == 5
    assert replace(JOB, owner="bob", source_bytes=3).job_id == JOB.job_id


def test_the_id_of_a_job_stays_the_same_in_later_versions() -> None:
    assert job_id_of("s3://in/ü.mov", "v1", "s3://out/ü.mp4", {"scale": 2, "fresh": False}) == "3e35445fa10a6c58"


def test_a_job_without_an_owner_is_refused() -> None:
    with pytest.raises(SettingsError, match="needs an owner"):
        NewJob("", "s", "v", "d")


def test_a_record_of_newer_or_older_code_is_read() -> None:
    record = JobRecord(
        "1", "ann", error=JobError("staging", "source", "gone"), history=(Transition(JobState.CREATED, 1.5, 1),)
    )
    data = record.to_dict()
    data["later"] = data["error"]["later"] = data["holder"]["later"] = data["history"][0]["later"] = 1
    assert JobRecord.from_dict(data) == record
    assert JobRecord.from_dict({"job_id": "1", "owner": "ann"}) == JobRecord("1", "ann")


@pytest.mark.parametrize(
    "damage", [{"state": "dreaming"}, {"history": [{}]}, {"owner": None}, {"holder": 7}, {"cost": "x"}]
)
def test_a_record_that_cannot_be_understood_is_named(damage: dict[str, Any]) -> None:
    data = {**JobRecord("job-1", "ann").to_dict(), **damage}
    if damage.get("owner", "") is None:
        del data["owner"]
    with pytest.raises(LedgerError, match="record of job job-1 cannot be read"):
        JobRecord.from_dict(data)
    with pytest.raises(LedgerError, match="record of job job-1 cannot be read"):
        JobRecord.from_dict({"job_id": "job-1"})


def test_values_are_made_plain() -> None:
    values = {
        "path": Path("/a/ü"),
        "rate": Fraction(24000, 1001),
        "numbers": (1, 2.5, True, None, np.float64(0.1), np.int64(3)),
        "none": [float("nan"), float("inf"), -float("inf"), 1e300],
        "tiny": 1e-200,
        "huge": 10**38,
        "largest": 10**38 - 1,
        "no unicode": "\udc80",
        3: {"state": JobState.FAILED},
    }
    made = plain(values)
    assert made == {
        "path": "/a/ü",
        "rate": "24000/1001",
        "numbers": [1, 2.5, True, None, 0.1, 3],
        "none": [None] * 4,
        "tiny": 0.0,
        "huge": str(10**38),
        "largest": 10**38 - 1,
        "no unicode": "\\udc80",
        "3": {"state": "failed"},
    }
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert type(made["numbers"][4]) is float
    assert made["numbers"][2] is True


def test_what_identifies_a_job_is_no_fact_to_set() -> None:
    assert {"frames_done", "probe", "error", "output", "model", "slurm_jobs"} <= FACTS
    assert not FACTS & {"job_id", "owner", "state", "attempt", "version", "holder", "history", "created_at"}
