"""The environment of ParallelCluster, made once for each version of its lock and kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.infra.aws.environments import AWS, environment


@pytest.fixture(scope="session")
def parallelcluster() -> Path:
    """The interpreter of an environment that has ParallelCluster; the tests are skipped where it is not to be had."""
    return environment("parallelcluster", "cluster/requirements.lock", AWS / "cluster" / ".venv") / "python"
