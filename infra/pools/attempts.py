"""How often each task was started, counted where no worker can lose the count: in the scheduler.

Dask counts a lost worker against every task assigned to it, also those still in its queue, so its limit
(`allowed-failures`) condemns innocent chunks. Here a worker asks before it starts a task; a start that never came back
is a loss of exactly that task.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.utils import sync
from distributed.worker import get_worker

from tasks.errors import PoolError

if TYPE_CHECKING:
    from distributed import Scheduler

#: Times a task may take its worker down with it before it counts as failed.
MAXIMUM_LOSSES: Final = 5

_HANDLER: Final = "pool_task_starts"


class TaskStarts(SchedulerPlugin):
    """Counts the starts of every task that the scheduler still knows.

    Args:
        maximum_losses: Times a task may take its worker down with it.
    """

    name = "pool-task-starts"

    def __init__(self, maximum_losses: int = MAXIMUM_LOSSES) -> None:
        self.maximum_losses = maximum_losses
        self.counts: dict[Any, int] = {}

    async def start(self, scheduler: Scheduler) -> None:
        """Answer workers from now on."""
        scheduler.handlers[_HANDLER] = self._count

    async def _count(self, key: str) -> int:
        """Count one more start; the number of losses that came before it if they are too many, otherwise 0."""
        self.counts[key] = self.counts.get(key, 0) + 1
        losses = self.counts[key] - 1
        return losses if losses >= self.maximum_losses else 0

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        """Forget the count of a task that is done, failed or no longer wanted."""
        if finish in ("memory", "erred", "forgotten"):
            self.counts.pop(key, None)


def check_start(label: str) -> None:
    """Count this start of the current task; called in the task's thread on a worker, before anything else.

    Args:
        label: The task as a person knows it, for the message.

    Raises:
        PoolError: The task took its worker down more often than allowed.
    """
    worker = get_worker()
    try:
        losses = sync(worker.loop, getattr(worker.scheduler, _HANDLER), key=worker.get_current_task())
    except (AttributeError, ValueError):
        return  # A scheduler that this project did not start: Dask's own limit applies.
    if isinstance(losses, int) and losses:
        raise PoolError(
            f"{label} lost its worker {losses} times",
            "Look for memory limits, a faulty device or a crash in the logs of the worker, then run the job again",
        )
