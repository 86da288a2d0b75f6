"""The environment of ParallelCluster, made once for each version of its lock and kept."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra import debian
from tests.infra.aws.cluster.cloud import CHECKOUT


@pytest.fixture(scope="session")
def parallelcluster() -> Path:
    """The interpreter of an environment that has ParallelCluster; the tests are skipped where it is not to be had."""
    folder = CHECKOUT / "infra/aws/cluster"
    key = hashlib.sha256((folder / "requirements.lock").read_bytes() + sys.version.encode()).hexdigest()[:12]
    cache = debian.cache_folder("parallelcluster")
    with debian.locked(cache):
        done = subprocess.run(
            ["sh", folder / "environment.sh", cache / key],
            env={**os.environ, "SUPERRES_PYTHON": sys.executable},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "WARNING" not in line]
        pytest.skip(f"ParallelCluster cannot be installed: {said[-1] if said else done.returncode}")
    return cache / key / "bin/python"
