"""Clusters for the tests of this folder, which leave the environment of the session alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from infra.slurm import LocalSlurm, Programs
from tests.infra.slurm_cluster import programs_or_skip


@pytest.fixture(scope="session")
def slurm_programs() -> Programs:
    """The programs of Slurm. Tests that need them are skipped where they are not to be had."""
    return programs_or_skip()


@pytest.fixture(scope="session")
def cluster(slurm_programs: Programs) -> Iterator[LocalSlurm]:
    """A cluster that no test breaks."""
    with LocalSlurm() as cluster:
        yield cluster
