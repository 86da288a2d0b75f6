"""Fixtures that tests of several parts share."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Final

import pytest

from infra.prefect_server import Api, ensure_api
from tests.installation import Installation, running_installation

# A shell starts background commands with SIGINT ignored, and so would be everything that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


#: Files that take minutes, most of them in waiting. They begin first: what is left at the end is short.
LONGEST: Final = (
    "infra/test_slurm_pools.py",
    "flows/test_kill_and_resume.py",
    "flows/test_kill_and_publish.py",
    "flows/test_library.py",
    "flows/test_end_to_end.py",
    "flows/test_buttons.py",
    "browser/test_ui.py",
    "notebooks/test_notebooks.py",
    "flows/test_slurm_job.py",
    "flows/test_many_runs.py",
    "flows/test_faults.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order tests by files, the longest first."""
    ranks = {Path(__file__).parent / file: rank for rank, file in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


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
