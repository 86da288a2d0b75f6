"""What pools, Dask and Prefect add to the work: chunks whose stages only sleep, against a perfect schedule.

    python -m tests.benchmarks.pool_overhead [--chunks 24] [--gpus 4] [--seconds 0.5 8 1] [--repeat 3] [--json]
    python -m tests.benchmarks.pool_overhead --local     worker processes of this machine instead of Slurm jobs

By default the pools are jobs of a real Slurm on this machine (`infra.slurm`). The flow is the project's own loop over
chunks (`flows.chunk_runs`) with its window, and its tasks differ from the real ones only in what they do: sleep.
Upscale sleeps with the one device of its process, and says as the real one when it will leave it; what the device
itself waits with the real engine is measured by `chunk_border`.

A perfect scheduler needs the first extract, `ceil(chunks / gpus)` upscales one after the other, and the last encode.
The run is compared with that from its first task to its last, and also from the first upscale on; how long the workers
took to come is reported apart, unless `--cold` lets the flow itself start them. CPU seconds per chunk come from each
process's own clock, from the first upscale to the last encode.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # As the command line does, before Prefect is imported.

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from infra.pools import LocalWorker, Pool, PooledCluster, PoolTaskRunner, SlurmWorker, open_pools
from infra.pools.slurm import slurm_environment
from infra.prefect_server import Api, ensure_api
from infra.slurm import LocalSlurm, Partition, SlurmDescription
from tasks import device
from tasks.chunk_report import StageReport
from tasks.chunks import Capacity, Chunk

#: Imported by name on workers, so that they load this module and not the whole flow.
MODULE = "tests.benchmarks.pool_overhead"

#: GPUs of one node of the Slurm on this machine.
_GPUS_PER_NODE = 8

#: Seconds until all workers must have come.
_WORKERS_WAIT = 300.0

#: That of a worker process.
_DEVICE = threading.Lock()


def cpu_seconds(pid: int) -> float:
    """CPU seconds a process has used; 0 when it is gone."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def peak_megabytes(pid: int) -> float:
    """Most memory a process has had at one time."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0


def _sleep(stage: str, index: int, seconds: float, *, leaving: float = 0.0) -> StageReport:
    # What the worker and its nanny have used until now travels where a real upscale describes its engine.
    used = {"worker": time.process_time(), "nanny": cpu_seconds(os.getppid())}
    started = time.time()
    time.sleep(seconds - leaving)
    if leaving:
        device.tell("leaving")
        time.sleep(leaving)
    return StageReport(stage, index, started, time.time() - started, engine=used)


# The path of the plan is all a real task is told; here it holds the seconds of each stage.


@task(name="extract", task_run_name="extract {label}", tags={"pool:cpu"}, cache_policy=NO_CACHE)
def extract(plan: str, index: int, label: str) -> StageReport:
    return _sleep("extract", index, json.loads(plan)[0])


@task(name="upscale", task_run_name="upscale {label}", tags={"pool:gpu"}, cache_policy=NO_CACHE)
def upscale(plan: str, index: int, label: str) -> StageReport:
    seconds = json.loads(plan)[1]
    with _DEVICE:
        device.tell("taken")
        return _sleep("upscale", index, seconds, leaving=min(seconds / 2, device.LEAVING_SECONDS))


@task(name="encode", task_run_name="encode {label}", tags={"pool:cpu"}, cache_policy=NO_CACHE)
def encode(plan: str, index: int, label: str) -> StageReport:
    return _sleep("encode", index, json.loads(plan)[2])


class _NoMeter:
    """Progress is counted from chunk files, and there are none; `pool_scale progress` measures that apart."""

    def report(self, phase: str) -> None:
        pass


class _NoTracker:
    """There is no record of a job either."""

    def reach(self, state: Any) -> None:
        pass

    def stage_ended(self, report: StageReport, **_: Any) -> None:
        pass


@flow(name="pool-overhead", task_runner=PoolTaskRunner())
def sleep_through(chunks: int, seconds: list[float], window: int) -> list[StageReport]:
    """Run chunks through the loop of the real flow."""
    from flows import chunk_runs as real

    job: Any = SimpleNamespace(unfinished=lambda _: [], chunks=[Chunk(index, index, index) for index in range(chunks)])
    meter: Any = _NoMeter()
    tracker: Any = _NoTracker()
    done: list[real.FinishedChunk] = []
    with mock.patch.multiple(real, extract=extract, upscale=upscale, encode=encode):
        real.run_chunks(job, json.dumps(seconds), job.chunks, window, meter, tracker, done.append)
    return [report for chunk in done for report in chunk.reports]


@dataclass
class Sampler:
    """CPU clocks of the processes that have no task to report theirs.

    Attributes:
        server: Process of the private Prefect server.
        samples: Times, and CPU seconds by process.
    """

    server: int
    samples: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Sampler:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        while True:
            self._look()
            if self._ended.wait(0.5):
                return

    def _look(self) -> None:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.samples.append(
            (
                time.time(),
                {
                    "flow": time.process_time(),
                    "server": cpu_seconds(self.server),
                    "commands": children.ru_utime + children.ru_stime,  # Slurm's, run by the flow's process.
                },
            )
        )

    def used(self, since: float, until: float) -> dict[str, float]:
        """CPU seconds by process between two times."""
        return {name: self._at(name, until) - self._at(name, since) for name in self.samples[0][1]}

    def _at(self, name: str, moment: float) -> float:
        for (before, low), (after, high) in pairwise(self.samples):
            if before <= moment <= after:
                return low[name] + (high[name] - low[name]) * (moment - before) / max(after - before, 1e-9)
        return self.samples[0 if moment < self.samples[0][0] else -1][1][name]


@contextlib.contextmanager
def private_api(folder: Path) -> Iterator[Api]:
    """A Prefect server with a new database, whatever the environment says."""
    os.environ.pop("PREFECT_API_URL", None)
    os.environ["PREFECT_HOME"] = str(folder / "prefect-home")
    os.environ["SUPERRES_HOME"] = str(folder / "home")
    with ensure_api(home=folder / "prefect") as api:
        yield api


def server_pid(api: Api) -> int:
    """The process of a private server."""
    assert api._process is not None
    return api._process.pid


def description(gpus: int, cpu_workers: int) -> SlurmDescription:
    """A Slurm with room for so many jobs."""
    nodes = math.ceil(gpus / _GPUS_PER_NODE)
    each = math.ceil(gpus / nodes)
    return SlurmDescription(
        (
            Partition("cpu", nodes=1, cpus=cpu_workers, memory_mb=64000),
            Partition("gpu", nodes=nodes, cpus=each, memory_mb=64000, gpus=each),
        )
    )


def slurm_pools(gpus: int, cpu_workers: int, folder: Path, *, warm: bool = True) -> tuple[Pool, Pool]:
    """Pools of Slurm jobs."""

    def worker(partition: str, gres: str = "") -> SlurmWorker:
        return SlurmWorker(
            shared_directory=folder / "shared",
            log_directory=folder / "logs",
            partition=partition,
            memory="200MB",
            gres=gres,
            interface="lo",
            env=slurm_environment(1, inference=False),
            imports=("infra.pools.remote", MODULE),
            death_timeout=180,
        )

    return _pools(gpus, cpu_workers, worker("cpu"), worker("gpu", "gpu:1"), "keep", warm)


def sleeping_local_pools(gpus: int, cpu_workers: int, *, warm: bool = True) -> tuple[Pool, Pool]:
    """Pools of worker processes of this machine."""
    start = LocalWorker(imports=("infra.pools.remote", MODULE))
    return _pools(gpus, cpu_workers, start, start, "start", warm)


def _pools(gpus: int, cpu_workers: int, cpu: Any, gpu: Any, coming: Any, warm: bool) -> tuple[Pool, Pool]:
    cpu_coming = "ignore" if coming == "keep" else coming
    return (
        Pool("cpu", slots=2, minimum=cpu_workers * warm, maximum=cpu_workers, idle_seconds=300, coming=cpu_coming,
             start=cpu),
        Pool("gpu", minimum=gpus * warm, maximum=gpus, idle_seconds=300, coming=coming, start=gpu),
    )  # fmt: skip


def await_workers(cluster: PooledCluster, count: int) -> None:
    """Wait until so many workers are there."""
    deadline = time.monotonic() + _WORKERS_WAIT
    while len(cluster.scheduler.workers) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(cluster.scheduler.workers)} of {count} workers came")
        time.sleep(0.05)


def gaps(reports: list[StageReport], stage: str = "upscale") -> list[float]:
    """Seconds between the end of one task and the start of the next of its stage in the same process."""
    found = []
    by_process: dict[int, list[StageReport]] = {}
    for report in sorted((report for report in reports if report.stage == stage), key=lambda report: report.started):
        by_process.setdefault(report.where.process, []).append(report)
    for own in by_process.values():
        found += [after.started - before.started - before.seconds for before, after in pairwise(own)]
    return sorted(found)


def worker_cpu(reports: list[StageReport]) -> dict[str, float]:
    """CPU seconds per task run of workers and nannies, between the first and the last task of each process.

    Hydrating the flow's context, which the first task run pays, is left out; startup has its own figure.
    """
    used = {"worker": 0.0, "nanny": 0.0}
    count = 0
    by_process: dict[int, list[StageReport]] = {}
    for report in sorted(reports, key=lambda report: report.started):
        by_process.setdefault(report.where.process, []).append(report)
    for own in by_process.values():
        first, last = (own[1].engine, own[-1].engine) if len(own) > 2 else (None, None)
        if first and last:
            used = {name: used[name] + last[name] - first[name] for name in used}
            count += len(own) - 2
    return {name: value / count for name, value in used.items()} if count else used


def measure(
    chunks: int, gpus: int, seconds: tuple[float, float, float], cpu_workers: int, window: int, **how: bool
) -> dict[str, Any]:
    """One run.

    Args:
        chunks: How many chunks.
        gpus: Workers of the `gpu` pool.
        seconds: How long extract, upscale and encode of a chunk sleep.
        cpu_workers: Workers of the `cpu` pool, two slots each.
        window: Chunks in work at one time.
        how: `local`: no Slurm. `cold`: the flow starts the workers.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pool-overhead-")))
        if how["local"]:
            pools = sleeping_local_pools(gpus, cpu_workers, warm=not how["cold"])
        else:
            slurm = stack.enter_context(LocalSlurm(description(gpus, cpu_workers)))
            stack.enter_context(slurm.use())
            pools = slurm_pools(gpus, cpu_workers, folder, warm=not how["cold"])
        api = stack.enter_context(private_api(folder))
        opened = time.time()
        cluster = stack.enter_context(open_pools(pools, warm=False))
        if not how["cold"]:
            await_workers(cluster, gpus + cpu_workers)
        ready = time.time()
        with Sampler(server_pid(api)) as sampler:
            reports = sleep_through(chunks, list(seconds), window)
        memory = {"flow": peak_megabytes(os.getpid()), "server": peak_megabytes(server_pid(api))}
        database = sum(path.stat().st_size for path in (folder / "prefect").glob("*.db*")) / 2**20
        leases = {lease.worker: lease.started - opened for lease in cluster.leases}
    begun = min(report.started for report in reports)
    ended = max(report.started + report.seconds for report in reports)
    upscaled = [report for report in reports if report.stage == "upscale"]
    first = min(report.started for report in upscaled)
    ideal = seconds[0] + math.ceil(chunks / gpus) * seconds[1] + seconds[2]
    ideal_from_upscale = ideal - seconds[0]
    between = gaps(reports)
    used = {name: value / chunks for name, value in sampler.used(first, ended).items()}
    used |= {name: 3 * value for name, value in worker_cpu(reports).items()}
    if how["local"]:
        del used["nanny"]  # Local nannies are threads of the flow's process.
    return {
        "parameters": {"chunks": chunks, "gpus": gpus, "seconds": seconds, "cpu_workers": cpu_workers,
                       "window": window, **how},
        "startup": {"workers_ready": ready - opened, "flow_to_first_task": begun - ready,
                    "last_worker_started": max(leases.values(), default=0.0)},
        "makespan": ended - begun,
        "ideal": ideal,
        "ratio": (ended - begun) / ideal if ideal else math.nan,
        "makespan_from_upscale": ended - first,
        "ideal_from_upscale": ideal_from_upscale,
        "ratio_from_upscale": (ended - first) / ideal_from_upscale if ideal_from_upscale else math.nan,
        "gpu_busy": sum(report.seconds for report in upscaled) / gpus / (ended - first),
        "gap": {"median": statistics.median(between) if between else math.nan,
                "p90": between[int(0.9 * (len(between) - 1))] if between else math.nan,
                "most": between[-1] if between else math.nan, "count": len(between)},
        "cpu_per_chunk": used,
        "peak_megabytes": memory,
        "database_megabytes": database,
        "reports": [asdict(report) for report in reports],
    }  # fmt: skip


def show(result: dict[str, Any]) -> str:
    """The figures of one run, in lines."""
    used, gap, startup = result["cpu_per_chunk"], result["gap"], result["startup"]
    cpu = ", ".join(f"{name} {value:.3f}" for name, value in used.items())
    memory = ", ".join(f"{name} {value:.0f} MB" for name, value in result["peak_megabytes"].items())
    rows = [
        ("workers there after", f"{startup['workers_ready']:.2f} s"),
        ("flow to its first task", f"{startup['flow_to_first_task']:.2f} s"),
        ("first task to last", f"{result['makespan']:.2f} s, ideal {result['ideal']:.2f} s: {result['ratio']:.3f}"),
        (
            "first upscale to last task",
            f"{result['makespan_from_upscale']:.2f} s, ideal {result['ideal_from_upscale']:.2f} s: "
            f"{result['ratio_from_upscale']:.3f}",
        ),
        ("GPU slots busy", f"{100 * result['gpu_busy']:.1f} %"),
        ("between two upscales", f"{gap['median']:.3f} s median, {gap['p90']:.3f} s 90 %, {gap['most']:.3f} s most"),
        ("CPU seconds per chunk", f"{cpu}; together {sum(used.values()):.3f}"),
        ("peak memory", memory),
    ]
    return "\n".join(f"{name:28}{value}" for name, value in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--chunks", type=int, default=24)
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--seconds", type=float, nargs=3, default=(0.5, 8.0, 1.0), metavar=("E", "U", "C"))
    parser.add_argument("--cpu-workers", type=int, default=2, help="workers of the cpu pool, two slots each")
    parser.add_argument("--window", type=int, default=0, help="chunks in work at one time; the flow's rule by default")
    parser.add_argument("--local", action="store_true", help="local pools instead of Slurm jobs")
    parser.add_argument("--cold", action="store_true", help="let the flow start the workers from none")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    results: list[dict[str, Any]] = []
    for number in range(given.repeat):
        if given.repeat == 1:
            how = {"local": given.local, "cold": given.cold}
            window = given.window or Capacity(given.gpus, 2 * given.cpu_workers).window
            results.append(measure(given.chunks, given.gpus, tuple(given.seconds), given.cpu_workers, window, **how))
        else:  # Each in a process of its own, so that nothing is warm and its memory is its own.
            command = [sys.executable, "-m", MODULE, *sys.argv[1:], "--json", "--repeat", "1"]
            results += json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        if not given.json:
            print(f"run {number + 1} of {given.repeat}\n{show(results[-1])}", flush=True)
    if given.json:
        print(json.dumps(results))
    elif given.repeat > 1:
        ratio = statistics.median(result["ratio_from_upscale"] for result in results)
        gap = statistics.median(result["gap"]["median"] for result in results)
        print(f"medians: {ratio:.3f} of the ideal from the first upscale on, {gap:.3f} s between two upscales")


if __name__ == "__main__":
    # Tasks travel to workers by the name of their module, which `__main__` is not.
    from tests.benchmarks import pool_overhead

    pool_overhead.main()
