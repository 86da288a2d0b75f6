"""Where a process runs and how many cores it may use, in and outside of a Slurm job."""

from __future__ import annotations

import os
import socket

import pytest

from tasks.cores import usable_cores
from tasks.place import Place, this_place

VARIABLES = ("SLURMD_NODENAME", "SLURM_JOB_ID", "SUPERRES_WORKER_LOG", "SLURM_CPUS_PER_TASK")


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Slurm job, even if the tests run in one."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


class TestPlace:
    def test_outside_of_a_job(self) -> None:
        place = this_place()
        assert place == Place(socket.gethostname(), "", "", os.getpid())
        assert str(place) == f"{socket.gethostname()} process {os.getpid()}"

    def test_in_a_job(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Slurm's name of a node need not be its host name.
        monkeypatch.setenv("SLURMD_NODENAME", "gpu-node-3")
        monkeypatch.setenv("SLURM_JOB_ID", "4711")
        monkeypatch.setenv("SUPERRES_WORKER_LOG", "/logs/superres-gpu-4711.log")
        place = this_place()
        assert place == Place("gpu-node-3", "4711", "/logs/superres-gpu-4711.log", os.getpid())
        assert str(place) == "gpu-node-3 job 4711"

    def test_in_a_job_without_a_log(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", "4711")
        assert this_place() == Place(socket.gethostname(), "4711", "", os.getpid())

    def test_local_worker_with_a_log(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SUPERRES_WORKER_LOG", "/logs/worker.log")
        place = this_place()
        assert (place.log, str(place)) == ("/logs/worker.log", f"{socket.gethostname()} process {os.getpid()}")


class TestCores:
    def test_job_that_reserved_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
        assert usable_cores() == 1

    @pytest.mark.parametrize("reserved", ["100000", "", "some", "-1", "1.5"])
    def test_job_that_says_nothing_useful(self, monkeypatch: pytest.MonkeyPatch, reserved: str) -> None:
        cores = usable_cores()
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", reserved)
        assert usable_cores() == cores

    def test_never_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", "0")
        assert usable_cores() == 1
