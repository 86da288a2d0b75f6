"""The ledger keeps one truth per job: the same promises in a file and in a table."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from threading import Barrier, Event, Thread
from typing import Any

import pytest

from tasks.errors import AccessError, LedgerError
from tasks.ledger import Ledger, LedgerSettings, dynamodb
from tasks.ledger import ledger as ledger_module
from tasks.ledger.backend import Backend, ConflictError
from tasks.ledger.holder import Holder, this_holder
from tasks.ledger.ledger import DoneBeforeError, new_write_id
from tasks.ledger.record import ENDS, JobRecord, JobState, Transition, may_follow
from tests.ledger.jobs import ELSEWHERE, ERROR, JOB, OUTPUT, begin, job, move

FULL = JobRecord(
    job_id="0123456789abcdef",
    owner="Ünal <ünal@example.org>",
    state=JobState.VERIFYING,
    source="s3://in/電影 1.mov",
    source_version="L4kqtJlcpXroDTDmpUMLUo",
    source_bytes=2**53 + 1,
    destination="s3://out/電影 1.mp4",
    settings={"scale": 2, "tolerance": 0.1, "height": None, "fresh": False, "empty": "", "nested": {"a": [1, [2.5]]}},
    probe={"rate": "24000/1001", "streams": [{"codec": "h264", "seconds": 1 / 3}, {}], "none": [], "tiny": 1e-7},
    model="realesr-general-x4v3",
    model_hash="f" * 64,
    work_folder="/scratch/0123456789abcdef",
    output={**OUTPUT, "version_id": None},
    frames_total=250_000,
    frames_done=1,
    phase_seconds={"staging": 2.0, "upscaling": 12345.678901234567},
    node_seconds={"cpu": 0.1 + 0.2, "gpu": 0.0},
    metrics={"Frames": 5e20, "Bytes": -0.5},
    result={"status": "published", "frames_out": 1, "cost": None},
    cost=1.25,
    flow_run_id="5b9d",
    slurm_jobs=("17", "18_3"),
    error=ERROR,
    attempt=3,
    version=17,
    write_id="00112233",
    holder=Holder("node-1", 4711, "boot/space/99"),
    lease_until=1_800_000_090.123456,
    created_at=1_799_999_999.000001,
    updated_at=1_800_000_000.123456,
    expires_at=1_900_000_000,
    history=(
        Transition(JobState.CREATED, 1_799_999_999.000001, 1, "node-1", "aa"),
        Transition(JobState.VERIFYING, 1_800_000_000.0, 3, "node-ü", "bb"),
    ),
)


def test_every_field_is_read_as_it_was_written(backend: Backend) -> None:
    without = JobRecord("", "")
    assert [item.name for item in fields(FULL) if getattr(FULL, item.name) == getattr(without, item.name)] == []
    backend.create(FULL)
    read = backend.read(FULL.job_id)
    assert read == FULL.bounded() == FULL
    assert read.settings["fresh"] is False
    empty = JobRecord("empty", "ann")
    backend.create(empty)
    assert backend.read("empty") == empty


def test_a_new_job_is_recorded_with_what_is_asked_for(ledger: Ledger) -> None:
    before = time.time()
    record = ledger.begin(JOB, this_holder(), "run-1", "node-1")
    assert ledger.find(JOB.job_id) == record == ledger.get(record.job_id, "ann")
    asked = (record.owner, record.source, record.source_version, record.source_bytes, record.destination)
    assert asked == (JOB.owner, JOB.source, JOB.source_version, JOB.source_bytes, JOB.destination)
    assert (record.settings, record.job_id, record.flow_run_id) == (JOB.settings, JOB.job_id, "run-1")
    assert (record.state, record.attempt, record.version, record.holder) == ("created", 1, 1, this_holder())
    assert before <= record.created_at == record.updated_at <= time.time()
    assert record.lease_until == pytest.approx(record.updated_at + 90, abs=1e-3)
    assert record.expires_at is None
    assert record.history == (Transition(JobState.CREATED, record.created_at, 1, "node-1", record.write_id),)


@pytest.mark.parametrize("old", JobState)
def test_only_the_transitions_that_are_allowed_are_possible(ledger: Ledger, old: JobState) -> None:
    for number, new in enumerate(JobState):
        record = begin(ledger, job(number))
        if old is not JobState.CREATED:
            record = move(ledger, record, old)
        if may_follow(old, new):
            moved = move(ledger, record, new)
            assert (moved.state, moved.version) == (new, record.version + 1)
            assert [item.state for item in moved.history[-2:]] == [old, new]
            assert (moved.history[-1].node, moved.history[-1].attempt) == ("node-1", 1)
            assert moved.updated_at >= record.updated_at
            assert moved.write_id != record.write_id
        elif old == new and old not in ENDS:
            moved = ledger.advance(record, new, frames_done=7)
            assert (moved.frames_done, moved.history) == (7, record.history)
            assert moved.lease_until > record.lease_until
        else:
            with pytest.raises(LedgerError, match="has ended already" if old in ENDS else f"is {old} and cannot go"):
                move(ledger, record, new)
            moved = record
        assert ledger.find(record.job_id) == moved


def test_each_end_says_what_there_is_to_say_and_is_kept_for_a_time(ledger: Ledger) -> None:
    published = ledger.publish(begin(ledger, job(1)), OUTPUT, cost=1.5)
    assert (published.output, published.cost, published.error) == (OUTPUT, 1.5, None)
    failed = ledger.fail(ledger.advance(begin(ledger, job(2)), JobState.UPSCALING), ERROR, frames_done=3)
    assert (failed.error, failed.frames_done, failed.output) == (ERROR, 3, None)
    cancelled = ledger.cancel(ledger.advance(begin(ledger, job(3)), JobState.ENCODING), "no longer wanted")
    assert cancelled.error is not None
    assert (cancelled.error.phase, cancelled.error.kind) == ("encoding", "cancelled")
    for record in (published, failed, cancelled):
        assert record.ended
        assert record.expires_at == int(record.updated_at + 365 * 86_400)
        with pytest.raises(LedgerError, match="ended already"):
            ledger.renew(record, frames_done=1)


def test_what_is_no_fact_cannot_be_set(ledger: Ledger) -> None:
    record = begin(ledger)
    for name in ("owner", "attempt", "holder", "frames_don"):
        with pytest.raises(TypeError, match=name):
            ledger.renew(record, **{name: "x"})
    assert ledger.find(record.job_id) == record


# Several writers


def test_of_twenty_who_begin_the_same_job_one_creates_it(settings: LedgerSettings, backend: Backend) -> None:
    ready = Barrier(20)

    def attempt(number: int) -> JobRecord | str:
        own = Ledger(backend)
        ready.wait()
        try:
            record = own.begin(JOB, this_holder(), f"run-{number}")
        except LedgerError as error:
            return str(error)
        while not over.wait(0.05):  # Whoever looks later waits for a sign of life.
            own.renew(record)
        return record

    over = Event()
    with ThreadPoolExecutor(20) as threads, _fast_polls():
        running = [threads.submit(attempt, number) for number in range(20)]
        while sum(future.done() for future in running) < 19:
            time.sleep(0.01)
        over.set()
        results = [future.result() for future in running]
    created = [result for result in results if isinstance(result, JobRecord)]
    assert len(created) == 1
    assert all("is running already (flow run" in result for result in results if isinstance(result, str))
    stored = backend.read(JOB.job_id)
    assert stored is not None
    assert (stored.flow_run_id, stored.attempt) == (created[0].flow_run_id, 1)


def test_of_two_writers_exactly_one_wins_each_transition(backend: Backend) -> None:
    record = begin(Ledger(backend))
    states = [JobState.STAGING, JobState.EXTRACTING, JobState.UPSCALING, JobState.ENCODING, JobState.VERIFYING]
    for state in [*states, JobState.PUBLISHED]:
        ready = Barrier(2)

        def attempt(seen: JobRecord, state: JobState = state, ready: Barrier = ready) -> JobRecord | str:
            ready.wait()
            try:
                return move(Ledger(backend), seen, state)
            except LedgerError as error:
                return str(error)

        with ThreadPoolExecutor(2) as threads:
            results = list(threads.map(attempt, [record, record]))
        won = [result for result in results if isinstance(result, JobRecord)]
        assert len(won) == 1, results
        record = won[0]
    stored = backend.read(JOB.job_id)
    assert stored == record
    assert [item.state for item in record.history] == [JobState.CREATED, *states, JobState.PUBLISHED]


def test_a_thread_that_shows_life_and_one_that_goes_forward_do_not_disturb_each_other(backend: Backend) -> None:
    ledger = Ledger(backend)
    record = begin(ledger)

    def show_life() -> None:
        known = record
        for count in range(1, 31):
            known = ledger.renew(known, frames_done=count)

    with ThreadPoolExecutor(1) as threads:
        life = threads.submit(show_life)
        known = record
        for state in list(JobState)[1:6]:
            known = ledger.advance(known, state, phase_seconds={state: 1.0})
        life.result()
    stored = ledger.find(JOB.job_id)
    assert stored is not None
    assert (stored.state, stored.frames_done, stored.phase_seconds) == ("verifying", 30, {"verifying": 1.0})
    assert [item.state for item in stored.history] == list(JobState)[:6]
    assert stored.version == 1 + 30 + 5


def test_a_stale_write_is_refused(ledger: Ledger) -> None:
    record = begin(ledger)
    ahead = ledger.advance(ledger.advance(record, JobState.STAGING), JobState.UPSCALING)
    for state in (JobState.CREATED, JobState.STAGING, JobState.EXTRACTING, JobState.UPSCALING):
        with pytest.raises(LedgerError, match=f"is upscaling and cannot go to {state}"):
            ledger.advance(record, state, frames_done=1)
    assert ledger.find(record.job_id) == ahead
    assert ledger.advance(record, JobState.ENCODING, frames_done=1).version == 4


def test_a_write_over_another_than_was_seen_is_a_conflict(backend: Backend) -> None:
    ledger = Ledger(backend)
    record = begin(ledger)
    now = ledger.renew(record)
    with pytest.raises(ConflictError):
        backend.create(record)
    with pytest.raises(ConflictError):
        backend.replace(replace(record, version=2), record)
    with pytest.raises(ConflictError):
        backend.delete(record)
    with pytest.raises(ConflictError):
        backend.replace(replace(record, job_id="missing"), replace(record, job_id="missing"))
    assert backend.read(record.job_id) == now


# Attempts


def test_a_job_that_ended_begins_again_without_the_facts_of_its_last_attempt(ledger: Ledger) -> None:
    first = ledger.advance(begin(ledger), JobState.UPSCALING, frames_done=5, model="m", slurm_jobs=("1",))
    failed = ledger.fail(first, ERROR)
    again = ledger.begin(replace(JOB, source_bytes=5), this_holder(), "run-2", "node-2")
    assert (again.state, again.attempt, again.version, again.flow_run_id) == ("created", 2, failed.version + 1, "run-2")
    assert (again.error, again.expires_at, again.frames_done, again.model, again.slurm_jobs) == (None, None, 0, "", ())
    assert (again.created_at, again.source_bytes) == (first.created_at, 5)
    assert again.history[:-1] == failed.history
    assert again.history[-1] == Transition(JobState.CREATED, again.updated_at, 2, "node-2", again.write_id)
    assert ledger.find(JOB.job_id) == again


def test_a_job_of_a_dead_process_is_taken_over_at_once(settings: LedgerSettings, ledger: Ledger) -> None:
    with _holder_process(settings) as holder:
        record = ledger.find(JOB.job_id)
        assert record is not None
        assert record.holder.pid == holder.pid
        assert not ledger.abandoned(record)
        holder.kill()
    assert ledger.abandoned(record)
    start = time.monotonic()
    again = ledger.begin(JOB, this_holder())
    assert time.monotonic() - start < 1
    assert (again.attempt, again.holder) == (2, this_holder())


def test_an_older_attempt_can_write_nothing_once_it_is_taken_over(backend: Backend) -> None:
    ledger = Ledger(backend, lease_seconds=0.1)
    old = ledger.advance(begin(ledger), JobState.UPSCALING)
    with _fast_polls():
        new = ledger.begin(JOB, ELSEWHERE, "run-2")
    writes: list[Callable[[], Any]] = [
        lambda: ledger.renew(old),
        lambda: ledger.advance(old, JobState.UPSCALING, frames_done=1),
        lambda: ledger.advance(old, JobState.ENCODING),
        lambda: ledger.publish(old, OUTPUT),
        lambda: ledger.fail(old, ERROR),
        lambda: ledger.cancel(old, "not wanted"),
    ]
    for write in writes:
        with pytest.raises(LedgerError, match="was taken over by attempt 2 on elsewhere"):
            write()
    assert ledger.find(JOB.job_id) == new
    ended = ledger.fail(new, ERROR)
    with pytest.raises(LedgerError, match="was taken over"):
        ledger.publish(old, OUTPUT)
    assert ledger.find(JOB.job_id) == ended


def test_of_ten_who_find_a_dead_holder_one_takes_over(settings: LedgerSettings, backend: Backend) -> None:
    with _holder_process(settings) as holder:
        holder.kill()
    ready = Barrier(10)

    def attempt(_: int) -> JobRecord | str:
        ready.wait()
        try:
            return Ledger(backend, lease_seconds=60).begin(JOB, this_holder())
        except LedgerError as error:
            return str(error)

    stop = Event()

    def show_life() -> None:
        while not stop.wait(0.05):
            if (record := backend.read(JOB.job_id)) is not None and record.attempt > 1:
                Ledger(backend).renew(record)

    life = Thread(target=show_life)
    life.start()
    with ThreadPoolExecutor(10) as threads, _fast_polls():
        results = list(threads.map(attempt, range(10)))
    stop.set()
    life.join()
    assert sum(isinstance(result, JobRecord) for result in results) == 1, results
    record = backend.read(JOB.job_id)
    assert record is not None
    assert record.attempt == 2


def test_a_job_whose_holder_shows_life_is_not_begun_again(backend: Backend) -> None:
    ledger = Ledger(backend, lease_seconds=5)
    record = begin(ledger)
    stop = Event()

    def show_life() -> None:
        known = record
        while not stop.wait(0.2):
            known = ledger.renew(known)

    life = Thread(target=show_life)
    life.start()
    try:
        with (
            _fast_polls(),
            pytest.raises(LedgerError, match=r"running already \(flow run run-1, on elsewhere proc") as told,
        ):
            ledger.begin(JOB, this_holder())
        assert "Wait for it or cancel it first." in str(told.value)
    finally:
        stop.set()
        life.join()
    stored = ledger.find(JOB.job_id)
    assert stored is not None
    assert stored.attempt == 1


def test_a_job_whose_holder_is_alive_on_this_machine_is_refused_at_once(ledger: Ledger) -> None:
    ledger.begin(JOB, this_holder(), "run-1")
    start = time.monotonic()
    with pytest.raises(LedgerError, match=r"running already \(flow run run-1"):
        ledger.begin(JOB, this_holder())
    assert time.monotonic() - start < 5, "that is less than its lease"


def test_a_job_whose_holder_is_silent_is_begun_again_once_its_lease_has_run_out(backend: Backend) -> None:
    ledger = Ledger(backend, lease_seconds=0.6)
    record = begin(ledger)
    assert not ledger.abandoned(record)
    with _fast_polls():
        again = ledger.begin(JOB, this_holder())
    assert ledger.abandoned(record)
    assert again.attempt == 2
    assert again.updated_at >= record.lease_until
    assert again.updated_at - record.lease_until < 0.5


def test_the_wrong_clock_of_a_dead_holder_is_not_waited_for(backend: Backend) -> None:
    ledger = Ledger(backend, lease_seconds=0.3)
    record = begin(ledger)
    day = 86_400
    ahead = replace(record, updated_at=record.updated_at + day, lease_until=record.lease_until + day, write_id="ahead")
    backend.replace(ahead, record)
    start = time.monotonic()
    with _fast_polls():
        assert ledger.begin(JOB, this_holder()).attempt == 2
    assert 0.2 < time.monotonic() - start < 2


def test_a_job_that_ends_while_it_is_waited_for_begins_again(backend: Backend) -> None:
    ledger = Ledger(backend)
    record = begin(ledger)
    with ThreadPoolExecutor(1) as threads, _fast_polls():
        waiting = threads.submit(ledger.begin, JOB, this_holder())
        time.sleep(0.2)
        assert not waiting.done()
        ledger.cancel(record, "not wanted")
        assert waiting.result().attempt == 2


def test_a_job_that_is_done_is_not_begun_again(backend: Backend) -> None:
    ledger, asked = Ledger(backend), []

    def is_done(record: JobRecord) -> bool:
        asked.append(record)
        return len(asked) < 3

    record = ledger.begin(JOB, ELSEWHERE, is_done=is_done)
    assert asked == []
    with ThreadPoolExecutor(1) as threads, _fast_polls():
        waiting = threads.submit(ledger.begin, JOB, this_holder(), is_done=is_done)
        time.sleep(0.2)
        published = ledger.publish(record, OUTPUT)
        with pytest.raises(DoneBeforeError, match=f"{record.job_id} is published already"):
            waiting.result()
    with pytest.raises(DoneBeforeError):
        ledger.begin(JOB, this_holder(), is_done=is_done)
    assert asked == [published, published]
    assert ledger.find(JOB.job_id) == published
    again = ledger.begin(JOB, this_holder(), is_done=is_done)
    assert (again.attempt, len(asked)) == (2, 3)
    ledger.fail(again, ERROR)
    assert ledger.begin(JOB, this_holder(), is_done=is_done).attempt == 3
    assert len(asked) == 3


def test_a_record_made_anew_under_the_same_id_is_not_mistaken_for_the_old_one(ledger: Ledger) -> None:
    old = begin(ledger)
    ledger.fail(old, ERROR)
    ledger.delete(JOB.job_id)
    with pytest.raises(LedgerError, match="in the ledger no more"):
        ledger.renew(old)
    new = begin(ledger)
    assert (new.version, new.attempt) == (old.version, old.attempt)
    with pytest.raises(LedgerError, match="was taken over"):
        ledger.renew(old, frames_done=3)
    assert ledger.find(JOB.job_id) == new


# Owners and lists


def test_somebody_elses_job_looks_like_a_missing_one(ledger: Ledger) -> None:
    record = begin(ledger)
    messages = []
    for action in (
        lambda: ledger.get(record.job_id, "bob"),
        lambda: ledger.get("0" * 16, "bob"),
        lambda: ledger.begin(replace(JOB, owner="bob"), this_holder()),
    ):
        with pytest.raises(AccessError) as told:
            action()
        messages.append(str(told.value).replace(record.job_id, "ID").replace("0" * 16, "ID"))
    assert len(set(messages)) == 1
    assert ledger.find("0" * 16) is None
    assert ledger.find(record.job_id) == record


def test_somebody_elses_job_stays_so_after_its_end(ledger: Ledger) -> None:
    ended = ledger.fail(begin(ledger), ERROR)
    with pytest.raises(AccessError):
        ledger.begin(replace(JOB, owner="bob"), this_holder())
    assert ledger.find(JOB.job_id) == ended


def test_jobs_of_an_owner_are_listed_newest_first(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamodb, "_PAGE", 3)
    records = [begin(ledger, job(number, "ann" if number % 3 else "bob")) for number in range(15)]
    ledger.fail(records[1], ERROR)
    anns = [record.job_id for record in reversed(records) if record.owner == "ann"]
    assert [record.job_id for record in ledger.by_owner("ann")] == anns
    for limit in (0, 1, 3, 4, 10, 99):
        assert [record.job_id for record in ledger.by_owner("ann", limit=limit)] == anns[:limit]
    assert [record.job_id for record in ledger.by_owner("ann", since=records[7].created_at)] == anns[:6]
    assert [record.job_id for record in ledger.by_owner("ann", since=records[7].created_at, limit=2)] == anns[:2]
    assert ledger.by_owner("ann", since=time.time() + 1) == ledger.by_owner("nobody") == []
    assert ledger.by_owner("ann")[-1] == ledger.find(records[1].job_id)


def test_jobs_in_a_state_are_listed_longest_unchanged_first(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamodb, "_PAGE", 3)
    records = [begin(ledger, job(number, f"owner-{number % 2}")) for number in range(9)]
    renewed = ledger.renew(records[2])
    ledger.advance(records[4], JobState.STAGING)
    expected = [*(records[number].job_id for number in (0, 1, 3, 5, 6, 7, 8)), records[2].job_id]
    assert [record.job_id for record in ledger.by_state(JobState.CREATED)] == expected
    assert [record.job_id for record in ledger.by_state(JobState.CREATED, limit=4)] == expected[:4]
    before = records[7].updated_at
    assert [record.job_id for record in ledger.by_state(JobState.CREATED, before=before)] == expected[:5]
    assert ledger.by_state(JobState.CREATED)[-1] == renewed
    assert [record.job_id for record in ledger.by_state(JobState.STAGING)] == [records[4].job_id]
    assert ledger.by_state(JobState.FAILED) == []


def test_only_records_of_jobs_that_ended_can_be_deleted(ledger: Ledger) -> None:
    record = begin(ledger)
    with pytest.raises(LedgerError, match="has not ended"):
        ledger.delete(record.job_id)
    assert ledger.find(record.job_id) == record
    ledger.cancel(record, "not wanted")
    ledger.delete(record.job_id)
    ledger.delete(record.job_id)
    assert ledger.find(record.job_id) is None
    assert ledger.by_owner("ann") == []


# Size


def test_a_record_stays_small_enough_however_long_a_job_goes_on(ledger: Ledger) -> None:
    record = begin(ledger)
    history = tuple(Transition(JobState.STAGING, number + 1 / 3, number, "n" * 63, "w" * 16) for number in range(1000))
    jobs = tuple(f"{number}_{number}" for number in range(5000))
    crowded = replace(record, history=history)
    stored = ledger.fail(
        crowded, replace(ERROR, message="ü" * 500_000), slurm_jobs=jobs, probe={"title": "x" * 500_000}
    )
    assert ledger.find(record.job_id) == stored
    assert (len(stored.history), stored.history[0]) == (201, history[0])
    assert stored.history[1:-1] == history[-199:]
    assert stored.history[-1].state == "failed"
    assert stored.slurm_jobs == jobs[-1000:]
    assert stored.error is not None
    assert stored.error.message == "ü" * 2048
    assert stored.probe == {"left_out": "too large"}


def test_a_probe_is_kept_while_the_record_is_small_enough(ledger: Ledger) -> None:
    large, too_large = ({"streams": [{"codec": "h264", "title": "ü" * 400}] * count} for count in (110, 130))
    record = ledger.renew(begin(ledger), probe=large)
    assert record.probe == large
    assert ledger.find(record.job_id) == record
    assert ledger.renew(record, probe=too_large).probe == {"left_out": "too large"}


# Answers that are lost


class _Unreliable:
    """Does what it is asked for, and then once says that it could not be reached.

    Args:
        backend: Does the work.
        works: Whether the work is done before the error.
        between: What happens after the work, before anybody can look.
    """

    def __init__(self, backend: Backend, *, works: bool = True, between: Callable[[], Any] = lambda: None) -> None:
        self._backend = backend
        self._works = works
        self._between = between
        self.failed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def create(self, record: JobRecord) -> None:
        self._once(lambda: self._backend.create(record))

    def replace(self, record: JobRecord, seen: JobRecord) -> None:
        self._once(lambda: self._backend.replace(record, seen))

    def _once(self, work: Callable[[], None]) -> None:
        if self.failed:
            return work()
        self.failed += 1
        if self._works:
            work()
            self._between()
        raise LedgerError("the ledger cannot be reached")


def test_a_write_whose_answer_is_lost_is_made_once(backend: Backend) -> None:
    flaky = _Unreliable(backend)
    record = begin(Ledger(flaky))
    assert (record.attempt, record.version, flaky.failed) == (1, 1, 1)
    flaky = _Unreliable(backend)
    record = Ledger(flaky).advance(record, JobState.STAGING, frames_done=1)
    assert (record.state, record.version, flaky.failed) == ("staging", 2, 1)
    assert len(record.history) == 2
    assert backend.read(JOB.job_id) == record
    flaky = _Unreliable(backend)
    record = Ledger(flaky).publish(record, OUTPUT)
    assert (record.state, record.version, flaky.failed) == ("published", 3, 1)
    again = begin(Ledger(_Unreliable(backend)))
    assert (again.attempt, again.version) == (2, 4)


def test_a_transition_whose_answer_is_lost_is_known_as_ones_own_after_later_writes(backend: Backend) -> None:
    ledger = Ledger(backend)
    record = begin(ledger)

    def show_life() -> None:
        stored = ledger.find(JOB.job_id)
        assert stored is not None
        ledger.renew(stored, frames_done=9)

    moved = Ledger(_Unreliable(backend, between=show_life)).advance(record, JobState.STAGING)
    assert (moved.state, moved.frames_done, moved.version) == ("staging", 9, 3)
    assert [item.state for item in moved.history] == ["created", "staging"]


@pytest.mark.parametrize("state", [JobState.STAGING, JobState.PUBLISHED, JobState.FAILED, JobState.CANCELLED])
def test_a_write_that_arrives_after_it_was_given_up_is_the_one_that_is_tried_again(
    backend: Backend, state: JobState
) -> None:
    record, write_id = begin(Ledger(backend)), new_write_id()
    late: list[Callable[[], None]] = []

    class Slow(_Unreliable):
        def _once(self, work: Callable[[], None]) -> None:
            late.append(work)
            raise LedgerError("the ledger cannot be reached")

    with pytest.raises(LedgerError, match="cannot be reached"):
        move(Ledger(Slow(backend)), record, state, write_id=write_id)
    late[0]()
    moved = move(Ledger(backend), record, state, write_id=write_id)
    assert (moved.state, moved.version) == (state, 2)
    with pytest.raises(LedgerError):
        move(Ledger(backend), record, state, write_id=new_write_id())


def test_a_write_that_never_arrived_fails(backend: Backend) -> None:
    with pytest.raises(LedgerError, match="cannot be reached"):
        begin(Ledger(_Unreliable(backend, works=False)))
    assert backend.read(JOB.job_id) is None
    record = begin(Ledger(backend))
    with pytest.raises(LedgerError, match="cannot be reached"):
        Ledger(_Unreliable(backend, works=False)).advance(record, JobState.STAGING)
    assert backend.read(JOB.job_id) == record


_HOLD = """
import sys, time
from tasks.aws import AwsSettings
from tasks.ledger import LedgerSettings, open_ledger
from tasks.ledger.holder import this_holder
from tests.ledger.jobs import JOB
file, table, endpoint = sys.argv[1:]
ledger = open_ledger(LedgerSettings(file, table, AwsSettings("eu-central-1", endpoint)))
ledger.begin(JOB, this_holder())
print("begun", flush=True)
time.sleep(60)
"""


@contextmanager
def _holder_process(settings: LedgerSettings) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the job."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, settings.file, settings.table, settings.aws.endpoint_url],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def _fast_polls() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_module, "_POLL_SECONDS", 0.05)
        yield
