"""Fixtures that tests of several parts share."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from random import Random

import pytest

from infra.prefect_server import Api, ensure_api
from tests.installation import Installation, running_installation

# A shell starts background commands with SIGINT ignored, and so would be everything that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A private Prefect server for all tests of the session; flows called in this process use it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_API_URL", raising=False)
        # No profile of whoever runs the tests, and no results of tests among theirs.
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect-home")))
        with ensure_api(home=tmp_path_factory.mktemp("prefect-server")) as api:
            yield api


@pytest.fixture(scope="session")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """What `make ui` brings up, with runs and schedules looked at every second, for all tests of the session."""
    often = {"PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "1"}
    with running_installation(tmp_path_factory.mktemp("installation"), **often) as installation:
        yield installation


@pytest.fixture
def chance() -> Random:
    """A source of chance; shows its seed when the test fails."""
    seed = int(os.environ.get("CHAOS_SEED") or time.time_ns())
    print(f"CHAOS_SEED={seed}")
    return Random(seed)
