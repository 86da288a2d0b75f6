"""Records in a file, for runs that start on one machine: SQLite's log is no use on a file system of the network.

Every call opens the file anew, so threads and forked processes share nothing, and is one statement, so it needs no
transaction of its own: SQLite takes the lock for writing before it looks at the data.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from tasks.errors import LedgerError
from tasks.ledger.backend import ConflictError
from tasks.ledger.record import JobRecord, JobState

#: Seconds to wait for other writers, each of which is done in milliseconds.
_BUSY_SECONDS: Final = 30.0

_SCHEMA: Final = (
    """
    CREATE TABLE IF NOT EXISTS jobs (
        job_id TEXT PRIMARY KEY,
        owner TEXT NOT NULL,
        state TEXT NOT NULL,
        created_at REAL NOT NULL,
        updated_at REAL NOT NULL,
        expires_at INTEGER,
        write_id TEXT NOT NULL,
        record TEXT NOT NULL
    )
    """,
    "CREATE INDEX IF NOT EXISTS by_owner ON jobs (owner, created_at)",
    "CREATE INDEX IF NOT EXISTS by_state ON jobs (state, updated_at)",
    "CREATE INDEX IF NOT EXISTS by_end ON jobs (expires_at)",
)

#: What statements look at; `record` holds everything once more, as JSON.
_KEYS: Final = ("job_id", "owner", "state", "created_at", "updated_at", "expires_at", "write_id")
_COLUMNS: Final = (*_KEYS, "record")

_REMEDIES: Final = {
    "SQLITE_FULL": "Free space there",
    "SQLITE_IOERR": "Check the disk and your quota on it",
    "SQLITE_BUSY": "Try again; another process holds it",
    "SQLITE_READONLY": "Make it writable, or name another file",
    "SQLITE_NOTADB": "Move it away, or name another file",
    "SQLITE_CORRUPT": "Move it away, or bring back a copy",
}


class SqliteBackend:
    """Records in one file, which only its user may read.

    Args:
        path: The file; made by `set_up`, with its folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def set_up(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._make()
        except OSError as error:
            raise self._failed(error.strerror or str(error), "Name another file") from error
        with self._open() as file:
            file.execute("PRAGMA journal_mode=WAL")
            for statement in _SCHEMA:
                file.execute(statement)
        self.purge(time.time())

    def _make(self) -> None:
        """Make the file, empty, where there is none.

        It is never opened but by SQLite: to close it once takes the locks of all threads of this process off it, and
        another process then removes the log they write to (https://www.sqlite.org/howtocorrupt.html, 2.2).
        """
        if not self._path.exists():
            descriptor, empty = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}-")
            try:
                os.close(descriptor)
                with suppress(FileExistsError):
                    os.link(empty, self._path)
            finally:
                Path(empty).unlink()
        elif not os.access(self._path, os.R_OK | os.W_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def purge(self, now: float) -> int:
        """Remove the records that are kept until before `now`; their number."""
        return self._write("DELETE FROM jobs WHERE expires_at < ?", [now])

    def read(self, job_id: str) -> JobRecord | None:
        return next(iter(self._select("WHERE job_id = ?", [job_id], None)), None)

    def create(self, record: JobRecord) -> None:
        marks = ", ".join("?" * len(_COLUMNS))
        statement = f"INSERT INTO jobs ({', '.join(_COLUMNS)}) VALUES ({marks}) ON CONFLICT DO NOTHING"
        if not self._write(statement, _row(record)):
            raise ConflictError(self.read(record.job_id))

    def replace(self, record: JobRecord, seen: JobRecord) -> None:
        assignments = ", ".join(f"{name} = ?" for name in _COLUMNS)
        statement = f"UPDATE jobs SET {assignments} WHERE job_id = ? AND write_id = ?"
        if not self._write(statement, [*_row(record), seen.job_id, seen.write_id]):
            raise ConflictError(self.read(record.job_id))

    def delete(self, seen: JobRecord) -> None:
        if not self._write("DELETE FROM jobs WHERE job_id = ? AND write_id = ?", [seen.job_id, seen.write_id]):
            raise ConflictError(self.read(seen.job_id))

    def by_owner(self, owner: str, since: float | None, limit: int | None) -> list[JobRecord]:
        where = "WHERE owner = ? AND created_at >= ? ORDER BY created_at DESC"
        return self._select(where, [owner, since or 0.0], limit)

    def by_state(self, state: JobState, before: float | None, limit: int | None) -> list[JobRecord]:
        where = "WHERE state = ? AND updated_at < ? ORDER BY updated_at"
        return self._select(where, [str(state), float("inf") if before is None else before], limit)

    def _select(self, where: str, values: list[Any], limit: int | None) -> list[JobRecord]:
        statement = f"SELECT record FROM jobs {where} LIMIT ?"
        with self._open() as file:
            rows = file.execute(statement, [*values, -1 if limit is None else limit]).fetchall()
        try:
            return [JobRecord.from_dict(json.loads(text)) for (text,) in rows]
        except json.JSONDecodeError as error:
            raise self._failed(f"a record is no JSON: {error}", _REMEDIES["SQLITE_CORRUPT"]) from error

    def _write(self, statement: str, values: list[Any]) -> int:
        with self._open() as file:
            return file.execute(statement, values).rowcount

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            # Without the last part SQLite would make a missing file anew, empty.
            source = f"{self._path.absolute().as_uri()}?mode=rw"
            connection = sqlite3.connect(source, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)
            with closing(connection):
                yield connection
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "")
            remedy = next((text for code, text in _REMEDIES.items() if name.startswith(code)), "Name another file")
            raise self._failed(str(error), remedy) from error

    def _failed(self, problem: str, remedy: str) -> LedgerError:
        return LedgerError(f"the job ledger {self._path} cannot be used ({problem})", remedy)


def _row(record: JobRecord) -> list[Any]:
    data = record.to_dict()
    return [*(data[name] for name in _KEYS), json.dumps(data)]
