"""A running Slurm for all tests of a session.

A conftest imports the fixture: `from tests.infra.slurm_cluster import slurm`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from infra.slurm import DEVELOPMENT, LocalSlurm, Programs, SlurmMissingError, find_programs

__all__ = ["programs_or_skip", "slurm"]


@pytest.fixture(scope="session")
def slurm() -> Iterator[LocalSlurm]:
    """A cluster with the partitions `cpu` and `gpu`; `sbatch` and the like use it until the end of the session.

    Tests that break something, or need it empty, start one of their own; it takes a tenth of a second.
    """
    programs_or_skip()
    with LocalSlurm(DEVELOPMENT) as cluster, pytest.MonkeyPatch.context() as patch:
        # Where the tests run as a job of another cluster, or with defaults for one.
        for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
            patch.delenv(name)
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        yield cluster


def programs_or_skip() -> Programs:
    """Slurm's programs; the test that asks is skipped where they are not to be had."""
    try:
        return find_programs()
    except SlurmMissingError as error:
        pytest.skip(str(error))
