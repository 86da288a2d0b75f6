"""The job ledger: who owns a job, what went in, what came out, how far it is, what went wrong.

ledger = open_ledger(LedgerSettings())
record = ledger.begin(NewJob("ann", source, version, destination, settings), this_holder())
record = ledger.advance(record, JobState.STAGING)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tasks.aws import AwsSettings
from tasks.home import default_home
from tasks.ledger.backend import Backend
from tasks.ledger.ledger import Ledger


@dataclass(frozen=True)
class LedgerSettings:
    """Where the ledger is.

    Attributes:
        file: Of SQLite, for runs that start on one machine; empty for `$SUPERRES_HOME/jobs.sqlite`.
        table: Of DynamoDB; empty for the file.
        aws: How to reach the table.
    """

    file: str = ""
    table: str = ""
    aws: AwsSettings = field(default_factory=AwsSettings)


def open_ledger(settings: LedgerSettings) -> Ledger:
    """The ledger, ready for use.

    Raises:
        LedgerError: It cannot be used.
    """
    backend: Backend
    if settings.table:
        from tasks.ledger.dynamodb import DynamoBackend

        backend = DynamoBackend(settings.aws, settings.table)
    else:
        from tasks.ledger.sqlite import SqliteBackend

        backend = SqliteBackend(Path(settings.file).expanduser() if settings.file else default_home() / "jobs.sqlite")
    backend.set_up()
    return Ledger(backend)
