"""Flows, tasks and pools that the tests of the pools run; workers import this module by name."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

from prefect import flow, task
from prefect.futures import wait

from infra.pools import Pool, PoolTaskRunner, local_pools
from tasks import device

#: Counts calls in one worker process: shared by all task runs there, unless a task's module travels by value.
CALLS: list[int] = []


def small_pools() -> tuple[Pool, ...]:
    """The pools of this machine."""
    return local_pools(cpu_slots=2)


def note(log: str | None, *words: object) -> None:
    """Append a line with the time and this process to a log that all processes of a test share."""
    if log:
        with Path(log).open("a") as file:
            file.write(" ".join(map(str, (time.time(), os.getpid(), *words))) + "\n")


def notes(log: str | Path) -> list[tuple[float, int, list[str]]]:
    """All lines of such a log: time, process, words."""
    if not Path(log).exists():
        return []
    lines = [line.split() for line in Path(log).read_text().splitlines()]
    return [(float(line[0]), int(line[1]), line[2:]) for line in lines]


@task(tags={"pool:cpu"}, task_run_name="extract-{index}")
def extract(index: int, seconds: float = 0.0, log: str | None = None) -> int:
    note(log, "extract", index, "start")
    time.sleep(seconds)
    note(log, "extract", index, "end")
    return index


@task(tags={"pool:gpu"}, task_run_name="upscale-{index}")
def upscale(index: int, seconds: float = 0.0, log: str | None = None) -> int:
    note(log, "upscale", index, "start")
    time.sleep(seconds)
    note(log, "upscale", index, "end")
    return index


@task(tags={"pool:cpu"}, task_run_name="encode-{index}")
def encode(index: int, seconds: float = 0.0, log: str | None = None) -> int:
    note(log, "encode", index, "start")
    time.sleep(seconds)
    note(log, "encode", index, "end")
    return index


@task(tags={"pool:gpu"}, task_run_name="upscale-{index}")
def upscale_or_die(index: int, deaths: int, folder: str) -> int:
    """Kill the worker process `deaths` times before the task succeeds."""
    note(f"{folder}/log", "upscale", index, "start")
    died = len(list(Path(folder).glob(f"died-{index}-*")))
    if died < deaths:
        Path(folder, f"died-{index}-{died}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    note(f"{folder}/log", "upscale", index, "end")
    return index


@task(tags={"pool:gpu"}, task_run_name="child-{index}")
def with_child(index: int, folder: str) -> int:
    """Start a long-lived process, as a stage starts ffmpeg, and wait for it."""
    child = subprocess.Popen(["sleep", "600"])
    note(f"{folder}/log", "child", child.pid)
    return child.wait()


@task(tags={"pool:cpu"})
def broken(index: int) -> int:
    raise ValueError(f"chunk {index} is broken")


@task(tags={"pool:gpu"})
def call_count() -> tuple[int, int]:
    CALLS.append(1)
    return os.getpid(), len(CALLS)


@task(tags={"pool:cpu"})
async def asynchronous(index: int) -> int:
    return index + 1


@task(tags={"pool:cpu"})
def nested(index: int) -> int:
    return extract.submit(index).result()


@task
def homeless() -> None:
    """Names no pool."""


@task(tags={"pool:tpu"})
def lost() -> None:
    """Names a pool that is not open."""


@task(tags={"pool:cpu", "pool:gpu"})
def torn() -> None:
    """Names two pools."""


@flow(name="stream", task_runner=PoolTaskRunner(small_pools))
def stream(chunks: int, seconds: float = 0.0, log: str | None = None, window: int = 8) -> list[int]:
    """Extract, upscale and encode chunks, each stage as soon as its own input is there."""
    encoded = []
    for index in range(chunks):
        if index >= window:
            encoded[index - window].wait()
        extracted = extract.submit(index, seconds, log)
        upscaled = upscale.submit(extracted, seconds, log)
        encoded.append(encode.submit(upscaled, seconds, log))
    return [future.result() for future in encoded]


@flow(name="survive", task_runner=PoolTaskRunner(small_pools))
def survive(folder: str, deaths: int) -> list[int]:
    """Two chunks that are done before, one that kills its worker, one that waits behind it."""
    done = [extract.submit(index, 0, f"{folder}/log") for index in (0, 1)]
    done.append(upscale.submit(0, 0, f"{folder}/log"))
    wait(done)
    deadly = upscale_or_die.submit(2, deaths, folder)
    innocent = upscale.submit(3, 0, f"{folder}/log")
    return [innocent.result(), deadly.result()]


@flow(name="abandon", task_runner=PoolTaskRunner(small_pools))
def abandon(log: str) -> str:
    """Fail while a task runs and another waits for it."""
    running = upscale.submit(0, 30, log)
    encode.submit(running, 0, log)
    while not notes(log):
        time.sleep(0.05)
    raise RuntimeError("the flow gave up")


@flow(name="children", task_runner=PoolTaskRunner(small_pools))
def children(folder: str) -> int:
    """Wait for a task that waits for a process."""
    return with_child.submit(0, folder).result()


@flow(name="robbed", task_runner=PoolTaskRunner(small_pools))
def robbed(log: str) -> int:
    """Lose the worker that made an input before the task that needs it begins."""
    extracted = extract.submit(0, 0, log)
    extracted.wait()
    os.kill(notes(log)[0][1], signal.SIGKILL)
    return upscale.submit(extracted, 0, log).result()


#: What the device of a worker is to `with_device`.
DEVICE = threading.Lock()


@task(tags={"pool:gpu"}, task_run_name="upscale-{index}")
def with_device(index: int, folder: str, is_leaving: bool = True) -> int:
    """Take the device, say at once that it will be left soon if `is_leaving`, and leave it when told to.

    The file `go-<index>` tells to leave the device, `end-<index>` to end after that, `die-<index>` to kill the worker.
    """
    log = f"{folder}/log"
    note(log, index, "start")
    with DEVICE:
        device.tell("taken")
        note(log, index, "taken")
        if is_leaving:
            device.tell("leaving")
        while not Path(folder, f"go-{index}").exists():
            if Path(folder, f"die-{index}").exists():
                Path(folder, f"die-{index}").unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)
        note(log, index, "left")
    while not Path(folder, f"end-{index}").exists():
        time.sleep(0.01)
    note(log, index, "end")
    return index
