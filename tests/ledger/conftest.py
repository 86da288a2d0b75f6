"""The two places of a ledger: a file, and a table of an AWS on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tasks.aws import AwsSettings
from tasks.ledger import Ledger, LedgerSettings
from tasks.ledger.backend import Backend
from tasks.ledger.dynamodb import DynamoBackend, create_table
from tasks.ledger.sqlite import SqliteBackend
from tests.aws import running_aws


@pytest.fixture(scope="module")
def aws() -> Iterator[AwsSettings]:
    with running_aws() as settings:
        yield settings


@pytest.fixture(params=["sqlite", "dynamodb"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> LedgerSettings:
    """A place without records."""
    if request.param == "sqlite":
        return LedgerSettings(file=str(tmp_path / "ledger" / "jobs.sqlite"))
    settings = LedgerSettings(table=f"jobs-{uuid4()}", aws=request.getfixturevalue("aws"))
    create_table(settings.aws, settings.table)
    return settings


@pytest.fixture
def backend(settings: LedgerSettings) -> Backend:
    backend = DynamoBackend(settings.aws, settings.table) if settings.table else SqliteBackend(Path(settings.file))
    backend.set_up()
    return backend


@pytest.fixture
def ledger(backend: Backend) -> Ledger:
    return Ledger(backend)
