"""The job ledger: one record per job, from its first second to its last.

Any number of processes may write. Each write names the one it saw and is refused if another came in between, so nothing
is lost and states only go forward. The process that works on a job **holds** it: its writes renew a lease, and a job
whose holder is dead can be begun again. Who was taken for dead and is not finds all its further writes refused.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from tasks.errors import AccessError, LedgerError
from tasks.ledger.backend import Backend, ConflictError
from tasks.ledger.holder import Holder, is_alive, is_gone
from tasks.ledger.record import FACTS, JobError, JobRecord, JobState, NewJob, Transition, may_follow

#: Seconds between two looks at a record whose lease has not run out yet.
_POLL_SECONDS: Final = 1.0

#: Times that a write is tried when others of the same holder come in between: far more than threads write at once.
_TRIES: Final = 20

#: Seconds of the longest pause between two tries; drawn by chance, so that writers do not meet again.
_PAUSE_SECONDS: Final = 0.05


class LostJobError(LedgerError):
    """The job is not the writer's any more: it has ended, is further, or another attempt has taken it over."""


class DoneBeforeError(LedgerError):
    """The job is published already.

    Args:
        record: Its record.
    """

    def __init__(self, record: JobRecord) -> None:
        super().__init__(f"job {record.job_id} is published already", "Ask for it afresh to do it again")
        self.record = record

    def __reduce__(self) -> tuple[object, ...]:
        return DoneBeforeError, (self.record,)


def new_write_id() -> str:
    """Something to tell a write from all others by."""
    return secrets.token_hex(8)


class Ledger:
    """Records of jobs.

    Args:
        backend: Where they are.
        lease_seconds: How long a holder counts as alive after a write, for those who cannot look whether it is. Holders
            should `renew` a few times within it.
        keep_days: How long a record is kept after its job has ended.
    """

    def __init__(self, backend: Backend, *, lease_seconds: float = 90.0, keep_days: float = 365) -> None:
        self._backend = backend
        self._lease_seconds = lease_seconds
        self._keep_seconds = keep_days * 86_400

    def check(self) -> None:
        """Refuse a ledger that cannot be read or written; changes nothing.

        Raises:
            LedgerError: What is wrong.
        """
        nobody = JobRecord("-", "-")
        self._backend.read(nobody.job_id)
        with suppress(ConflictError):  # There is no such record to be replaced, but who asked may write.
            self._backend.replace(nobody, nobody)

    def begin(
        self,
        job: NewJob,
        holder: Holder,
        flow_run_id: str = "",
        node: str = "",
        is_done: Callable[[JobRecord], bool] = lambda _: False,
    ) -> JobRecord:
        """Begin a job, or another attempt at one that ended or whose holder is dead.

        A holder that may be alive is waited for until its lease has run out: seconds to `lease_seconds`. Of a holder on
        this machine it is known at once.

        Args:
            job: What to do.
            holder: The process that will do it.
            flow_run_id: Of Prefect.
            node: Where it runs.
            is_done: Asked about the record of a published job: whether it stays, and nothing is begun.

        Returns:
            The record, which names this attempt's writes as allowed. What an earlier attempt found is gone from it,
            except for its history.

        Raises:
            AccessError: It is a job of another owner.
            DoneBeforeError: It is done.
            LedgerError: It is running already.
        """
        stored: JobRecord | None = None  # As most often; if not, the first write tells.
        while True:
            now, write_id = time.time(), new_write_id()
            attempt = stored.attempt + 1 if stored else 1
            record = JobRecord(
                job_id=job.job_id,
                owner=job.owner,
                source=job.source,
                source_version=job.source_version,
                source_bytes=job.source_bytes,
                destination=job.destination,
                settings=job.settings,
                flow_run_id=flow_run_id,
                attempt=attempt,
                version=stored.version + 1 if stored else 1,
                write_id=write_id,
                holder=holder,
                lease_until=now + self._lease_seconds,
                created_at=stored.created_at if stored else now,
                updated_at=now,
                history=(
                    *(stored.history if stored else ()),
                    Transition(JobState.CREATED, now, attempt, node, write_id),
                ),
            )
            try:
                return self._store(record.bounded(), stored)
            except ConflictError as conflict:
                met, seen_before = conflict.stored, stored is not None
            if met is not None:
                self._check_owner(met, job.job_id, job.owner)
                if seen_before and not met.ended:  # Somebody else was faster to begin it again.
                    raise _running(met)
                met = self._await_free(met)
                if met is not None and met.state == JobState.PUBLISHED and is_done(met):
                    raise DoneBeforeError(met)
            stored = met

    def advance(self, record: JobRecord, state: JobState, *, write_id: str = "", **facts: Any) -> JobRecord:
        """Move a job forward, or note facts in the state it is in; renews the lease.

        Args:
            record: What the writer knows of the job. Other writes of the same holder may have come after it.
            state: The new state, or that of `record`.
            write_id: From `new_write_id`, for writers who try again: a write that failed may still arrive, and is then
                known as the same.
            **facts: Fields of `JobRecord` to set.

        Returns:
            The record as it is stored now.

        Raises:
            LostJobError: The job has ended, is in this state or beyond it, or was taken over by another attempt.
            LedgerError: The ledger cannot be reached.
        """
        return self._change(record, state, facts, write_id)

    def renew(self, record: JobRecord, **facts: Any) -> JobRecord:
        """Renew the lease and note facts, in whatever state the job is; see `advance`."""
        return self._change(record, None, facts)

    def publish(self, record: JobRecord, output: dict[str, Any], *, write_id: str = "", **facts: Any) -> JobRecord:
        """End a job whose result is where it was asked for; see `advance`."""
        return self._change(record, JobState.PUBLISHED, {**facts, "output": output}, write_id)

    def fail(self, record: JobRecord, error: JobError, *, write_id: str = "", **facts: Any) -> JobRecord:
        """End a job that failed; see `advance`."""
        return self._change(record, JobState.FAILED, {**facts, "error": error}, write_id)

    def cancel(
        self, record: JobRecord, message: str, *, kind: str = "cancelled", write_id: str = "", **facts: Any
    ) -> JobRecord:
        """End a job that nobody wants any more, or not now (`kind` is then `paused`, and what it finished is kept).

        Its holder, if that is another process, is refused from now on.
        """
        error = JobError(phase=record.state, kind=kind, message=message)
        return self._change(record, JobState.CANCELLED, {**facts, "error": error}, write_id)

    def get(self, job_id: str, owner: str) -> JobRecord:
        """The record of one's own job.

        Raises:
            AccessError: There is none; the message does not tell whether somebody else has a job of that id.
        """
        return self._check_owner(self._backend.read(job_id), job_id, owner)

    def find(self, job_id: str) -> JobRecord | None:
        """The record of anybody's job, for the system itself."""
        return self._backend.read(job_id)

    def by_owner(self, owner: str, *, since: float | None = None, limit: int | None = None) -> list[JobRecord]:
        """Somebody's jobs, newest first.

        Args:
            owner: Who.
            since: Only jobs created then or later.
            limit: How many at most.
        """
        return self._backend.by_owner(owner, since, limit)

    def by_state(self, state: JobState, *, before: float | None = None, limit: int | None = None) -> list[JobRecord]:
        """Everybody's jobs in one state, for the system itself; the one that was written longest ago first.

        Args:
            state: Which. The list may be seconds old: `advance` and the others refuse what is true no more.
            before: Only jobs that were last written before then.
            limit: How many at most.
        """
        return self._backend.by_state(state, before, limit)

    def abandoned(self, record: JobRecord) -> bool:
        """Whether a job has not ended and nobody works on it any more."""
        return not record.ended and (time.time() >= record.lease_until or is_gone(record.holder))

    def delete(self, job_id: str) -> None:
        """Remove the record of a job that has ended; nothing happens if there is none.

        Raises:
            LedgerError: The job has not ended.
        """
        while (record := self._backend.read(job_id)) is not None:
            if not record.ended:
                raise LedgerError(f"job {job_id} has not ended", "Cancel it first")
            try:
                return self._backend.delete(record)
            except ConflictError:
                continue  # Begun again, or removed by somebody else.

    def _await_free(self, first: JobRecord) -> JobRecord | None:
        """The record of a job that nobody works on, once that is sure; `None` if it is there no more."""
        stored: JobRecord | None = first
        # By our own clock too: that of the holder may be wrong by hours.
        deadline = time.monotonic() + first.lease_until - first.updated_at
        while stored is not None and not stored.ended and not self.abandoned(stored):
            if stored.write_id != first.write_id or is_alive(stored.holder):
                raise _running(stored)
            if (left := deadline - time.monotonic()) <= 0:
                break
            time.sleep(min(_POLL_SECONDS, left))
            with suppress(LedgerError):  # The write that follows is refused if something happened.
                stored = self._backend.read(first.job_id)
        return stored

    def _change(
        self, record: JobRecord, state: JobState | None, facts: dict[str, Any], write_id: str = ""
    ) -> JobRecord:
        if unknown := facts.keys() - FACTS:
            raise TypeError(f"not facts of a job: {', '.join(sorted(unknown))}")
        seen = record
        for _ in range(_TRIES):
            _check_change(record, seen, state)
            try:
                return self._store(self._changed(seen, state, facts, write_id or new_write_id()), seen)
            except ConflictError as conflict:
                stored = conflict.stored
            time.sleep(random.uniform(0, _PAUSE_SECONDS))
            if stored is None:
                raise LostJobError(f"job {record.job_id} is in the ledger no more", "Begin it again")
            seen = stored
        raise LedgerError(f"the record of job {record.job_id} changes faster than it can be written", "Try again")

    def _changed(self, seen: JobRecord, state: JobState | None, facts: dict[str, Any], write_id: str) -> JobRecord:
        now = time.time()
        changed = replace(seen, **facts, version=seen.version + 1, write_id=write_id, updated_at=now)
        if state is not None and state != seen.state:
            node = seen.history[-1].node if seen.history else ""
            reached = Transition(state, now, seen.attempt, node, write_id)
            changed = replace(changed, state=state, history=(*seen.history, reached))
        if changed.ended:
            changed = replace(changed, expires_at=int(now + self._keep_seconds))
        else:
            changed = replace(changed, lease_until=now + self._lease_seconds)
        return changed.bounded()

    def _store(self, record: JobRecord, seen: JobRecord | None) -> JobRecord:
        """Write a record, and look whether it was written if that is not sure.

        Raises:
            ConflictError: Another write came first.
        """
        try:
            if seen is None:
                self._backend.create(record)
            else:
                self._backend.replace(record, seen)
            return record
        except (ConflictError, LedgerError) as error:
            # A write whose answer is lost is made again, by the client of AWS on its own, and then meets itself.
            stored = error.stored if isinstance(error, ConflictError) else self._backend.read(record.job_id)
            if stored is not None and _has_write(stored, record.write_id):
                return stored
            raise

    def _check_owner(self, record: JobRecord | None, job_id: str, owner: str) -> JobRecord:
        if record is None or record.owner != owner:
            raise AccessError(
                f"there is no job {job_id} that {owner} may see or run", "Check its id, or choose another destination"
            )
        return record


def _check_change(known: JobRecord, stored: JobRecord, state: JobState | None) -> None:
    """Refuse what a writer who knows `known` may not write over `stored`."""
    job = f"job {known.job_id}"
    # A record that was deleted and made anew has an attempt of the same number.
    if (known.attempt, known.created_at) != (stored.attempt, stored.created_at):
        raise LostJobError(
            f"{job} was taken over by attempt {stored.attempt} on {stored.holder}", "Leave it to that one, or cancel it"
        )
    if stored.ended:
        raise LostJobError(f"{job} has ended already ({stored.state})", "Begin it again if it is still wanted")
    if state is None or (state == known.state == stored.state):
        return
    if not may_follow(stored.state, state):
        raise LostJobError(f"{job} is {stored.state} and cannot go to {state}", "Read its record again")


def _has_write(stored: JobRecord, write_id: str) -> bool:
    return write_id in (stored.write_id, *(item.write_id for item in stored.history))


def _running(record: JobRecord) -> LedgerError:
    run = f"flow run {record.flow_run_id}, " if record.flow_run_id else ""
    return LedgerError(
        f"job {record.job_id} is running already ({run}on {record.holder})", "Wait for it or cancel it first"
    )
