"""Which task run starts next: in the order of submission, and never more at a time than a pool has free slots.

Dask pushes a task that asks for a resource to a worker at once and lets it wait there. With workers that come and go
this spoils the order of chunks, and a worker that is lost takes a queue of innocent tasks with it. So a task run waits
here until a slot is free on a worker that exists, and only then goes to Dask: the order of a plan is kept, one lost
worker concerns only what ran on it, and what is left in the queue tells how many workers a pool needs.

A task may give its slot back a moment before it ends (`leaving`): the next one is ready when the device is free.
"""

from __future__ import annotations

import heapq
import threading
from collections import Counter
from collections.abc import Iterable
from itertools import count
from typing import Protocol

from tasks.errors import PoolError


class Waiting(Protocol):
    """A task run that waits for a slot."""

    def start(self) -> None:
        """Use a slot. `Dispatcher.ended` must be called once it is free again, whatever happens."""
        ...

    def fail(self, error: PoolError) -> None:
        """End without ever having had a slot."""
        ...


class Dispatcher:
    """The queues of all pools of one cluster. Callable from any thread; starts task runs in a thread of its own.

    Args:
        pools: Names of the pools.
    """

    def __init__(self, pools: Iterable[str]) -> None:
        self._queues: dict[str, list[tuple[int, int, Waiting]]] = {pool: [] for pool in pools}
        self._serial = count()
        self._slots: Counter[str] = Counter()
        self._running: Counter[str] = Counter()
        self._coming: Counter[str] = Counter()
        self._leaving: set[object] = set()
        self._broken: dict[str, PoolError] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="dispatch", daemon=True)
        self._thread.start()

    def put(self, pool: str, order: int, waiting: Waiting) -> None:
        """Add a task run; among those of its pool, lower `order` starts first."""
        with self._changed:
            error = self._broken.get(pool)
            if error is None:
                heapq.heappush(self._queues[pool], (order, next(self._serial), waiting))
                self._changed.notify()
                return
        waiting.fail(error)

    def leaving(self, pool: str, key: object) -> None:
        """Give back the slot of the task with this key, which will end in a moment: the next one may get ready."""
        with self._changed:
            if key not in self._leaving:
                self._leaving.add(key)
                self._running[pool] -= 1
                self._changed.notify()

    def is_leaving(self, key: object) -> bool:
        """Whether the task with this key has given its slot back, but not ended."""
        return key in self._leaving

    def ended(self, pool: str, key: object = None) -> None:
        """Give a slot back, unless the task with this key did so before."""
        with self._changed:
            if key in self._leaving:
                self._leaving.remove(key)
                return
            self._running[pool] -= 1
            self._changed.notify()

    def withdraw(self, leaving: Iterable[Waiting]) -> None:
        """Forget task runs that have not started; nothing more is done about them here."""
        gone = {id(waiting) for waiting in leaving}
        with self._changed:
            for pool, queue in self._queues.items():
                self._queues[pool] = [entry for entry in queue if id(entry[2]) not in gone]
                heapq.heapify(self._queues[pool])

    def set_slots(self, pool: str, slots: int) -> None:
        """Say how many task runs the workers of a pool can take at a time now."""
        with self._changed:
            self._slots[pool] = slots
            self._changed.notify()

    def break_pool(self, pool: str, error: PoolError) -> None:
        """Fail all task runs that wait for a pool, now and later: it will not get workers."""
        with self._changed:
            self._broken[pool] = error
            entries, self._queues[pool] = self._queues[pool], []
        for _, _, waiting in entries:
            waiting.fail(error)

    def expect(self, pool: str, tasks: int) -> None:
        """Announce task runs whose inputs are not there yet, or take that back with a negative number."""
        with self._changed:
            self._coming[pool] += tasks

    def waiting(self, pool: str) -> int:
        """Task runs that could start, were there a slot."""
        return len(self._queues[pool])

    def running(self, pool: str) -> int:
        """Task runs that have a slot."""
        return self._running[pool]

    def coming(self, pool: str) -> int:
        """Task runs that will ask for a slot once their inputs are there."""
        return self._coming[pool]

    def close(self) -> None:
        """Start nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while (waiting := self._next()) is not None:
            waiting.start()

    def _next(self) -> Waiting | None:
        with self._changed:
            while not self._closed:
                for pool, queue in self._queues.items():
                    if queue and self._running[pool] < self._slots[pool]:
                        self._running[pool] += 1
                        return heapq.heappop(queue)[2]
                self._changed.wait()
            return None
