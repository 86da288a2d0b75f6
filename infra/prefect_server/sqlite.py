"""Two repairs of how a Prefect server uses SQLite, without which many runs at once make it wait, or stand still."""

from __future__ import annotations

from typing import Any


def repair() -> None:
    """Have this process, a Prefect server, lock from the start of a transaction and close what failed.

    Called before the server's application is made. Does nothing to a server on PostgreSQL.
    """
    _lock_from_the_start()
    _close_what_failed()


def _lock_from_the_start() -> None:
    """Have every transaction wait for SQLite's write lock when it begins.

    Prefect lets most of them begin as readers. One that then writes while another has written in between is told
    "database is locked" at once, whatever the timeout; the server answers 503, and a worker waits two seconds before it
    asks again, with an idle GPU.
    """
    from prefect.server.database.configurations import AioSqliteConfiguration

    begin = AioSqliteConfiguration.begin_transaction

    def begin_locked(self: Any, session: Any, with_for_update: bool = False) -> Any:
        return begin(self, session, with_for_update=True)

    AioSqliteConfiguration.begin_transaction = begin_locked  # type: ignore[method-assign]


def _close_what_failed() -> None:
    """Close a cursor whose statement failed or was cancelled, in the thread of its connection.

    SQLAlchemy's adapter forgets it. The garbage collector then finds it, mostly in the thread of the event loop, and
    has to reset its statement, which waits for the connection; that may be waiting for the write lock in a thread of
    its own, and whoever holds the write lock needs the event loop to commit. Nothing moves for the 60 s that Prefect
    lets SQLite wait, and every transaction after that fails.
    """
    import aiosqlite

    def closing(name: str) -> None:
        method = getattr(aiosqlite.Cursor, name)

        async def run(self: aiosqlite.Cursor, *arguments: Any) -> Any:
            try:
                return await method(self, *arguments)
            except BaseException:
                await self.close()
                raise

        setattr(aiosqlite.Cursor, name, run)

    for name in ("execute", "executemany", "fetchall"):
        closing(name)
