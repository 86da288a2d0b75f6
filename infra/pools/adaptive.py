"""The size of one pool: as many workers as the tasks that ask for it need, none when nobody does."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from distributed.core import Status
from distributed.deploy.adaptive import Adaptive

if TYPE_CHECKING:
    from distributed.scheduler import TaskState, WorkerState

    from infra.pools.cluster import PooledCluster
    from infra.pools.pool import Pool

logger = logging.getLogger(__name__)


class PoolView:
    """The part of a cluster that one `Adaptive` may see and change: the workers of its pool."""

    def __init__(self, cluster: PooledCluster, pool: Pool) -> None:
        self.cluster = cluster
        self.pool = pool

    def _own(self, names: Iterable[object]) -> set[Any]:
        return {name for name in names if self.pool.owns(name)}

    @property
    def plan(self) -> set[Any]:
        """Names of the workers that shall exist."""
        return self._own(self.cluster.plan)

    @property
    def requested(self) -> set[Any]:
        """Names of the workers that were started or asked for."""
        return self._own(self.cluster.requested)

    @property
    def observed(self) -> set[Any]:
        """Names of the workers that are registered with the scheduler."""
        return self._own(self.cluster.observed)

    async def scale(self, count: int) -> None:
        """Bring the pool up to `count` workers."""
        self.cluster.grow_pool(self.pool, count)
        await self.cluster

    async def scale_down(self, names: Iterable[object]) -> None:
        """Close these workers and forget them."""
        await self.cluster.scale_down(self._own(names))

    def __await__(self) -> Any:
        return self.cluster.__await__()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cluster, name)


class PoolAdaptive(Adaptive):
    """Scales one pool by the tasks that ask for it.

    Dask's own `Adaptive` adds up all work whatever its resources, guesses half a second per task, and closes workers
    even when the scheduler refused to let them go.

    Args:
        cluster: The cluster.
        pool: The pool to scale.
        interval: Seconds between two looks; the default is what the kind of worker asks for.
    """

    def __init__(self, cluster: PooledCluster, pool: Pool, interval: float | None = None) -> None:
        interval = pool.start.interval if interval is None else interval
        self.pool = pool
        self.pooled = cluster
        super().__init__(
            PoolView(cluster, pool),  # type: ignore[arg-type]
            interval=interval,
            minimum=pool.minimum,
            maximum=pool.maximum,
            wait_count=max(1, math.ceil(pool.idle_seconds / interval)),
        )

    async def adapt(self) -> None:
        """One look: forget what is gone, then grow or shrink."""
        try:
            await self.pooled.look_after(self.pool)
            await super().adapt()
        except Exception:
            # Dask would stop looking after one error, and silently.
            logger.exception("pool %s: one look failed", self.pool.name)

    async def target(self) -> int:
        """Workers needed now."""
        pool, units = self.pool, self.demand()
        needed = pool.workers_for(units)
        coming = self.pooled.dispatcher.coming(pool.name)
        if pool.coming == "ignore" or not coming:
            return needed
        with_coming = pool.workers_for(units + coming)
        return with_coming if pool.coming == "start" else max(needed, min(len(self.plan), with_coming))

    def demand(self) -> float:
        """Resource units asked for by tasks that run or could run, without those that have given their slot back."""
        name, dispatcher = self.pool.name, self.pooled.dispatcher
        tasks = (task for task in self.pooled.ready_tasks() if not dispatcher.is_leaving(task.key))
        return dispatcher.waiting(name) + sum((task.resource_restrictions or {}).get(name, 0) for task in tasks)

    async def workers_to_close(self, target: int) -> list[Any]:
        """Idle workers of this pool beyond `target`, the youngest first."""
        members = [worker for worker in self._members() if worker.status == Status.running]
        idle = [worker for worker in members if not worker.processing and not worker.has_what]
        idle.sort(key=lambda worker: int(str(worker.name).rpartition("-")[2]), reverse=True)
        return [worker.name for worker in idle[: max(0, len(members) - target)]]

    async def scale_down(self, workers: Iterable[Any]) -> None:  # type: ignore[override]
        """Close these workers, except those that the scheduler cannot do without or that just got a task."""
        names = set(workers)
        members = {worker.name: worker for worker in self._members() if worker.name in names}
        free = {name for name, worker in members.items() if not worker.processing}
        closing = names - set(members)  # Not there yet: asked for, no longer needed.
        if free:
            retired = await self.pooled.scheduler.retire_workers(names=list(free), remove=True, close_workers=False)
            closing |= {info["name"] for info in retired.values()}
        if closing:
            logger.debug("pool %s lets go of %s", self.pool.name, ", ".join(sorted(map(str, closing))))
            await self.pooled.scale_down(closing)

    def _members(self) -> list[WorkerState]:
        return [worker for worker in self.pooled.scheduler.workers.values() if self.pool.owns(worker.name)]


def ask_for(task: TaskState, pool: Pool) -> bool:
    """Whether a task asks for workers of this pool."""
    return bool((task.resource_restrictions or {}).get(pool.name))
