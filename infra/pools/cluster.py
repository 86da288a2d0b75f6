"""One Dask scheduler whose workers come from several named pools, each with a size of its own."""

from __future__ import annotations

import asyncio
import logging
import math
import pickle
import signal
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import dask
from distributed import Scheduler
from distributed.core import Status
from distributed.deploy.cluster import Cluster
from distributed.deploy.spec import SpecCluster
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.security import Security

from infra.pools.adaptive import PoolAdaptive, ask_for
from infra.pools.credentials import credential_files, temporary_security
from infra.pools.dispatch import Dispatcher
from infra.pools.leases import Leases
from infra.pools.pool import Pool, common_host
from infra.pools.scheduler import PoolScheduler
from infra.pools.status import StatusFile
from infra.pools.worker import quiet_dask
from tasks.errors import PoolError, SettingsError

if TYPE_CHECKING:
    from distributed.scheduler import TaskState

logger = logging.getLogger(__name__)

#: Dask settings of the scheduler and of the nannies beside it.
SCHEDULER_CONFIG: Final[dict[str, Any]] = {
    # A task whose worker is lost comes back at once: when it starts again, and how often, is decided in `runner`.
    "distributed.scheduler.allowed-failures": 0,
    # A chunk is about a minute of work. With Dask's half a second it would not be worth moving to a new, idle worker.
    "distributed.scheduler.unknown-task-duration": "30s",
    # A worker computing a chunk may hold the interpreter lock of its process for long.
    "distributed.scheduler.worker-ttl": "10 minutes",
    "distributed.scheduler.active-memory-manager.start": False,
    "distributed.comm.timeouts.connect": "60s",
    # Kept by the kernel, so a busy worker does not matter; a node that is cut off is given up after this time.
    "distributed.comm.timeouts.tcp": "30s",
    # Dask looks fifty times a second whether its event loop is alive; idle processes would burn percents on it.
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.tick.limit": "60s",
    "distributed.admin.system-monitor.interval": "5s",
    "distributed.admin.system-monitor.disk": False,
    "distributed.diagnostics.nvml": False,
    # What was computed and in which steps, which nobody reads here, is kept by number: thousands of task runs of it.
    "distributed.diagnostics.computations.max-history": 1,
    "distributed.admin.low-level-log-length": 100,
}

#: How often in a row workers of a pool may fail to start before its tasks fail. Those that started together and fail
#: together count once: a crowded machine or a file system that is slow for a minute fails all of them.
MAXIMUM_FAILED_STARTS: Final = 3

#: The same for workers whose job somebody else ended before they were up: that is no fault of theirs.
MAXIMUM_TAKEN_STARTS: Final = 20

#: Seconds a worker whose batch job goes on may be unconnected: a nanny needs some to start a process anew.
RETURN_SECONDS: Final = 20.0


class PooledCluster(SpecCluster):
    """One scheduler in this process and any number of elastic pools of workers.

    Every pool is a slice of `worker_spec` with its own adaptive scaling, which counts the tasks that ask for it.

    Args:
        pools: The pools, names unique.
        security: TLS between client, scheduler and workers: `True` for temporary credentials made here, `False` for
            none, or Dask's own object.
        dashboard: Serve Dask's dashboard on a free port (needs `bokeh`).
        interval: Seconds between two looks at the demand; the default is what each kind of worker asks for.
        warm: Start one worker of each pool right away instead of with the first task.
        status_folder: Where `superres pools status` finds this cluster; `default_home() / "pools"` by default.

    Attributes:
        dispatcher: The queues of task runs.
        leases: How long each worker held its node.

    Raises:
        SettingsError: Two pools have the same name, or there is none.
    """

    scheduler: Any  # Dask's attribute; `None` only before the constructor is through.

    def __init__(
        self,
        pools: Iterable[Pool],
        *,
        security: bool | Security = True,
        dashboard: bool = False,
        interval: float | None = None,
        warm: bool = False,
        status_folder: Path | None = None,
    ) -> None:
        self.pools: dict[str, Pool] = {}
        for pool in pools:
            if pool.name in self.pools:
                raise SettingsError(f"two pools are called {pool.name!r}", "Give each pool a name of its own")
            self.pools[pool.name] = pool
        if not self.pools:
            raise SettingsError("a cluster without pools cannot run anything", "Name at least one pool")
        quiet_dask()
        credentials = temporary_security() if security is True else security or None
        self._interval = interval
        self._adaptives: list[PoolAdaptive] = []
        self._failed_starts: Counter[str] = Counter()
        self._taken_starts: Counter[str] = Counter()
        self._last_failure: dict[str, str] = {}
        self._last_counted: dict[str, float] = {}
        self._names_used: set[str] = set()
        self._broken: dict[str, PoolError] = {}
        self._starting: set[asyncio.Future[None]] = set()
        self._joined: set[Any] = set()
        self._left: dict[Any, float] = {}
        self._credentials: dict[Path | None, Security | None] = {None: credentials}
        self._files = ExitStack()
        if credentials is not None:
            for directory in {pool.start.shared_directory for pool in self.pools.values()} - {None}:
                assert directory is not None
                self._credentials[directory] = self._files.enter_context(credential_files(credentials, directory))
        self._status = StatusFile(status_folder)
        self.leases = Leases()
        self.dispatcher = Dispatcher(self.pools)
        host = common_host(self.pools.values())
        try:
            self._open(host, credentials, dashboard)
        except RuntimeError as error:
            self.dispatcher.close()
            self._files.close()
            raise PoolError(
                f"the scheduler of the pools cannot start on {host} ({error.__cause__ or error})",
                "Correct the interface or the address of this machine in the settings of the pools",
            ) from error
        self.sync(self._begin_scaling, warm)

    # Start and end

    def _open(self, host: str, credentials: Security | None, dashboard: bool) -> None:
        super().__init__(
            scheduler={
                "cls": PoolScheduler,
                "options": {
                    "dispatcher": self.dispatcher,
                    "status_changed": self.status_changed,
                    "host": host,
                    "port": 0,
                    "protocol": "tls" if credentials else "tcp",
                    "security": credentials,
                    "dashboard": dashboard,
                    "dashboard_address": "127.0.0.1:0",
                    "plugins": [_Membership(self)],
                },
            },
            workers={},
            security=credentials,
            name="superres",
        )

    async def _start(self) -> None:
        # Worker processes are started by threads of this event loop and inherit its signal mask: blocked, a Ctrl-C
        # cannot hit a worker in the moment between its start and its own session.
        if threading.current_thread() is not threading.main_thread():
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with dask.config.set(SCHEDULER_CONFIG):
            await super()._start()

    async def _begin_scaling(self, warm: bool) -> None:
        for pool in self.pools.values():
            self.grow_pool(pool, max(pool.minimum, int(warm)))
            self._adaptives.append(PoolAdaptive(self, pool, self._interval))
        # Not awaited: the cluster can take tasks long before its workers are up.
        self._correct_state()

    async def _close(self) -> None:
        if self.status == Status.running:
            for adaptive in self._adaptives:
                adaptive.stop(reason="closing")
            self.dispatcher.close()
            # A worker that is still starting would make the orderly way wait until it is up.
            starting = [worker for worker in self._created if worker.status in (Status.init, Status.starting)]
            await asyncio.gather(*(worker.kill() for worker in starting))
            await asyncio.gather(*self._starting)
        await super()._close()
        for name in self._joined:
            self.leases.end(str(name))
        self._status.remove()
        self._files.close()

    # What the pools see

    @property
    def observed(self) -> set[Any]:
        """Names of all workers that are registered with the scheduler."""
        return {worker.name for worker in self.scheduler.workers.values()}

    def ready_tasks(self) -> Iterator[TaskState]:
        """All tasks that run or would, were there a worker. To be called in the cluster's event loop."""
        scheduler = self.scheduler
        processing = (worker.processing for worker in scheduler.workers.values())
        return chain(scheduler.unrunnable, scheduler.queued, *processing)

    def place_of(self, worker: str) -> str:
        """Where a worker runs or ran, with the path of its log, for messages."""
        return str(self.leases.latest(worker) or worker)

    def was_bystander(self, key: object) -> bool:
        """Whether a task was lost with a worker whose device another one had. True only once."""
        bystanders = self.scheduler.bystanders
        if found := key in bystanders:
            bystanders.discard(key)
        return found

    def pool_of(self, worker: object) -> Pool | None:
        """The pool that a worker belongs to."""
        return next((pool for pool in self.pools.values() if pool.owns(worker)), None)

    def snapshot(self) -> dict[str, Any]:
        """What `superres pools status` shows."""
        pools = {}
        for pool in self.pools.values():
            workers = []
            for name, worker in list(self.workers.items()):  # At once: the loop may add and remove some meanwhile.
                if pool.owns(name):
                    lease = self.leases.latest(str(name))
                    state = "ready" if name in self.observed else getattr(worker, "state", "STARTING").lower()
                    job = getattr(worker, "job_id", None) or ""
                    held = time.time() - lease.started if lease and lease.ended is None else 0.0
                    workers.append(
                        {"name": str(name), "state": state, "job": job, "node": lease.node if lease else "",
                         "log": lease.log if lease else "", "seconds": round(held)}
                    )  # fmt: skip
            pools[pool.name] = {
                "maximum": pool.maximum,
                "running": self.dispatcher.running(pool.name),
                "waiting": self.dispatcher.waiting(pool.name),
                "coming": self.dispatcher.coming(pool.name),
                "workers": workers,
            }
        return {"scheduler": self.scheduler.address, "pools": pools}

    # What the pools do

    def grow_pool(self, pool: Pool, size: int) -> None:
        """Add workers to the specification until the pool has `size`. They start with the next correction."""
        if pool.name in self._broken:
            return
        present = [name for name in self.worker_spec if pool.owns(name)]
        if self._failed_starts[pool.name]:
            # Until one has succeeded they try alone: with the machine to itself, or at the cost of one more job only.
            size = min(size, len(present) + all(name in self._joined for name in present))
        # A lost worker of another machine may still be alive there, so its name is never used again.
        taken = self._names_used if pool.start.shared_directory else self.worker_spec.keys()
        free = (index for index in count() if pool.worker_name(index) not in taken)
        for _ in range(size - len(present)):
            index = next(free)
            name = pool.worker_name(index)
            security = self._credentials.get(pool.start.shared_directory)
            self.worker_spec[name] = pool.start.spec(pool, index, security)
            self._names_used.add(name)

    async def look_after(self, pool: Pool) -> None:
        """Forget workers that are gone, so that the next look starts others, and see what slots there are.

        A pool whose workers fail to start again and again is given up, and the tasks that ask for it fail: nothing
        else would end them.
        """
        own = {name: worker for name, worker in self.workers.items() if pool.owns(name)}
        # Urgent: what became of a worker that is missing, and where one runs that has just come.
        news = (name in self._left or (name in self._joined and self.leases.latest(str(name)) is None) for name in own)
        await pool.start.watch(own.values(), urgent=any(news))
        for name, worker in own.items():
            if pool.start.shared_directory and time.time() - self._left.get(name, math.inf) > RETURN_SECONDS:
                worker.failure = f"it did not come back within {RETURN_SECONDS:.0f} s"
                await worker.close()
            if worker.status in (Status.failed, Status.closed) and name in self.worker_spec:
                await self._drop(pool, name, worker)
        hopeless = self._failed_starts[pool.name] >= MAXIMUM_FAILED_STARTS
        hopeless |= self._taken_starts[pool.name] >= MAXIMUM_TAKEN_STARTS
        if hopeless and pool.name not in self._broken:
            self._give_up(pool)
        if pool.name in self._broken:
            for name in [name for name in self.worker_spec if pool.owns(name)]:
                del self.worker_spec[name]
            self._fail_tasks(pool, self._broken[pool.name])
        self._count_slots(pool)
        self._status.write(self.snapshot)

    async def _drop(self, pool: Pool, name: Any, worker: Any) -> None:
        reason = getattr(worker, "failure", "") or "it ended by itself"
        logger.warning("%s is gone: %s", self.place_of(str(name)), reason)
        if name not in self._joined and worker.began > self._last_counted.get(pool.name, -math.inf):
            starts = self._taken_starts if getattr(worker, "taken", False) else self._failed_starts
            starts[pool.name] += 1
            self._last_counted[pool.name] = time.monotonic()
            self._last_failure[pool.name] = reason
        del self.workers[name]
        if pool.start.shared_directory or name not in self._joined:
            del self.worker_spec[name]
        self._joined.discard(name)
        self._left.pop(name, None)
        self.leases.end(str(name))
        for address in [state.address for state in self.scheduler.workers.values() if state.name == name]:
            # The batch system gave the node to nobody or to somebody else; this worker only does not know it yet.
            await self.scheduler.remove_worker(address, stimulus_id=f"lost-{time.time()}", expected=False, close=True)

    def _give_up(self, pool: Pool) -> None:
        error = PoolError(
            f"workers of pool {pool.name!r} failed to start "
            f"{self._failed_starts[pool.name] + self._taken_starts[pool.name]} times in a row: "
            + self._last_failure[pool.name],
            "Look at the output above or in the log for the reason; memory and disk space are the usual ones",
        )
        self._broken[pool.name] = error
        self.dispatcher.break_pool(pool.name, error)

    def _fail_tasks(self, pool: Pool, error: PoolError) -> None:
        scheduler = self.scheduler
        stimulus = f"pool-broken-{time.time()}"
        for task in [task for task in self.ready_tasks() if ask_for(task, pool)]:
            recommendations = scheduler.transition(
                task.key, "erred", exception=pickle.dumps(error), cause=task.key, stimulus_id=stimulus
            )
            scheduler.transitions(recommendations, stimulus_id=stimulus)

    def joined(self, worker: Any) -> None:
        """A worker registered with the scheduler."""
        pool = self.pool_of(worker)
        if pool is not None:
            self._left.pop(worker, None)
            self._joined.add(worker)
            self._failed_starts[pool.name] = self._taken_starts[pool.name] = 0
            job = self.workers.get(worker)
            if job is not None and pool.start.shared_directory is None:
                self.leases.begin(pool.name, str(worker))
            self._count_slots(pool)

    def status_changed(self, worker: Any) -> None:
        """A worker is up, or will leave."""
        pool = self.pool_of(worker)
        if pool is not None:
            self._count_slots(pool)

    def left(self, worker: Any) -> None:
        """A worker is no longer registered with the scheduler."""
        pool = self.pool_of(worker)
        if pool is not None:
            self._left.setdefault(worker, time.time())
            self._count_slots(pool)

    def _count_slots(self, pool: Pool) -> None:
        # One that is not quite up would be passed over for one in the middle of a task.
        workers = [state for state in self.scheduler.workers.values() if pool.owns(state.name)]
        self.dispatcher.set_slots(pool.name, pool.slots * sum(state.status == Status.running for state in workers))

    async def _correct_state_internal(self) -> None:
        # Dask's own version waits until every new worker is up before it returns, so that one pool could not grow
        # while a worker of another one starts, and closing would wait for all of them.
        async with self._lock:
            self._correct_state_waiting = None
            leaving = {name: self.workers.pop(name) for name in set(self.workers) - set(self.worker_spec)}
            await asyncio.gather(*(worker.close() for worker in leaving.values()), return_exceptions=True)
            for name in leaving:
                self._left.pop(name, None)
                self.leases.end(str(name))
            for name in sorted(set(self.worker_spec) - set(self.workers)):
                spec = self.worker_spec[name]
                address = getattr(self.scheduler, "contact_address", None) or self.scheduler.address
                with dask.config.set(SCHEDULER_CONFIG):  # Nannies live in this process too.
                    worker = spec["cls"](address, **{"name": name, **spec["options"]})
                worker._cluster = weakref.ref(self)
                worker.leases = self.leases
                worker.began = time.monotonic()
                self._created.add(worker)
                self.workers[name] = worker
                task = asyncio.ensure_future(self._start_worker(name, worker))
                self._starting.add(task)
                task.add_done_callback(self._starting.discard)

    async def _start_worker(self, name: str, worker: Any) -> None:
        try:
            await worker
        except Exception as error:  # Seen again and counted by `look_after`; no reason to stop the others.
            worker.failure = getattr(worker, "failure", "") or str(error)
            worker.status = Status.failed

    def __await__(self) -> Generator[Any, Any, Self]:
        async def aligned() -> Self:
            if self.status == Status.created:
                await self._start()
            await self._correct_state()
            return self

        return aligned().__await__()

    def _update_worker_status(self, op: str, msg: Any) -> None:
        # Without Dask's timer for workers that vanish without a word: `look_after` knows more about them.
        Cluster._update_worker_status(self, op, msg)

    # Dask's own way to scale does not know pools.

    def scale(self, n: int = 0, memory: Any = None, cores: Any = None) -> Any:
        """Only `scale(0)`, which closing uses: the size of each pool follows its tasks."""
        if n or memory or cores:
            raise PoolError("the size of a pool follows its tasks", "Set minimum and maximum of the pool")
        return super().scale(0)

    def adapt(self, *args: Any, **options: Any) -> Any:
        """Not available: every pool adapts from the start."""
        raise PoolError("pools adapt by themselves", "Set minimum, maximum and idle_seconds of the pool")


class _Membership(SchedulerPlugin):
    """Tells the cluster which workers there are, the moment that changes."""

    name = "pool-membership"

    def __init__(self, cluster: PooledCluster) -> None:
        self._cluster = weakref.ref(cluster)
        self._names: dict[str, Any] = {}

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        self._names[worker] = scheduler.workers[worker].name
        # Dask keeps the last thousand messages to each worker, and each holds a task run: gigabytes with many workers.
        scheduler.stream_comms[worker].recent_message_log = deque(maxlen=0)
        if (cluster := self._cluster()) is not None:
            cluster.joined(self._names[worker])

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: Any) -> None:
        name = self._names.pop(worker, None)
        if (cluster := self._cluster()) is not None and name is not None:
            cluster.left(name)
