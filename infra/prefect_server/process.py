"""The process of a private Prefect server. Started by `infra.prefect_server`, which writes one line of JSON to stdin.

Everything here is about starting fast and staying out of the way: imports without garbage collection, a database that
is made from a schema file instead of a hundred migrations, no services but those that record task runs. The end of
stdin, which comes with the end of the process that holds its other side, ends the server.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib.metadata
import json
import os
import socket
import sqlite3
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

#: Seconds the server goes on reading at its end, at most.
_LAST_WORDS = 3.0

#: What a private server does not do. Each entry costs time at the start, wakes the process up, or calls home.
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
    # Looks for installed collections (and imports them: Dask, AWS) just to see whether blocks changed.
    "PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
    "PREFECT_LOGGING_LEVEL": "ERROR",
    "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_CLEANUP_RECONCILER_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_FOREMAN_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_PAUSE_EXPIRATIONS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_REPOSSESSOR_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "false",
    # Task runs live in this service: workers report states as events, it writes them down.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_ENABLED": "true",
    # Several states per transaction, at most a second late.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "25",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "25",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_EVENTS_STREAM_OUT_ENABLED": "false",
}


def main() -> None:
    """Serve until stdin ends."""
    settings = json.loads(sys.stdin.buffer.readline())
    gc.disable()  # Imports only make objects that stay; collecting among them costs a tenth of the start.
    home = Path(settings["home"])
    database = database_of(home)
    os.environ.update(QUIET)
    os.environ["PREFECT_HOME"] = str(home)
    os.environ["PREFECT_SERVER_UI_ENABLED"] = str(bool(settings["ui"])).lower()
    os.environ["PREFECT_SERVER_API_AUTH_STRING"] = settings["password"]
    os.environ["PREFECT_SERVER_DATABASE_MIGRATE_ON_START"] = "false"
    prepare_database(home, database)
    os.environ["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = f"sqlite+aiosqlite:///{database}"
    serve(settings)


def database_of(home: Path) -> Path:
    """Where the database of the installed Prefect lies in a home."""
    return home / f"prefect-{importlib.metadata.version('prefect')}.db"


def prepare_database(home: Path, database: Path) -> None:
    """Make the database of this version of Prefect where it does not exist yet.

    One file per version: no migration of a file that an older server may have open. It appears complete, by a rename.
    """
    with (home / "database.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if database.exists():
            return
        draft = database.with_suffix(".draft")
        for leftover in home.glob(f"{draft.name}*"):
            leftover.unlink()
        schema = Path(__file__).parent / "schema" / f"{database.stem}.sql"
        if schema.exists():
            with contextlib.closing(sqlite3.connect(draft)) as connection:
                connection.executescript(f"BEGIN; {schema.read_text()} COMMIT;")
                connection.execute("PRAGMA journal_mode = WAL")
        else:
            migrate(draft)
        draft.rename(database)


def migrate(database: Path) -> None:
    """Make a database by Prefect's own migrations: many seconds, but right for every version."""
    os.environ["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = f"sqlite+aiosqlite:///{database}"
    import asyncio

    from prefect.server.database import provide_database_interface

    async def create() -> None:
        interface = provide_database_interface()
        await interface.create_db()
        engine = await interface.engine()
        await engine.dispose()

    asyncio.run(create())
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def schema_of(database: Path) -> str:
    """The SQL that makes an empty database like this one, its place in the history of migrations included."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        statements = connection.execute(
            "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY type = 'index', name"
        ).fetchall()
    sql = "\n\n".join([f"{statement};" for (statement,) in statements])
    sql += f"\n\nINSERT INTO alembic_version VALUES ('{revision}');\n"
    return "\n".join(line.rstrip() for line in sql.splitlines()) + "\n"


def write_schema() -> Path:
    """Write the schema file for the installed Prefect: `python infra/prefect_server/process.py --write-schema`."""
    version = importlib.metadata.version("prefect")
    target = Path(__file__).parent / "schema" / f"prefect-{version}.sql"
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "prefect.db"
        migrate(database)
        target.write_text(
            f"-- The database of Prefect {version} as its migrations make it. Written by process.py --write-schema.\n\n"
            + schema_of(database)
        )
    return target


def serve(settings: dict[str, Any]) -> None:
    """Run the web server on the socket it was given; say so on the pipe it was given."""
    import uvicorn
    from prefect.server.api.server import create_app

    from infra.prefect_server.sqlite import repair

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            gc.freeze()
            gc.enable()
            if self.started:
                os.write(settings["ready"], b"1")
                os.close(settings["ready"])

    repair()
    if not settings["ui"]:
        without_background_tasks()
    app = create_app(ephemeral=not settings["ui"], final=True)
    server = Server(
        uvicorn.Config(
            app,
            log_level="error",
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=1,
        )
    )
    threading.Thread(target=_end_with_user, args=(server,), daemon=True).start()
    server.run([socket.socket(fileno=settings["listener"])])


def without_background_tasks() -> None:
    """Leave out the queue of tasks that tidy up after deployments and deleted runs.

    A server for one command has neither, and the queue's worker looks for tasks forty times a second.
    """
    from prefect.server.api import server

    server.background_worker = lambda *_, **__: contextlib.nullcontext()  # type: ignore[assignment]


def _end_with_user(server: Any) -> None:
    sys.stdin.buffer.read()
    # The states of the last task runs may still be on their way from the web socket to the recorder, which stops
    # without reading on.
    deadline = time.monotonic() + _LAST_WORDS
    quiet = 0
    while quiet < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
        quiet = quiet + 1 if _unread_messages() == 0 else 0
    server.should_exit = True


def _unread_messages() -> int:
    from prefect.server.utilities.messaging.memory import Topic

    subscriptions = [subscription for topic in Topic._topics.values() for subscription in topic._subscriptions]
    return sum(subscription._queue.qsize() + subscription._retry.qsize() for subscription in subscriptions)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write-schema"]:
        print(write_schema())
    else:
        main()
