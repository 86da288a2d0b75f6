"""What the ledger needs of the place that holds its records."""

from __future__ import annotations

from typing import Protocol

from tasks.ledger.record import JobRecord, JobState


class ConflictError(Exception):
    """The stored record is not the one that the writer saw.

    Args:
        stored: The one that is there, `None` if there is none.
    """

    def __init__(self, stored: JobRecord | None) -> None:
        super().__init__()
        self.stored = stored


class Backend(Protocol):
    """Holds records. Safe to use from several threads and processes; raises `LedgerError` when it cannot be used."""

    def set_up(self) -> None:
        """Make ready what can be made ready from here; fail early otherwise."""

    def read(self, job_id: str) -> JobRecord | None:
        """The record as the last write left it."""

    def create(self, record: JobRecord) -> None:
        """Write a record that must not exist, or raise `ConflictError`."""

    def replace(self, record: JobRecord, seen: JobRecord) -> None:
        """Write a record over exactly the write that was seen, or raise `ConflictError`."""

    def delete(self, seen: JobRecord) -> None:
        """Remove a record if it is the one that was seen, or raise `ConflictError`."""

    def by_owner(self, owner: str, since: float | None, limit: int | None) -> list[JobRecord]:
        """Records of jobs created at `since` or later, newest first."""

    def by_state(self, state: JobState, before: float | None, limit: int | None) -> list[JobRecord]:
        """Records last written before `before`, longest unchanged first."""
