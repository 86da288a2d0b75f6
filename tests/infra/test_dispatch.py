"""The queues of task runs: order, slots, and what happens when a pool or a flow goes away."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from infra.pools.dispatch import Dispatcher
from tasks.errors import PoolError


class Run:
    """A task run that notes what is done with it."""

    def __init__(self, number: int, done: list[str]) -> None:
        self.number = number
        self.done = done
        self.happened = threading.Event()

    def start(self) -> None:
        self.done.append(f"start {self.number}")
        self.happened.set()

    def fail(self, error: PoolError) -> None:
        self.done.append(f"fail {self.number}")
        self.happened.set()


@pytest.fixture
def dispatcher() -> Iterator[Dispatcher]:
    dispatcher = Dispatcher(["cpu", "gpu"])
    yield dispatcher
    dispatcher.close()


def settle(dispatcher: Dispatcher) -> None:
    """Give the thread of a dispatcher the time to do what it can."""
    time.sleep(0.1)


def test_nothing_starts_without_a_slot(dispatcher: Dispatcher) -> None:
    done: list[str] = []
    dispatcher.put("gpu", 0, Run(0, done))
    dispatcher.set_slots("cpu", 5)
    settle(dispatcher)
    assert done == []
    assert (dispatcher.waiting("gpu"), dispatcher.running("gpu")) == (1, 0)


def test_slots_are_filled_in_order_of_submission(dispatcher: Dispatcher) -> None:
    done: list[str] = []
    for number in (3, 0, 2, 1):
        dispatcher.put("gpu", number, Run(number, done))
    dispatcher.set_slots("gpu", 2)
    settle(dispatcher)
    assert done == ["start 0", "start 1"]
    dispatcher.ended("gpu")
    settle(dispatcher)
    assert done == ["start 0", "start 1", "start 2"]


def test_a_run_that_is_leaving_gives_its_slot_back_once(dispatcher: Dispatcher) -> None:
    done: list[str] = []
    dispatcher.set_slots("gpu", 1)
    for number in range(3):
        dispatcher.put("gpu", number, Run(number, done))
    settle(dispatcher)
    dispatcher.leaving("gpu", "key 0")
    dispatcher.leaving("gpu", "key 0")
    settle(dispatcher)
    assert done == ["start 0", "start 1"]
    assert dispatcher.is_leaving("key 0")
    dispatcher.ended("gpu", "key 0")
    settle(dispatcher)
    assert done == ["start 0", "start 1"]
    assert not dispatcher.is_leaving("key 0")
    dispatcher.ended("gpu", "key 1")
    settle(dispatcher)
    assert done == ["start 0", "start 1", "start 2"]


def test_a_lost_run_comes_before_those_submitted_later(dispatcher: Dispatcher) -> None:
    done: list[str] = []
    runs = [Run(number, done) for number in range(4)]
    for run in runs:
        dispatcher.put("gpu", run.number, run)
    dispatcher.set_slots("gpu", 2)
    settle(dispatcher)
    dispatcher.set_slots("gpu", 1)  # One of two workers is lost with run 0 on it.
    dispatcher.ended("gpu")
    dispatcher.put("gpu", 0, runs[0])
    settle(dispatcher)
    assert done == ["start 0", "start 1"]
    dispatcher.set_slots("gpu", 2)
    settle(dispatcher)
    assert done[2:] == ["start 0"]


def test_fewer_slots_than_runs_start_nothing(dispatcher: Dispatcher) -> None:
    done: list[str] = []
    dispatcher.set_slots("gpu", 2)
    for number in range(3):
        dispatcher.put("gpu", number, Run(number, done))
    settle(dispatcher)
    dispatcher.set_slots("gpu", 0)
    dispatcher.ended("gpu")
    settle(dispatcher)
    assert done == ["start 0", "start 1"]
    assert dispatcher.waiting("gpu") == 1


def test_a_broken_pool_fails_what_waits_and_what_comes(dispatcher: Dispatcher) -> None:
    done: list[str] = []
    dispatcher.put("gpu", 0, Run(0, done))
    dispatcher.put("cpu", 1, Run(1, done))
    dispatcher.break_pool("gpu", PoolError("no workers"))
    dispatcher.put("gpu", 2, Run(2, done))
    dispatcher.set_slots("cpu", 1)
    settle(dispatcher)
    assert done == ["fail 0", "fail 2", "start 1"]


def test_withdrawn_runs_are_forgotten(dispatcher: Dispatcher) -> None:
    done: list[str] = []
    runs = [Run(number, done) for number in range(4)]
    for run in runs:
        dispatcher.put("gpu", run.number, run)
    dispatcher.withdraw([runs[0], runs[2]])
    dispatcher.set_slots("gpu", 9)
    settle(dispatcher)
    assert done == ["start 1", "start 3"]


def test_many_threads_start_every_run_once(dispatcher: Dispatcher) -> None:
    done: list[str] = []
    slots = 3
    most = 0
    lock = threading.Lock()
    running = 0

    class Short(Run):
        def start(self) -> None:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            super().start()
            threading.Timer(0.002, self.end).start()

        def end(self) -> None:
            nonlocal running
            with lock:
                running -= 1
            dispatcher.ended("gpu")

    runs = [Short(number, done) for number in range(200)]
    dispatcher.set_slots("gpu", slots)
    threads = [
        threading.Thread(target=lambda part=part: [dispatcher.put("gpu", run.number, run) for run in part])
        for part in (runs[0::4], runs[1::4], runs[2::4], runs[3::4])
    ]
    for thread in threads:
        thread.start()
    for run in runs:
        assert run.happened.wait(10)
    assert sorted(done) == sorted(f"start {number}" for number in range(200))
    assert most <= slots
