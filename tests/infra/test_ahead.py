"""The task that gets ready in a worker while another one has its device: when it comes, where, and who is to blame."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prefect import flow

from infra.pools import LocalWorker, Pool, PooledCluster, PoolTaskRunner, open_pools
from infra.pools.opening import current_cluster
from infra.prefect_server import Api
from tasks.errors import PoolError
from tests.infra.sample_flows import notes, with_device
from tests.infra.test_pools import sizes
from tests.waiting import eventually


@contextmanager
def gpu_pool(workers: int, minimum: int = 0, **settings: Any) -> Iterator[PooledCluster]:
    """An open `gpu` pool."""
    pool = Pool("gpu", minimum=minimum, maximum=workers, idle_seconds=60, start=LocalWorker(), **settings)
    with open_pools([pool], warm=False, interval=0.1) as cluster:
        eventually(lambda: len(cluster.scheduler.workers) == minimum)
        yield cluster


def opened() -> PooledCluster:
    """That pool; a flow cannot refer to it by a variable, because it travels to the workers with them."""
    cluster = current_cluster()
    assert cluster is not None
    return cluster


class Watched:
    """What `with_device` notes in a folder, and what it is told there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def tell(self, *words: str) -> None:
        for word in words:
            (self.folder / word).touch()

    def seen(self, index: int, word: str, times: int = 1) -> int:
        """The process in which a task run noted something for the n-th time, once it has."""

        def found() -> int | None:
            processes = [process for _, process, words in notes(self.folder / "log") if words == [str(index), word]]
            return processes[times - 1] if len(processes) >= times else None

        process = eventually(found)
        assert isinstance(process, int)
        return process

    def order(self) -> list[str]:
        return [" ".join(words) for _, _, words in notes(self.folder / "log")]


@pytest.fixture(scope="module")
def one_worker(prefect_api: Api) -> Iterator[PooledCluster]:
    with gpu_pool(1, minimum=1) as cluster:
        yield cluster


@pytest.fixture
def watched(prefect_api: Api, tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_the_next_task_gets_ready_and_takes_the_device_at_once(watched: Watched, one_worker: PooledCluster) -> None:
    @flow(task_runner=PoolTaskRunner())
    def run() -> list[int]:
        futures = [with_device.submit(index, str(watched.folder)) for index in range(3)]
        own = watched.seen(0, "taken")
        assert watched.seen(1, "start") == own
        assert opened().dispatcher.waiting("gpu") == 1  # One gets ready, not all.
        watched.tell("go-0")
        assert watched.seen(1, "taken") == own  # Though the first has not ended: it writes its last frames.
        watched.tell("end-0")
        assert watched.seen(2, "start") == own
        watched.tell("go-1", "end-1", "go-2", "end-2")
        return [future.result() for future in futures]

    assert run() == [0, 1, 2]
    assert one_worker.dispatcher.running("gpu") == 0
    order = watched.order()
    assert [line for line in order if line.endswith(("taken", "left"))] == [
        "0 taken", "0 left", "1 taken", "1 left", "2 taken", "2 left",
    ]  # fmt: skip
    assert order.index("1 taken") < order.index("0 end")


def test_a_task_that_says_nothing_keeps_its_slot(watched: Watched, one_worker: PooledCluster) -> None:
    @flow(task_runner=PoolTaskRunner())
    def run() -> list[int]:
        futures = [with_device.submit(index, str(watched.folder), is_leaving=False) for index in range(2)]
        watched.seen(0, "taken")
        watched.tell("go-0", "end-0", "go-1", "end-1")
        return [future.result() for future in futures]

    assert run() == [0, 1]
    assert watched.order().index("0 end") < watched.order().index("1 start")


def test_idle_workers_come_before_those_that_are_nearly_through(watched: Watched) -> None:
    @flow(task_runner=PoolTaskRunner())
    def run(first: int, is_leaving: tuple[bool, bool]) -> list[int]:
        tasks, processes = range(first, first + 3), []
        futures = []
        for index, leaving in zip(tasks, is_leaving, strict=False):
            futures.append(with_device.submit(index, str(watched.folder), is_leaving=leaving))
            processes.append(watched.seen(index, "taken"))
        assert len(set(processes)) == 2
        futures.append(with_device.submit(tasks[2], str(watched.folder)))
        assert watched.seen(tasks[2], "start") == processes[is_leaving.index(True)]
        watched.tell(*(f"{word}-{index}" for word in ("go", "end") for index in tasks))
        return [future.result() for future in futures]

    with gpu_pool(2, minimum=2):
        # Either way round: by itself, Dask would take the same one of two workers with one task each.
        assert run(0, (True, False)) == [0, 1, 2]
        assert run(3, (False, True)) == [3, 4, 5]


def test_a_worker_that_is_not_quite_up_has_no_slot(watched: Watched, one_worker: PooledCluster) -> None:
    @flow(task_runner=PoolTaskRunner())
    def run() -> int:
        cluster = opened()
        (worker,) = cluster.scheduler.workers

        async def become(status: str) -> None:
            cluster.scheduler.handle_worker_status_change(status, worker, "test")

        cluster.sync(become, "init")
        future = with_device.submit(0, str(watched.folder))
        time.sleep(0.3)
        assert cluster.dispatcher.waiting("gpu") == 1
        cluster.sync(become, "running")
        watched.tell("go-0", "end-0")
        return future.result()

    assert run() == 0


def test_two_tasks_start_two_workers_before_one_of_them_gets_both(watched: Watched) -> None:
    @flow(task_runner=PoolTaskRunner())
    def run() -> list[int]:
        futures = [with_device.submit(index, str(watched.folder), is_leaving=False) for index in range(2)]
        assert watched.seen(0, "taken") != watched.seen(1, "taken")
        watched.tell("go-0", "end-0", "go-1", "end-1")
        return [future.result() for future in futures]

    with gpu_pool(2):
        assert run() == [0, 1]


def test_a_task_that_is_nearly_through_asks_for_no_worker(watched: Watched) -> None:
    @flow(task_runner=PoolTaskRunner())
    def run() -> list[int]:
        futures = [with_device.submit(0, str(watched.folder))]
        watched.seen(0, "taken")
        cluster = opened()
        eventually(lambda: cluster.dispatcher.running("gpu") == 0)
        futures.append(with_device.submit(1, str(watched.folder)))
        assert watched.seen(1, "start") == watched.seen(0, "start")
        eventually(lambda: cluster.dispatcher.running("gpu") == 1)
        demand = cluster._adaptives[0].demand
        assert cluster.sync(lambda: _later(demand)) == 1
        watched.tell("go-0", "end-0", "go-1", "end-1")
        return [future.result() for future in futures]

    with gpu_pool(2) as cluster:
        assert run() == [0, 1]
        assert sizes(cluster) == {"gpu": 1}


async def _later(function: Any) -> Any:
    return function()


def test_both_tasks_of_a_lost_worker_start_again_in_order(watched: Watched, one_worker: PooledCluster) -> None:
    @flow(task_runner=PoolTaskRunner())
    def run() -> list[int]:
        futures = [with_device.submit(index, str(watched.folder)) for index in range(2)]
        watched.seen(1, "start")
        os.kill(watched.seen(0, "taken"), signal.SIGKILL)
        watched.seen(1, "start", times=2)
        watched.tell("go-0", "end-0", "go-1", "end-1")
        return [future.result() for future in futures]

    assert run() == [0, 1]
    assert one_worker.scheduler.bystanders == set()
    assert one_worker.dispatcher.running("gpu") == one_worker.dispatcher.waiting("gpu") == 0
    assert [line for line in watched.order() if line.endswith("taken")] == ["0 taken", "0 taken", "1 taken"]


def test_who_waits_behind_a_task_that_kills_its_worker_is_not_given_up_with_it(watched: Watched) -> None:
    @flow(task_runner=PoolTaskRunner())
    def run() -> int:
        deadly, innocent = (with_device.submit(index, str(watched.folder)) for index in range(2))
        watched.seen(1, "start")
        watched.tell("die-0")
        with pytest.raises(PoolError, match="upscale-0 lost its worker once"):
            deadly.result()
        watched.tell("go-1", "end-1")
        return innocent.result()

    with gpu_pool(1, minimum=1, maximum_losses=1):
        assert run() == 1


def test_a_task_that_takes_the_device_and_kills_the_worker_is_to_blame_while_the_one_before_ends(
    watched: Watched,
) -> None:
    @flow(task_runner=PoolTaskRunner())
    def run() -> int:
        innocent, deadly = (with_device.submit(index, str(watched.folder)) for index in range(2))
        watched.seen(1, "start")
        watched.tell("go-0")
        watched.seen(1, "taken")
        watched.tell("die-1")
        watched.seen(0, "start", times=2)
        watched.tell("end-0")
        with pytest.raises(PoolError, match="upscale-1 lost its worker once"):
            deadly.result()
        return innocent.result()

    with gpu_pool(1, minimum=1, maximum_losses=1):
        assert run() == 0


def test_a_task_of_a_flow_that_gave_up_does_not_take_the_device(watched: Watched, one_worker: PooledCluster) -> None:
    @flow(task_runner=PoolTaskRunner())
    def give_up() -> None:
        for index in range(2):
            with_device.submit(index, str(watched.folder))
        watched.seen(1, "start")
        raise RuntimeError("it gave up")

    @flow(task_runner=PoolTaskRunner())
    def run() -> int:
        return with_device.submit(2, str(watched.folder)).result()

    with pytest.raises(RuntimeError, match="it gave up"):
        give_up()
    watched.tell(*(f"{word}-{index}" for word in ("go", "end") for index in range(3)))
    assert run() == 2
    assert "1 taken" not in watched.order()
    assert one_worker.dispatcher.running("gpu") == 0
