"""Light flows that the tests run on Slurm pools; workers import this module by name.

Every task notes when and where it ran, so that a test sees what was done twice, in which partition, and in which job.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from prefect import flow, task

from infra.pools import PoolTaskRunner


@dataclass(frozen=True)
class Note:
    """What a task noted."""

    at: float
    stage: str
    index: int
    event: str
    partition: str
    job: str
    node: str
    process: int


def note(log: str, stage: str, index: int, event: str) -> None:
    facts = (time.time(), stage, index, event)
    place = (os.environ.get(f"SLURM_{name}", "") for name in ("JOB_PARTITION", "JOB_ID"))
    line = json.dumps([*facts, *place, os.environ.get("SLURMD_NODENAME", ""), os.getpid()]) + "\n"
    with Path(log).open("a") as file:
        file.write(line)


def notes(log: Path) -> list[Note]:
    """All notes in a log."""
    return [Note(*json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []


def work(log: str, stage: str, index: int, seconds: float) -> int:
    note(log, stage, index, "start")
    time.sleep(seconds)
    note(log, stage, index, "end")
    return index


@task(tags={"pool:cpu"}, task_run_name="extract {index}")
def extract(index: int, seconds: float, log: str) -> int:
    return work(log, "extract", index, seconds)


@task(tags={"pool:gpu"}, task_run_name="upscale {index}")
def upscale(index: int, seconds: float, log: str) -> int:
    return work(log, "upscale", index, seconds)


@task(tags={"pool:cpu"}, task_run_name="encode {index}")
def encode(index: int, seconds: float, log: str) -> int:
    return work(log, "encode", index, seconds)


@task(tags={"pool:gpu"}, task_run_name="upscale {index}")
def poison(index: int, seconds: float, log: str) -> int:
    """Take the worker down, every time."""
    note(log, "poison", index, "start")
    os.kill(os.getpid(), signal.SIGKILL)
    return index


@flow(name="slurm-stream", task_runner=PoolTaskRunner())
def stream(chunks: int, seconds: list[float], log: str, window: int = 8, until: str = "") -> list[int]:
    """Extract, upscale and encode chunks.

    Args:
        chunks: How many, at least.
        seconds: How long the three stages of each take.
        log: Where tasks note what they do.
        window: Chunks in work at one time.
        until: A file; as long as it is missing, there is another chunk.
    """
    encoded = []
    for index in itertools.count():
        if index >= chunks and (not until or Path(until).exists()):
            break
        if index >= window:
            encoded[index - window].wait()
        extracted = extract.submit(index, seconds[0], log)
        upscaled = upscale.submit(extracted, seconds[1], log)
        encoded.append(encode.submit(upscaled, seconds[2], log))
    return [future.result() for future in encoded]


@flow(name="slurm-poisoned", task_runner=PoolTaskRunner())
def poisoned(chunks: int, log: str) -> list[int]:
    """Chunk 1 takes its worker down; the others are fine."""
    futures = [(poison if index == 1 else upscale).submit(index, 0.2, log) for index in range(chunks)]
    for future in futures:
        future.wait()
    return [future.result() for future in futures]
