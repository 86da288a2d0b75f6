"""Processes are known by number and start, and nobody else's is ever hit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.slurm.daemons import Daemons, Process, kill_job_processes
from tests.waiting import eventually


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "100"]) as process:
        yield process
        process.kill()


def test_a_process_that_got_the_number_later_is_left_alone(sleeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
    stranger = Process.of(sleeper.pid)
    assert stranger is not None
    record = tmp_path / "daemons.json"
    record.write_text(json.dumps({"slurmctld": {"pid": stranger.pid, "started": stranger.started - 1}}))
    daemons = Daemons(record)
    assert daemons.started() == ["slurmctld"]
    assert daemons.names() == []
    daemons.end("slurmctld", kill=True)
    assert stranger.runs
    assert daemons.started() == []


def test_another_process_ends_it(tmp_path: Path) -> None:
    record, output = tmp_path / "daemons.json", tmp_path / "output"
    mine, other = Daemons(record), Daemons(record)
    mine.start(
        "it", ["sh", "-c", "echo here; exec sleep 100"], environment=os.environ, output=output, ends_with_me=True
    )
    assert other.runs("it")
    eventually(lambda: output.read_text() == "here\n")
    other.end("it")
    assert not mine.runs("it")
    mine.end("it")  # Reaps it; nothing else is left to do.


def test_one_that_will_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.slurm.daemons._END_SECONDS", 0.2)
    daemons = Daemons(tmp_path / "daemons.json")
    script = "trap '' TERM; echo; while :; do sleep 0.1; done"
    daemons.start("it", ["sh", "-c", script], environment=os.environ, output=tmp_path / "output", ends_with_me=True)
    eventually((tmp_path / "output").read_bytes)
    daemons.end("it")
    assert not daemons.runs("it")


def test_an_ended_process_that_nobody_reaped_does_not_run(sleeper: subprocess.Popen[bytes]) -> None:
    process = Process.of(sleeper.pid)
    assert process is not None
    assert process.end(signal.SIGKILL, 10)
    assert not process.runs
    assert process.end(signal.SIGKILL, 0)


def test_job_processes_are_known_by_cluster_and_node() -> None:
    def start(**variables: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sleep", "100"], env={**os.environ, **variables})

    conf = Path(f"/nowhere/{os.getpid()}/slurm.conf")
    here = start(SLURM_CONF=str(conf), SLURMD_NODENAME="gpu-1")
    there = start(SLURM_CONF=str(conf), SLURMD_NODENAME="gpu-2")
    user = start(SLURM_CONF=str(conf))
    foreign = start(SLURM_CONF="/etc/slurm/slurm.conf", SLURMD_NODENAME="gpu-1")
    processes = (here, there, user, foreign)
    try:
        kill_job_processes(conf, "gpu-1")
        here.wait(10)
        assert [process.poll() for process in processes] == [-signal.SIGKILL, None, None, None]
        kill_job_processes(conf)
        there.wait(10)
        assert [process.poll() for process in (user, foreign)] == [None, None]
    finally:
        for process in processes:
            process.kill()
            process.wait()
