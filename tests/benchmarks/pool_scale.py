"""How far the pools scale: measured where that is possible here, simulated and extrapolated where it is not.

    python -m tests.benchmarks.pool_scale simulate     feature-length jobs on 1 to 128 GPUs, by a simulation
    python -m tests.benchmarks.pool_scale validate     the simulation against runs on a real Slurm
    python -m tests.benchmarks.pool_scale prefect      CPU and memory of 100, 300 and 1000 chunks, and a fit
    python -m tests.benchmarks.pool_scale scheduler    10,000 chunks through scheduler and dispatcher, without Prefect
    python -m tests.benchmarks.pool_scale progress     one look at the progress of a job of many chunks

Every command takes `--json`. What the simulation needs to know about the cost of a task run comes from `prefect` and
`pool_overhead`; `--gap`, `--flow-cpu` and `--server-cpu` replace it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import heapq
import json
import math
import os
import queue
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from tasks.chunks import Capacity, Chunk, chunk_limit

MODULE = "tests.benchmarks.pool_scale"

#: A feature: two hours at 24 frames per second.
FRAMES = 2 * 3600 * 24

#: Floating point operations a GPU sustains per second: what `tasks.chunks` assumes when it sizes chunks.
GPU_FLOPS = 5e13

_EXTRACT, _UPSCALE, _ENCODE = range(3)
_STAGE_NAMES = ("extract", "upscale", "encode")


# The simulation


@dataclass(frozen=True)
class Costs:
    """What one task run costs beside its work; the defaults are what `pool_overhead` and `prefect` showed on two cores.

    Attributes:
        gap: Seconds from the end of a task's work to the start of the next task's in the same slot, with nobody else
            in the way.
        flow_cpu: CPU seconds of the flow's process; one task run at a time, because of the interpreter lock.
        server_cpu: The same of the Prefect server's process.
    """

    gap: float = 0.04
    flow_cpu: float = 0.005
    server_cpu: float = 0.004


@dataclass(frozen=True)
class SimulatedPool:
    """A pool, as far as the simulation knows it. The names are those of `infra.pools.Pool`."""

    maximum: int
    slots: int = 1
    start_seconds: float = 30.0
    idle_seconds: float = 300.0
    warm: bool = False
    keeps_coming: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a simulated run came to."""

    makespan: float
    """From the first task to the last."""
    from_upscale: float
    """From the first upscale to the end."""
    gpu_busy: float
    """Share of the GPU slots' time with work, from the first upscale to the last one's end."""
    gpu_seconds: float
    """Seconds that GPU workers existed."""
    flow_busy: float
    """Share of the time that the flow's process computed."""
    server_busy: float
    """The same of the Prefect server."""
    first: float
    """When the first task started after the flow."""


class _Workers:
    """The workers of one pool, which come late and go when idle."""

    def __init__(self, pool: SimulatedPool) -> None:
        self.pool = pool
        self.ready = pool.maximum if pool.warm else 0
        self.starting = 0
        self.running = 0
        self.queue: list[tuple[int, int, int]] = []
        self.held = 0.0
        self._changed = 0.0
        self._unneeded_since = math.inf

    def settle(self, now: float) -> None:
        self.held += (self.ready + self.starting) * (now - self._changed)
        self._changed = now

    def look(self, now: float, coming: int) -> int:
        """Adapt to the demand; returns how many workers start now."""
        needed = self._workers_for(len(self.queue) + self.running)
        planned = self.ready + self.starting
        target = max(needed, min(planned, self._workers_for(len(self.queue) + self.running + coming)))
        if not self.pool.keeps_coming:
            target = needed
        if self.pool.warm or target == planned:
            self._unneeded_since = math.inf
            return 0
        self.settle(now)
        if target > planned:
            self._unneeded_since = math.inf
            self.starting += target - planned
            return target - planned
        self._unneeded_since = min(self._unneeded_since, now)
        if now - self._unneeded_since >= self.pool.idle_seconds:
            idle = self.ready - math.ceil(self.running / self.pool.slots)
            self.ready -= min(idle, planned - target)
        return 0

    def _workers_for(self, units: int) -> int:
        return min(self.pool.maximum, math.ceil(units / self.pool.slots))


def simulate(
    seconds: list[tuple[float, float, float]],
    cpu: SimulatedPool,
    gpu: SimulatedPool,
    costs: Costs,
    *,
    window: int | None = None,
    interval: float = 1.0,
) -> Outcome:
    """Run chunks through the same policy as the flow's loop, the dispatcher and the adaptive pools.

    Args:
        seconds: How long extract, upscale and encode of each chunk take.
        cpu: The `cpu` pool.
        gpu: The `gpu` pool.
        costs: What a task run costs beside its work.
        window: Chunks in work at one time; the flow's rule by default.
        interval: Seconds between two looks at the demand.
    """
    window = window or Capacity(gpu.maximum * gpu.slots, cpu.maximum * cpu.slots).window
    pools = (_Workers(cpu), _Workers(gpu))
    events: list[tuple[float, int, Callable[[], None]]] = []
    serial = count()
    now = flow_free = server_free = flow_used = server_used = gpu_work = 0.0
    first_task = first_upscale = last_upscale = math.inf
    submitted = settled = coming_gpu = 0
    latency = max(0.0, costs.gap - costs.flow_cpu - costs.server_cpu)

    def at(moment: float, action: Callable[[], None]) -> None:
        heapq.heappush(events, (moment, next(serial), action))

    def submit() -> None:
        nonlocal submitted, coming_gpu
        while submitted < len(seconds) and submitted - settled < window:
            ask(submitted, _EXTRACT)
            submitted += 1
            coming_gpu += 1

    def ask(chunk: int, stage: int) -> None:
        pool = pools[stage == _UPSCALE]
        heapq.heappush(pool.queue, (3 * chunk + stage, chunk, stage))
        dispatch(pool)

    def dispatch(pool: _Workers) -> None:
        nonlocal flow_free, server_free, flow_used, server_used, first_task, first_upscale, gpu_work
        while pool.queue and pool.running < pool.ready * pool.pool.slots:
            _, chunk, stage = heapq.heappop(pool.queue)
            pool.running += 1
            # One after the other through the flow's process, then through the server, then on the way.
            flow_free = max(now, flow_free) + costs.flow_cpu
            server_free = max(flow_free, server_free) + costs.server_cpu
            flow_used += costs.flow_cpu
            server_used += costs.server_cpu
            begin = server_free + latency
            first_task = min(first_task, begin)
            if stage == _UPSCALE:
                first_upscale = min(first_upscale, begin)
                gpu_work += seconds[chunk][stage]
            at(begin + seconds[chunk][stage], lambda chunk=chunk, stage=stage: end(chunk, stage))  # type: ignore[misc]

    def end(chunk: int, stage: int) -> None:
        nonlocal settled, coming_gpu, last_upscale
        pool = pools[stage == _UPSCALE]
        pool.running -= 1
        if stage == _ENCODE:
            settled += 1
            submit()
        else:
            if stage == _EXTRACT:
                coming_gpu -= 1
            else:
                last_upscale = now
            ask(chunk, stage + 1)
        dispatch(pool)

    def look() -> None:
        for pool, coming in zip(pools, (0, coming_gpu), strict=True):
            if started := pool.look(now, coming):
                at(now + pool.pool.start_seconds, lambda pool=pool, started=started: join(pool, started))  # type: ignore[misc]
        at(now + interval, look)

    def join(pool: _Workers, started: int) -> None:
        pool.settle(now)
        pool.ready += started
        pool.starting -= started
        dispatch(pool)

    submit()
    at(0.0, look)
    while settled < len(seconds):
        now, _, action = heapq.heappop(events)
        action()
    for pool in pools:
        pool.settle(now)
    slots = gpu.maximum * gpu.slots
    return Outcome(
        makespan=now - first_task,
        from_upscale=now - first_upscale,
        gpu_busy=gpu_work / slots / (last_upscale - first_upscale),
        gpu_seconds=pools[1].held,
        flow_busy=flow_used / now,
        server_busy=server_used / now,
        first=first_task,
    )


@dataclass(frozen=True)
class Job:
    """A feature-length job: its chunks as the planner cuts them, and how long their stages take."""

    name: str
    chunks: int
    frames: int
    seconds: tuple[float, float, float]


def feature(model: str, width: int, height: int, decode: float, encode: float, flops: float = GPU_FLOPS) -> Job:
    """A feature with one model.

    Args:
        model: Name of the model.
        width: Columns of the source.
        height: Rows of the source.
        decode: Million source pixels per second that one slot extracts.
        encode: Million target pixels per second that one slot encodes.
        flops: What the planner believes a device sustains.
    """
    from tasks.models.cards import find_model

    card = find_model(model)
    flop = card.flop_per_input_pixel * width * height
    target = width * height * card.scale**2
    frames = chunk_limit(
        rate=Fraction(24), group=24, frame_flop=flop, target_frame_bytes=target * 3 // 2, chunk_seconds=None,
        flops=flops,
    )  # fmt: skip
    seconds = (frames * width * height / decode / 1e6, frames * flop / GPU_FLOPS, frames * target / encode / 1e6)
    return Job(f"{model} {width}x{height}", math.ceil(FRAMES / frames), frames, seconds)


def with_jitter(job: Job, share: float = 0.1) -> list[tuple[float, float, float]]:
    """The seconds of each chunk, a little different from one to the next, the same in every run."""
    chance = random.Random(0)
    return [
        tuple(value * chance.uniform(1 - share, 1 + share) for value in job.seconds)  # type: ignore[misc]
        for _ in range(job.chunks)
    ]


def slots_for(job: Job, gpus: int, costs: Costs, best: float) -> int:
    """Fewest slots of the `cpu` pool, in steps of a twentieth, with which GPUs work as much as with plenty."""
    need = slots_by_rate(job, gpus, costs)
    slots = max(1, math.floor(need * 0.8))
    while _busy(job, gpus, slots, costs) < 0.99 * best:
        slots += max(1, slots // 20)
    return slots


def slots_by_rate(job: Job, gpus: int, costs: Costs) -> float:
    """Slots of the `cpu` pool that decode and encode as fast as all GPUs upscale."""
    around = job.seconds[_EXTRACT] + job.seconds[_ENCODE] + 2 * costs.gap
    return gpus * around / (job.seconds[_UPSCALE] + costs.gap)


def _busy(job: Job, gpus: int, slots: int, costs: Costs, window: int | None = None) -> float:
    cpu, gpu = SimulatedPool(slots, warm=True), SimulatedPool(gpus, warm=True)
    return simulate(with_jitter(job), cpu, gpu, costs, window=window).gpu_busy


def simulate_features(
    costs: Costs, decode: float, encode: float, start_seconds: float, flops: float
) -> list[dict[str, Any]]:
    """All jobs on all numbers of GPUs."""
    rows = []
    for model in ("realesr-general-x4v3", "RealESRGAN_x4plus"):
        for size in ((960, 540), (1920, 1080)):
            job = feature(model, *size, decode, encode, flops)
            for gpus in (1, 8, 32, 128):
                seconds = with_jitter(job)
                best = _busy(job, gpus, math.ceil(2 * slots_by_rate(job, gpus, costs)) + 2, costs)
                slots = slots_for(job, gpus, costs, best)
                outcome = simulate(
                    seconds,
                    SimulatedPool(slots, start_seconds=start_seconds),
                    SimulatedPool(gpus, start_seconds=start_seconds, keeps_coming=True),
                    costs,
                )
                rows.append(
                    {
                        "job": job.name, "frames_per_chunk": job.frames, "chunks": job.chunks, "seconds": job.seconds,
                        "gpus": gpus, "window": Capacity(gpus, slots).window, "cpu_slots": slots,
                        "hours": outcome.makespan / 3600,
                        "ideal_hours": math.ceil(job.chunks / gpus) * job.seconds[_UPSCALE] / 3600,
                        "gpu_busy": outcome.gpu_busy, "gpu_hours": outcome.gpu_seconds / 3600,
                        "flow_busy": outcome.flow_busy, "server_busy": outcome.server_busy,
                        "gpu_busy_cpu_halved": _busy(job, gpus, max(1, slots // 2), costs),
                    }
                )  # fmt: skip
    return rows


def show_features(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| job | frames/chunk | chunks | extract, upscale, encode s | GPUs | cpu slots | hours | ideal | GPUs busy |"
        " with half the cpu slots | flow | server |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        stages = ", ".join(f"{value:.1f}" for value in row["seconds"])
        lines.append(
            f"| {row['job']} | {row['frames_per_chunk']} | {row['chunks']} | {stages} | {row['gpus']} |"
            f" {row['cpu_slots']} | {row['hours']:.2f} | {row['ideal_hours']:.2f} | {100 * row['gpu_busy']:.0f} % |"
            f" {100 * row['gpu_busy_cpu_halved']:.0f} % | {100 * row['flow_busy']:.0f} % |"
            f" {100 * row['server_busy']:.0f} % |"
        )
    return "\n".join(lines)


# The simulation against the real thing


def validate(costs: Costs, cases: list[tuple[int, int, tuple[float, float, float], int]]) -> list[dict[str, Any]]:
    """Simulated and real time of the same runs on a real Slurm, workers there from the start."""
    rows = []
    for chunks, gpus, seconds, cpu_workers in cases:
        arguments = ["--chunks", chunks, "--gpus", gpus, "--cpu-workers", cpu_workers, "--seconds", *seconds]
        real = _overhead(*map(str, arguments))
        cpu, gpu = SimulatedPool(cpu_workers, 2, warm=True), SimulatedPool(gpus, warm=True)
        told = simulate([seconds] * chunks, cpu, gpu, costs)
        rows.append(
            {
                "chunks": chunks, "gpus": gpus, "seconds": seconds, "cpu_workers": cpu_workers,
                "real": real["makespan_from_upscale"], "simulated": told.from_upscale,
                "error": told.from_upscale / real["makespan_from_upscale"] - 1,
                "real_busy": real["gpu_busy"], "simulated_busy": told.gpu_busy, "gap": real["gap"]["median"],
            }
        )  # fmt: skip
    return rows


def _overhead(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.pool_overhead", "--json", *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)[0]


# With Prefect, at several sizes


def with_prefect(sizes: list[int], gpus: int, window: int, to: int) -> dict[str, Any]:
    """CPU and memory of runs of several sizes whose tasks do nothing, and what a line through them says about `to`."""
    rows = []
    for size in sizes:
        arguments = ["--chunks", size, "--gpus", gpus, "--cpu-workers", 1, "--seconds", 0, 0, 0, "--window", window]
        result = _overhead(*map(str, arguments))
        rows.append(
            {
                "chunks": size, "seconds": result["makespan"],
                **{f"{name}_cpu": size * value for name, value in result["cpu_per_chunk"].items()},
                **{f"{name}_megabytes": value for name, value in result["peak_megabytes"].items()},
                "database_megabytes": result["database_megabytes"],
            }
        )  # fmt: skip
    fits = {}
    for name in rows[0]:
        if name != "chunks":
            slope, base = statistics.linear_regression(sizes, [row[name] for row in rows])
            fits[name] = {"base": base, "per_chunk": slope, f"at_{to}": base + slope * to}
    return {"measured": rows, "extrapolated": fits}


# Scheduler and dispatcher alone


def _nothing(shared: bytes, own: bytes) -> bytes:
    return own


class _Stage:
    """One task of one chunk: what `infra.pools.runner` does with it, without Prefect."""

    #: As long as what a real task run sends: what all share, and what is its own.
    SHARED: Final = os.urandom(7600)
    OWN: Final = os.urandom(2100)

    def __init__(self, run: Any, chunk: int, stage: int) -> None:
        self.run, self.chunk, self.stage = run, chunk, stage
        self.pool = "gpu" if stage == _UPSCALE else "cpu"
        self.order = 3 * chunk + stage

    def ask(self) -> None:
        self.run.dispatcher.put(self.pool, self.order, self)

    def start(self) -> None:
        future = self.run.client.submit(
            _nothing,
            self.SHARED,
            self.OWN,
            key=f"{_STAGE_NAMES[self.stage]}-{self.chunk}",
            resources={self.pool: 1},
            priority=-self.order,
            pure=False,
        )
        future.add_done_callback(self._ended)

    def fail(self, error: Exception) -> None:
        self.run.settled.put(error)

    def _ended(self, future: Any) -> None:
        self.run.dispatcher.ended(self.pool)
        future.result()
        future.release()
        if self.stage == _ENCODE:
            self.run.settled.put(self.chunk)
        else:
            _Stage(self.run, self.chunk, self.stage + 1).ask()


@dataclass(frozen=True)
class HostedWorker:
    """Workers that another process of this machine holds by the dozen, so that this process only schedules."""

    folder: Path
    interval: float = 1.0
    scheduler_host: str = "127.0.0.1"

    @property
    def shared_directory(self) -> Path | None:
        return self.folder

    async def watch(self, workers: Any, urgent: bool) -> None:
        pass

    def spec(self, pool: Any, index: int, security: Any) -> dict[str, Any]:
        from distributed.deploy.spec import ProcessInterface

        class Elsewhere(ProcessInterface):
            def __init__(self, scheduler: str, name: str) -> None:
                super().__init__(scheduler, name)

        return {"cls": Elsewhere, "options": {}}


async def host(address: str, pool: str, slots: int, first: int, number: int, credentials: list[str]) -> None:
    """Hold some workers until the scheduler closes them."""
    import dask.config
    from distributed import Worker
    from distributed.security import Security

    from infra.pools.worker import WORKER_CONFIG, quiet_dask

    quiet_dask()
    dask.config.update(dask.config.config, WORKER_CONFIG)
    ca, cert, key = credentials
    security = Security(require_encryption=True, tls_ca_file=ca, tls_worker_cert=cert, tls_worker_key=key)
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            await Worker(
                address, name=f"{pool}-{index}", nthreads=slots, resources={pool: slots}, security=security,
                host="127.0.0.1", memory_limit=0, local_directory=folder, dashboard_address="127.0.0.1:0",
            )
            for index in range(first, first + number)
        ]  # fmt: skip
        await asyncio.gather(*(worker.finished() for worker in workers))


def scheduler_alone(chunks: int, gpus: int, cpu_workers: int, hosts: int) -> dict[str, Any]:
    """CPU and memory of the process with scheduler, dispatcher and client, its workers being elsewhere."""
    from infra.pools import Pool, open_pools
    from tests.benchmarks.pool_overhead import await_workers, peak_megabytes

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pool-scale-")))
        os.environ["SUPERRES_HOME"] = str(folder / "home")
        start: Any = HostedWorker(folder / "shared")
        pools = (
            Pool("cpu", slots=2, minimum=cpu_workers, maximum=cpu_workers, start=start),
            Pool("gpu", minimum=gpus, maximum=gpus, start=start),
        )
        cluster = stack.enter_context(open_pools(pools, warm=False))
        (place,) = (folder / "shared").iterdir()
        credentials = [str(place / f"{part}.pem") for part in ("ca_file", "cert", "key")]
        for pool in pools:
            for share in _shares(pool.maximum, hosts):
                arguments = [cluster.scheduler_address, pool.name, pool.slots, share.start, len(share), *credentials]
                command = [sys.executable, "-m", MODULE, "host", *map(str, arguments)]
                child = subprocess.Popen(command)
                stack.callback(child.wait)
                stack.callback(child.terminate)
        await_workers(cluster, gpus + cpu_workers)
        time.sleep(3)
        before, idle_from = time.process_time(), time.monotonic()
        time.sleep(20)
        idle = (time.process_time() - before) / (time.monotonic() - idle_from)
        memory = peak_megabytes(os.getpid())
        client = stack.enter_context(cluster.get_client())
        run = SimpleNamespace(client=client, dispatcher=cluster.dispatcher, settled=queue.SimpleQueue())
        window, waiting, running = Capacity(gpus, 2 * cpu_workers).window, deque(range(chunks)), 0
        before, began = time.process_time(), time.monotonic()
        while waiting or running:
            while waiting and running < window:
                _Stage(run, waiting.popleft(), _EXTRACT).ask()
                running += 1
            settled = run.settled.get(timeout=60)
            if isinstance(settled, Exception):
                raise settled
            running -= 1
        wall = time.monotonic() - began
        return {
            "chunks": chunks, "gpus": gpus, "cpu_workers": cpu_workers, "window": window, "seconds": wall,
            "cpu": time.process_time() - before, "cpu_per_chunk": (time.process_time() - before) / chunks,
            "chunks_per_second": chunks / wall, "idle_cpu_share": idle,
            "megabytes_before": memory, "megabytes_peak": peak_megabytes(os.getpid()),
        }  # fmt: skip


def _shares(number: int, parts: int) -> Iterator[range]:
    for part in range(parts):
        share = range(number * part // parts, number * (part + 1) // parts)
        if share:
            yield share


# Progress


def progress_looks(sizes: list[int]) -> list[dict[str, Any]]:
    """How long one look at the progress takes while no chunk is finished, and while half of them are."""
    from tasks.progress import ProgressMeter

    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            files = [(folder / f"upscale-{i:07d}-abcdef.yuv", folder / f"encode-{i:07d}.mkv") for i in range(size)]
            job: Any = SimpleNamespace(
                chunks=[Chunk(index, index, index) for index in range(size)],
                folder=folder,
                frames=size,
                target=SimpleNamespace(frame_bytes=1),
                upscaled=lambda chunk, files=files: files[chunk.index][0],
                encoded=lambda chunk, files=files: files[chunk.index][1],
            )
            start = _median_seconds(lambda job=job: ProgressMeter(job).look())  # type: ignore[misc]
            for _, encoded in files[: size // 2]:
                encoded.touch()
            meter = ProgressMeter(job)
            meter.look()
            half = _median_seconds(meter.look)
            rows.append({"chunks": size, "start": start, "half": half})
    return rows


def _median_seconds(action: Callable[[], object], times: int = 7) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true")
    costs = argparse.ArgumentParser(add_help=False)
    for name in ("gap", "flow_cpu", "server_cpu"):
        costs.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(Costs, name))
    command = commands.add_parser("simulate", parents=[common, costs])
    command.add_argument("--decode", type=float, default=200.0, help="million source pixels per second and slot")
    command.add_argument("--encode", type=float, default=40.0, help="million target pixels per second and slot")
    command.add_argument("--start-seconds", type=float, default=30.0, help="until a worker that was asked for is there")
    command.add_argument("--planned-for", type=float, default=GPU_FLOPS, help="FLOP/s for which chunks are sized")
    commands.add_parser("validate", parents=[common, costs])
    command = commands.add_parser("prefect", parents=[common])
    command.add_argument("--sizes", type=int, nargs="+", default=[100, 300, 1000])
    command.add_argument("--gpus", type=int, default=2)
    command.add_argument("--window", type=int, default=Capacity(128, 96).window)
    command.add_argument("--to", type=int, default=10_000)
    command = commands.add_parser("scheduler", parents=[common])
    command.add_argument("--chunks", type=int, default=10_000)
    command.add_argument("--gpus", type=int, default=128)
    command.add_argument("--cpu-workers", type=int, default=48, help="two slots each")
    command.add_argument("--hosts", type=int, default=1, help="processes that hold the workers of a pool")
    command = commands.add_parser("progress", parents=[common])
    command.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 2400, 7200, 10_000])
    command = commands.add_parser("host")
    command.add_argument("address")
    command.add_argument("pool")
    for name in ("slots", "first", "number"):
        command.add_argument(name, type=int)
    command.add_argument("credentials", nargs=3)
    given = parser.parse_args()

    if given.command == "host":
        asyncio.run(host(given.address, given.pool, given.slots, given.first, given.number, given.credentials))
        return
    result: Any
    text = ""
    if given.command in ("simulate", "validate"):
        cost = Costs(given.gap, given.flow_cpu, given.server_cpu)
    if given.command == "simulate":
        result = simulate_features(cost, given.decode, given.encode, given.start_seconds, given.planned_for)
        text = show_features(result)
    elif given.command == "validate":
        cases = [(24, 4, (0.5, 8.0, 1.0), 2), (48, 4, (0.5, 2.0, 1.0), 1), (32, 4, (1.0, 1.0, 2.5), 2)]
        result = validate(cost, cases)
    elif given.command == "prefect":
        result = with_prefect(given.sizes, given.gpus, given.window, given.to)
    elif given.command == "scheduler":
        result = scheduler_alone(given.chunks, given.gpus, given.cpu_workers, given.hosts)
    else:
        result = progress_looks(given.sizes)
    print(json.dumps(result) if given.json else text or json.dumps(result, indent=1))


if __name__ == "__main__":
    # What travels to workers is found by the name of its module, which `__main__` is not.
    from tests.benchmarks import pool_scale

    pool_scale.main()
