"""Dask's scheduler, and what tasks tell it about the device of their worker (see `tasks.device`).

A task that will be through in a moment no longer has a slot: the next one goes to its worker and gets ready there. A
worker may hold one task more than it has slots for that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import dask
from distributed import Scheduler
from distributed.scheduler import TaskState, WorkerState

from infra.pools.dispatch import Dispatcher

#: How long the events of a client that has gone are kept. Dask's hour is for people who look at them; here each flow
#: run is a client, and a sweep of a library has thousands.
_EVENTS_KEPT: Final = {"distributed.scheduler.events-cleanup-delay": "1s"}

#: Name of the messages from workers.
DEVICE_MESSAGE: Final = "pool-device"


class PoolScheduler(Scheduler):
    """Dask's scheduler for workers that may hold a task ahead.

    Args:
        dispatcher: Has the queues of task runs.
        status_changed: Called with the name of a worker that is up, or that will leave.

    Attributes:
        bystanders: Keys of tasks that were lost with a worker while another task had its device.
    """

    def __init__(
        self, *args: Any, dispatcher: Dispatcher, status_changed: Callable[[Any], None], **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._status_changed = status_changed
        self.dispatcher = dispatcher
        self.bystanders: set[Any] = set()
        self._holders: dict[str, Any] = {}
        self.stream_handlers[DEVICE_MESSAGE] = self._hear

    def _hear(self, worker: str, key: Any, word: str) -> None:
        task = self.tasks.get(key)
        if task is None or task.processing_on is None or task.processing_on.address != worker:
            return  # Cancelled, or of a worker that was given up.
        if word == "taken":
            self._holders[worker] = key
        else:
            for pool in task.resource_restrictions or ():
                self.dispatcher.leaving(pool, key)

    def worker_objective(self, ts: TaskState, ws: WorkerState) -> tuple[Any, ...]:
        """Prefer an idle worker, then one whose task is leaving, to one in the middle of a task."""
        busy = sum(not self.dispatcher.is_leaving(task.key) for task in ws.processing)
        return (busy, len(ws.processing), *super().worker_objective(ts, ws))

    def handle_worker_status_change(self, status: Any, worker: str | WorkerState, stimulus_id: str) -> None:
        """Take a worker's new status, and tell it on."""
        super().handle_worker_status_change(status, worker, stimulus_id)
        state = self.workers.get(worker) if isinstance(worker, str) else worker
        if state is not None:
            self._status_changed(state.name)

    def remove_client(self, client: str, stimulus_id: str | None = None) -> None:
        """Forget a client, and soon what it did."""
        with dask.config.set(_EVENTS_KEPT):
            super().remove_client(client, stimulus_id)

    async def remove_worker(self, address: str, **options: Any) -> Any:
        """Forget a worker; note which of its tasks had nothing to do with its end."""
        worker, holder = self.workers.get(address), self._holders.pop(address, None)
        lost = {task.key for task in worker.processing} if worker is not None else set()
        if holder in lost:
            self.bystanders |= lost - {holder}
        return await super().remove_worker(address, **options)
