"""Pools: their shape, their workers' surroundings, their size, and what happens when workers die."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client, Nanny

from infra.pools import LocalWorker, Pool, PooledCluster, local_pools, open_pools
from infra.pools.cluster import MAXIMUM_FAILED_STARTS
from infra.pools.opening import current_cluster
from infra.pools.pool import cuda_devices
from tasks.cores import usable_cores
from tasks.errors import PoolError, SettingsError
from tasks.models.hardware import keep_freed_memory
from tests.waiting import eventually


def worker_pid(cluster: PooledCluster, name: str) -> int:
    """Process of a worker, once it is registered."""

    def registered() -> int | None:
        nanny = cluster.workers.get(name)
        known = {str(worker.name): worker for worker in cluster.scheduler.workers.values()}
        return nanny.pid if nanny is not None and name in known and nanny.pid else None

    return eventually(registered)


def sizes(cluster: PooledCluster) -> dict[str, int]:
    """Registered workers by pool."""
    names = [str(worker.name) for worker in cluster.scheduler.workers.values()]
    return {pool: sum(name.startswith(f"{pool}-") for name in names) for pool in cluster.pools}


class TestPool:
    def test_local_pools_are_cpu_and_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        cpu, gpu = local_pools(cpu_slots=3)
        assert (cpu.name, cpu.slots, cpu.maximum) == ("cpu", 3, 1)
        assert (gpu.name, gpu.slots, gpu.maximum) == ("gpu", 1, 1)

    def test_one_gpu_worker_per_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-7f")
        _, gpu = local_pools()
        assert gpu.maximum == 2
        seen = [gpu.start.spec(gpu, index, None)["options"]["env"]["CUDA_VISIBLE_DEVICES"] for index in range(2)]
        assert seen == ["2", "GPU-7f"]

    @pytest.mark.parametrize(("value", "devices"), [("", ()), ("-1", ()), ("0", ("0",)), ("0, 1,-1,3", ("0", "1"))])
    def test_visible_devices(self, monkeypatch: pytest.MonkeyPatch, value: str, devices: tuple[str, ...]) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert cuda_devices() == devices

    @pytest.mark.parametrize(
        "wrong", [{"slots": 0}, {"minimum": 2}, {"maximum": 0}, {"idle_seconds": -1}, {"name": "a b"}]
    )
    def test_nonsense_is_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(SettingsError):
            Pool(**{"name": "gpu", **wrong})

    def test_workers_for_demand(self) -> None:
        pool = Pool("cpu", slots=2, minimum=1, maximum=3)
        assert [pool.workers_for(units) for units in (0, 1, 2, 3, 100)] == [1, 1, 1, 2, 3]

    def test_worker_names_belong_to_one_pool(self) -> None:
        assert Pool("gpu").owns("gpu-12")
        assert not Pool("gpu").owns("gpu-large-1")
        assert not Pool("gpu").owns("gpux-1")

    def test_two_pools_of_one_name_are_refused(self) -> None:
        with pytest.raises(SettingsError):
            PooledCluster([Pool("cpu"), Pool("cpu")])


def surroundings() -> dict[str, Any]:
    """What a task sees of its worker process."""
    nice = subprocess.run(["nice"], capture_output=True, text=True, check=True).stdout
    return {
        "pid": os.getpid(),
        "nice": os.nice(0),
        "child_nice": int(nice),
        "session": os.getsid(0),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "wait": os.environ.get("OMP_WAIT_POLICY"),
    }


def torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def is_in_main_arena(size: int = 8 << 20) -> bool:
    """Whether malloc takes a block of this thread from the heap of the process, once it makes no mappings for them."""
    keep_freed_memory()
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    block = libc.malloc(size)
    heaps = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]")]
    libc.free(block)
    return any(low <= block < high for low, high in ((int(end, 16) for end in heap.split("-")) for heap in heaps))


class TestWorkers:
    @pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
    def test_inference_allocates_where_malloc_keeps_large_blocks(self, dask_client: Client) -> None:
        assert dask_client.submit(is_in_main_arena, resources={"gpu": 1}, pure=False).result(60)

    def test_cpu_workers_are_nice_and_single_threaded(self, dask_client: Client) -> None:
        seen = dask_client.submit(surroundings, resources={"cpu": 1}, pure=False).result(60)
        assert (seen["nice"], seen["child_nice"]) == (10, 10)
        assert (seen["threads"], seen["wait"]) == ("1", "passive")

    def test_gpu_workers_use_all_cores_at_normal_priority(self, dask_client: Client) -> None:
        seen = dask_client.submit(surroundings, resources={"gpu": 1}, pure=False).result(60)
        assert (seen["nice"], seen["child_nice"]) == (os.nice(0), os.nice(0))
        assert (seen["threads"], seen["wait"]) == (str(usable_cores()), "passive")

    def test_workers_lead_their_own_session(self, dask_client: Client) -> None:
        seen = dask_client.submit(surroundings, resources={"gpu": 1}, pure=False).result(60)
        assert seen["session"] == seen["pid"] != os.getsid(0)

    def test_torch_takes_the_threads_it_was_given(self, dask_client: Client) -> None:
        pytest.importorskip("torch")
        assert dask_client.submit(torch_threads, resources={"gpu": 1}, pure=False).result(60) == usable_cores()
        assert dask_client.submit(torch_threads, resources={"cpu": 1}, pure=False).result(60) == 1

    def test_environment_of_the_flow_is_left_alone(self, pools: PooledCluster) -> None:
        worker_pid(pools, "cpu-0")
        assert "OMP_WAIT_POLICY" not in os.environ
        assert "MALLOC_ARENA_MAX" not in os.environ
        assert "MALLOC_TRIM_THRESHOLD_" not in os.environ

    def test_everything_listens_on_loopback(self, pools: PooledCluster) -> None:
        pids = [os.getpid(), worker_pid(pools, "cpu-0"), worker_pid(pools, "gpu-0")]
        addresses = {
            connection.laddr.ip
            for pid in pids
            for connection in psutil.Process(pid).net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert addresses == {"127.0.0.1"}

    def test_connections_are_encrypted(self, pools: PooledCluster) -> None:
        assert pools.scheduler_address.startswith("tls://")
        with pytest.raises((OSError, TypeError, RuntimeError)):
            Client(pools.scheduler_address, timeout=3, set_as_default=False)

    def test_what_a_task_started_dies_with_the_worker(self, dask_client: Client, pools: PooledCluster) -> None:
        def start_child() -> int:
            return subprocess.Popen(["sleep", "600"]).pid

        child = dask_client.submit(start_child, resources={"gpu": 1}, pure=False).result(60)
        assert psutil.pid_exists(child)
        os.kill(worker_pid(pools, "gpu-0"), signal.SIGKILL)
        eventually(lambda: not alive(child), 10)


def alive(pid: int) -> bool:
    """Whether a process exists and is more than a zombie that nobody reaps (containers often have no init)."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class TestReplacement:
    def test_killed_worker_is_restarted(self, pools: PooledCluster) -> None:
        before = worker_pid(pools, "cpu-0")
        os.kill(before, signal.SIGKILL)
        eventually(lambda: not alive(before))
        eventually(lambda: worker_pid(pools, "cpu-0") != before)

    def test_dead_nanny_is_replaced(self, pools: PooledCluster) -> None:
        before = worker_pid(pools, "cpu-0")
        nanny = pools.workers["cpu-0"]
        pools.sync(nanny.close)
        eventually(lambda: pools.workers.get("cpu-0") not in (None, nanny) or "cpu-0" not in pools.worker_spec)
        with Client(pools, set_as_default=False) as client:
            after = client.submit(os.getpid, resources={"cpu": 1}, pure=False).result(60)
        assert after != before


@dataclass(frozen=True)
class StartsNever(LocalWorker):
    """A worker whose process ends while it starts."""

    def spec(self, pool: Pool, index: int, security: Any) -> dict[str, Any]:
        entry = super().spec(pool, index, security)
        return {**entry, "options": {**entry["options"], "niceness": "nonsense"}}


@dataclass(frozen=True)
class StartsLater(LocalWorker):
    """A worker that starts after some have failed to.

    Attributes:
        failing: How many.
        begun: For each that was started: how many others of its pool were not up yet.
    """

    failing: int = 0
    begun: list[int] = field(default_factory=list)
    cluster: list[PooledCluster] = field(default_factory=list)

    def spec(self, pool: Pool, index: int, security: Any) -> dict[str, Any]:
        entry = super().spec(pool, index, security)
        (cluster,) = self.cluster
        self.begun.append(len(cluster.worker_spec.keys() - cluster.observed))
        niceness = "nonsense" if len(self.begun) <= self.failing else 0
        return {**entry, "options": {**entry["options"], "niceness": niceness}}


@pytest.fixture
def restless() -> Iterator[PooledCluster]:
    """Pools whose workers leave after half a second without work."""
    pools = [
        Pool("cpu", slots=2, maximum=1, idle_seconds=0.5, start=LocalWorker(imports=())),
        Pool("gpu", slots=1, maximum=2, idle_seconds=0.5, start=LocalWorker(imports=())),
    ]
    with open_pools(pools, warm=False, interval=0.1) as cluster:
        yield cluster


class TestScaling:
    def test_from_zero_to_what_is_needed_and_back(self, restless: PooledCluster) -> None:
        assert sizes(restless) == {"cpu": 0, "gpu": 0}
        with Client(restless, set_as_default=False) as client:
            for _ in range(2):
                futures = [client.submit(time.sleep, 1, resources={"gpu": 1}, pure=False) for _ in range(4)]
                eventually(lambda: sizes(restless) == {"cpu": 0, "gpu": 2})
                client.gather(futures)
                del futures
                eventually(lambda: sizes(restless) == {"cpu": 0, "gpu": 0})

    def test_pools_shrink_independently(self, restless: PooledCluster) -> None:
        with Client(restless, set_as_default=False) as client:
            client.submit(time.sleep, 0, resources={"cpu": 1}, pure=False).result(60)
            long = client.submit(time.sleep, 60, resources={"gpu": 1}, pure=False)
            eventually(lambda: sizes(restless) == {"cpu": 0, "gpu": 1})
            assert long.status == "pending"
            long.cancel()

    def test_announced_tasks_start_workers_early(self, restless: PooledCluster) -> None:
        restless.dispatcher.expect("gpu", 5)
        eventually(lambda: sizes(restless)["gpu"] == 2)
        restless.dispatcher.expect("gpu", -5)
        eventually(lambda: sizes(restless)["gpu"] == 0)

    def test_fixed_size(self) -> None:
        pool = Pool("cpu", minimum=1, maximum=1, idle_seconds=0.2, start=LocalWorker(imports=()))
        with open_pools([pool], warm=False, interval=0.1) as cluster:
            first = worker_pid(cluster, "cpu-0")
            time.sleep(1.5)
            assert worker_pid(cluster, "cpu-0") == first

    def test_pool_that_cannot_start_fails_its_tasks(self) -> None:
        with (
            open_pools([Pool("gpu", start=StartsNever(imports=()))], warm=False, interval=0.1) as cluster,
            Client(cluster, set_as_default=False) as client,
            pytest.raises(PoolError, match="failed to start 3 times"),
        ):
            client.submit(time.sleep, 0, resources={"gpu": 1}, pure=False).result(120)

    def test_workers_that_fail_to_start_together_count_once(self) -> None:
        # More than may fail in a row, all at the same time, and then one more.
        together = MAXIMUM_FAILED_STARTS + 1
        start = StartsLater(imports=(), failing=together + 1)
        pool = Pool("gpu", maximum=together, start=start)
        with open_pools([pool], warm=False, interval=0.1) as cluster, Client(cluster, set_as_default=False) as client:
            start.cluster.append(cluster)
            futures = [client.submit(os.getpid, resources={"gpu": 1}, pure=False) for _ in range(together)]
            assert all(client.gather(futures))
        # Those after them began only when no other one was on its way.
        assert start.begun[: together + 2] == [*range(together), 0, 0]

    def test_what_a_flow_run_did_is_forgotten_with_it(self, pools: PooledCluster) -> None:
        with Client(pools, set_as_default=False) as client:
            client.submit(time.sleep, 0, resources={"cpu": 1}, pure=False).result(60)
            assert pools.scheduler.get_events(client.id)
        eventually(lambda: not pools.scheduler.get_events(client.id))

    def test_size_cannot_be_set_by_hand(self, pools: PooledCluster) -> None:
        with pytest.raises(PoolError):
            pools.scale(3)
        with pytest.raises(PoolError):
            pools.adapt(minimum=1)


class TestOpening:
    def test_flows_inside_find_the_pools(self, pools: PooledCluster) -> None:
        assert current_cluster() is pools

    def test_closing_a_busy_pool_is_quick(self) -> None:
        with open_pools([Pool("gpu", start=LocalWorker(imports=()))], warm=True) as cluster:
            pid = worker_pid(cluster, "gpu-0")
            client = Client(cluster, set_as_default=False)
            task = client.submit(time.sleep, 600, resources={"gpu": 1}, pure=False)
            eventually(lambda: any(worker.processing for worker in cluster.scheduler.workers.values()))
            began = time.monotonic()
            task.release()
            client.close()
        assert time.monotonic() - began < 8
        assert not alive(pid)

    def test_closing_while_workers_start(self) -> None:
        with open_pools([Pool("gpu", start=LocalWorker(imports=()))], warm=True) as cluster:
            eventually(lambda: cluster.workers)
            nannies = list(cluster.workers.values())
            began = time.monotonic()
        assert time.monotonic() - began < 8
        assert all(isinstance(nanny, Nanny) and not nanny.is_alive() for nanny in nannies)
