"""One Dask scheduler whose workers come from several named pools, each with a size of its own."""

from __future__ import annotations

import asyncio
import datetime
import logging
import pickle
import signal
import threading
import weakref
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from itertools import chain, count
from typing import TYPE_CHECKING, Any, Final, Self

import dask
from distributed import Scheduler
from distributed.core import Status
from distributed.deploy.cluster import Cluster
from distributed.deploy.spec import SpecCluster
from distributed.metrics import time
from distributed.security import Security

from infra.pools.adaptive import PoolAdaptive, ask_for
from infra.pools.attempts import TaskStarts
from infra.pools.pool import Pool
from infra.pools.worker import LocalNanny, quiet_dask
from tasks.errors import PoolError, SettingsError

if TYPE_CHECKING:
    from distributed.scheduler import TaskState

logger = logging.getLogger(__name__)

#: Dask settings of the scheduler and of the nannies beside it.
SCHEDULER_CONFIG: Final[dict[str, Any]] = {
    # Dask counts a lost worker against every task in its queue. What one task may lose is counted in `attempts`; this
    # only bounds workers that die before their task begins.
    "distributed.scheduler.allowed-failures": 100,
    # A chunk is about a minute of work. With Dask's half a second it would not be worth moving to a new, idle worker.
    "distributed.scheduler.unknown-task-duration": "30s",
    # A worker computing a chunk may hold the interpreter lock of its process for long.
    "distributed.scheduler.worker-ttl": "10 minutes",
    "distributed.scheduler.active-memory-manager.start": False,
    "distributed.comm.timeouts.connect": "60s",
    "distributed.comm.timeouts.tcp": "120s",
    # Dask looks fifty times a second whether its event loop is alive; idle processes would burn percents on it.
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.tick.limit": "60s",
    "distributed.admin.system-monitor.interval": "5s",
    "distributed.admin.system-monitor.disk": False,
    "distributed.diagnostics.nvml": False,
}

#: Workers of a pool that may fail to start, one after the other, before its tasks fail.
MAXIMUM_FAILED_STARTS: Final = 3


class PooledCluster(SpecCluster):
    """One scheduler in this process and any number of elastic pools of workers.

    Every pool is a slice of `worker_spec` with its own adaptive scaling, which counts the tasks that ask for it.

    Args:
        pools: The pools, names unique.
        security: TLS between client, scheduler and workers: `True` for temporary credentials made here, `False` for
            none, or Dask's own object.
        dashboard: Serve Dask's dashboard on a free port (needs `bokeh`).
        host: Address the scheduler listens on; only workers on other machines need more than this one.
        interval: Seconds between two looks at the demand; the default is what each kind of worker asks for.
        warm: Start one worker of each pool right away instead of with the first task.

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
        host: str = "127.0.0.1",
        interval: float | None = None,
        warm: bool = False,
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
        self._broken: dict[str, PoolError] = {}
        self._starting: set[asyncio.Future[None]] = set()
        self._coming: Counter[str] = Counter()
        self._coming_lock = threading.Lock()
        self.starts = TaskStarts()
        super().__init__(
            scheduler={
                "cls": Scheduler,
                "options": {
                    "host": host,
                    "port": 0,
                    "protocol": "tls" if credentials else "tcp",
                    "security": credentials,
                    "dashboard": dashboard,
                    "dashboard_address": "127.0.0.1:0",
                    "plugins": [self.starts],
                },
            },
            workers={},
            security=credentials,
            name="superres",
        )
        self.sync(self._begin_scaling, warm)

    # Start and end

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
            # A worker that is still starting would make the orderly way wait until it is up.
            starting = [worker for worker in self._created if worker.status in (Status.init, Status.starting)]
            await asyncio.gather(*(worker.kill() for worker in starting if isinstance(worker, LocalNanny)))
            await asyncio.gather(*self._starting)
        await super()._close()

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

    def coming(self, pool: str) -> int:
        """Tasks that will ask for this pool once their inputs are there."""
        return self._coming[pool]

    def expect(self, pool: str, tasks: int) -> None:
        """Announce tasks (or take back, with a negative number) that will ask for a pool. Callable from any thread."""
        with self._coming_lock:
            self._coming[pool] += tasks

    # What the pools do

    def grow_pool(self, pool: Pool, size: int) -> None:
        """Add workers to the specification until the pool has `size`. They start with the next correction."""
        if pool.name in self._broken:
            return
        present = sum(1 for name in self.worker_spec if pool.owns(name))
        free = (index for index in count() if pool.worker_name(index) not in self.worker_spec)
        for _ in range(size - present):
            index = next(free)
            self.worker_spec[pool.worker_name(index)] = pool.start.spec(pool, index, self.security or None)

    async def drop_dead_workers(self, pool: Pool) -> None:
        """Forget workers whose nanny gave up, so that the next correction starts them anew.

        A pool whose workers fail to start again and again is given up, and the tasks that ask for it fail: nothing
        else would end them.
        """
        if any(pool.owns(name) for name in self.observed):
            self._failed_starts[pool.name] = 0
        for name, worker in list(self.workers.items()):
            if pool.owns(name) and worker.status in (Status.failed, Status.closed) and name in self.worker_spec:
                del self.workers[name]
                self._failed_starts[pool.name] += 1
                logger.warning("worker %s ended by itself", name)
        failed = self._failed_starts[pool.name]
        if failed >= MAXIMUM_FAILED_STARTS and pool.name not in self._broken:
            self._broken[pool.name] = PoolError(
                f"workers of pool {pool.name!r} failed to start {failed} times in a row",
                "Look at the output above for the reason; memory and disk space are the usual ones",
            )
        if pool.name in self._broken:
            for name in [name for name in self.worker_spec if pool.owns(name)]:
                del self.worker_spec[name]
            self._fail_tasks(pool, self._broken[pool.name])

    def _fail_tasks(self, pool: Pool, error: PoolError) -> None:
        scheduler = self.scheduler
        stimulus = f"pool-broken-{time()}"
        for task in [task for task in self.ready_tasks() if ask_for(task, pool)]:
            recommendations = scheduler.transition(
                task.key, "erred", exception=pickle.dumps(error), cause=task.key, stimulus_id=stimulus
            )
            scheduler.transitions(recommendations, stimulus_id=stimulus)

    async def _correct_state_internal(self) -> None:
        # Dask's own version waits until every new worker is up before it returns, so that one pool could not grow
        # while a worker of another one starts, and closing would wait for all of them.
        async with self._lock:
            self._correct_state_waiting = None
            leaving = [self.workers.pop(name) for name in set(self.workers) - set(self.worker_spec)]
            await asyncio.gather(*(worker.close() for worker in leaving), return_exceptions=True)
            for name in sorted(set(self.worker_spec) - set(self.workers)):
                spec = self.worker_spec[name]
                address = getattr(self.scheduler, "contact_address", None) or self.scheduler.address
                with dask.config.set(SCHEDULER_CONFIG):  # Nannies live in this process too.
                    worker = spec["cls"](address, **{"name": name, **spec["options"]})
                worker._cluster = weakref.ref(self)
                self._created.add(worker)
                self.workers[name] = worker
                task = asyncio.ensure_future(self._start_worker(name, worker))
                self._starting.add(task)
                task.add_done_callback(self._starting.discard)

    async def _start_worker(self, name: str, worker: Any) -> None:
        try:
            await worker
        except Exception as error:  # Seen again and counted by `drop_dead_workers`; no reason to stop the others.
            logger.debug("worker %s did not start: %s", name, error)

    def __await__(self) -> Generator[Any, Any, Self]:
        async def aligned() -> Self:
            if self.status == Status.created:
                await self._start()
            await self._correct_state()
            return self

        return aligned().__await__()

    def _update_worker_status(self, op: str, msg: Any) -> None:
        if op == "remove" and isinstance(self.workers.get(self._name_at(msg)), LocalNanny):
            # Its nanny is in this process and is already starting the next one. Dask's timer, meant for jobs that
            # vanish without a word, would close a nanny that takes its time on a busy machine.
            Cluster._update_worker_status(self, op, msg)
            return
        super()._update_worker_status(op, msg)

    def _name_at(self, address: str) -> Any:
        return self.scheduler_info["workers"].get(address, {}).get("name")

    # Dask's own way to scale does not know pools.

    def scale(self, n: int = 0, memory: Any = None, cores: Any = None) -> Any:
        """Only `scale(0)`, which closing uses: the size of each pool follows its tasks."""
        if n or memory or cores:
            raise PoolError("the size of a pool follows its tasks", "Set minimum and maximum of the pool")
        return super().scale(0)

    def adapt(self, *args: Any, **options: Any) -> Any:
        """Not available: every pool adapts from the start."""
        raise PoolError("pools adapt by themselves", "Set minimum, maximum and idle_seconds of the pool")


def temporary_security() -> Security:
    """Credentials for one cluster, in memory only: every connection is encrypted and authenticated by them.

    The same as Dask's `Security.temporary()` but with an elliptic curve key, which takes no measurable time to make.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "dask-internal")])
    now = datetime.datetime.now(tz=datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("dask-internal")]), critical=False)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # Clocks of other nodes may be behind.
        .not_valid_after(now + datetime.timedelta(days=365))
        .sign(key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    certificate_pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
    roles = {
        f"tls_{role}_{part}": pem
        for role in ("client", "scheduler", "worker")
        for part, pem in (("key", key_pem), ("cert", certificate_pem))
    }
    return Security(require_encryption=True, tls_ca_file=certificate_pem, **roles)
