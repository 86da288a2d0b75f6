"""The process that a batch job runs: what it waits for before it gives up."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distributed import LocalCluster

from tests.waiting import eventually

#: Seconds that the modules of the worker take to import, and that it looks for a scheduler.
IMPORTS, PATIENCE = 4.0, 2.0


@contextmanager
def node(scheduler: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A job's process on this machine, whose worker has something slow to import."""
    (folder / "slow_to_import.py").write_text(
        f"import pathlib, time\npathlib.Path({str(folder / 'imported')!r}).touch()\ntime.sleep({IMPORTS})\n"
    )
    options = ("--name", "gpu-0", "--pool", "gpu", "--nthreads", "1", "--imports", "slow_to_import")
    process = subprocess.Popen(
        [sys.executable, "-m", "infra.pools.node", scheduler, *options, "--death-timeout", str(PATIENCE),
         "--local-directory", str(folder)],
        env={**os.environ, "PYTHONPATH": f"{folder}:{Path(__file__).parents[2]}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def test_time_to_start_is_not_time_without_a_scheduler(tmp_path: Path) -> None:
    with (
        LocalCluster(n_workers=0, dashboard_address=None) as cluster,
        node(cluster.scheduler_address, tmp_path) as process,
    ):
        eventually(lambda: cluster.scheduler.workers or process.poll() is not None)
        assert [worker.name for worker in cluster.scheduler.workers.values()] == ["gpu-0"]


def test_gives_up_without_a_scheduler(tmp_path: Path) -> None:
    with LocalCluster(n_workers=0, dashboard_address=None) as cluster:
        address = cluster.scheduler_address
    with node(address, tmp_path) as process:
        _, errors = process.communicate(timeout=60)
        assert process.returncode not in (0, None)
    assert address in errors


def test_gives_up_when_the_scheduler_goes_while_it_starts(tmp_path: Path) -> None:
    with (
        LocalCluster(n_workers=0, dashboard_address=None) as cluster,
        node(cluster.scheduler_address, tmp_path) as process,
    ):
        address = cluster.scheduler_address
        # The worker imports, so the nanny has found the scheduler.
        eventually(lambda: (tmp_path / "imported").exists() or process.poll() is not None)
        cluster.close()
        _, errors = process.communicate(timeout=60)
        assert process.returncode not in (0, None)
    assert f"no scheduler at {address} within {PATIENCE:g} s" in errors
