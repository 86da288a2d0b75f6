"""A Prefect server on SQLite: what failed holds nothing up."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
from pathlib import Path

import aiosqlite
import pytest
from prefect.server.database.configurations import AioSqliteConfiguration

from infra.prefect_server.sqlite import repair


@pytest.fixture(autouse=True)
def repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    """The repairs in this process, for one test."""
    for owner, name in (
        (AioSqliteConfiguration, "begin_transaction"),
        (aiosqlite.Cursor, "execute"),
        (aiosqlite.Cursor, "executemany"),
        (aiosqlite.Cursor, "fetchall"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    repair()


def test_collecting_a_failed_statement_does_not_wait_for_its_connection(tmp_path: Path) -> None:
    def connect() -> aiosqlite.Connection:
        # As SQLAlchemy connects; patience is set by the statements below.
        return aiosqlite.connect(tmp_path / "a.db", isolation_level=None, check_same_thread=False, timeout=0)

    async def write_in_vain(connection: aiosqlite.Connection) -> Exception:
        cursor = await connection.cursor()
        with pytest.raises(sqlite3.OperationalError, match="database is locked") as failure:
            await cursor.execute("INSERT INTO t VALUES (2)")
        return failure.value  # Its traceback has the cursor, as in SQLAlchemy's adapter.

    async def work() -> list[int]:
        async with connect() as one, connect() as two:
            await one.execute("CREATE TABLE t (n INTEGER)")
            await one.execute("BEGIN IMMEDIATE")
            await one.execute("INSERT INTO t VALUES (1)")
            failed = [await write_in_vain(two)]
            await two.execute("PRAGMA busy_timeout = 5000")
            waiting = asyncio.ensure_future(two.execute("INSERT INTO t VALUES (3)"))
            await asyncio.sleep(0.5)  # Until it waits for the write lock.
            failed.clear()
            gc.collect()  # In the thread of the event loop, which has to go on to the commit below.
            await one.execute("COMMIT")
            await waiting
            return [number for (number,) in await two.execute_fetchall("SELECT n FROM t ORDER BY n")]

    assert asyncio.run(work()) == [1, 3]
