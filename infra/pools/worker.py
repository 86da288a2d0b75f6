"""A worker process of a pool: its session, its priority, what dies with it; and the nanny that keeps it alive."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib
import logging
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import dask.config
from distributed import Nanny, Worker
from distributed.comm.core import CommClosedError
from distributed.core import Status

from tasks.errors import PoolError

#: Dask settings of the worker process. Its memory is not Dask's business: frames live outside Dask, and where memory
#: is limited a control group does it. The rest keeps an idle worker from waking up for statistics nobody reads.
WORKER_CONFIG: Final[dict[str, Any]] = {
    "distributed": {
        "worker": {
            "memory": {
                "target": False,
                "spill": False,
                "pause": False,
                "terminate": False,
                "monitor-interval": "5s",
            },
            "profile": {"enabled": False},
        },
        "comm": {"timeouts": {"connect": "60s", "tcp": "30s"}},
        "admin": {
            "system-monitor": {"interval": "5s", "disk": False},
            "tick": {"interval": "1s", "limit": "60s"},
            "low-level-log-length": 100,
        },
        "diagnostics": {"nvml": False},
    },
    "logging": {"distributed": "critical"},
}

#: Seconds a worker gets to end by itself before it is killed, times 0.8 in Dask's arithmetic. An idle one takes a
#: fraction of a second; one in the middle of a task leaves as soon as Prefect's last events are sent.
_CLOSE_TIMEOUT: Final = 3.5

#: Dask's words for the end of a worker that lost the scheduler, and of one that the scheduler gave up.
_UNWANTED: Final = frozenset({"worker-handle-scheduler-connection-broken", "scheduler-remove-worker"})

#: From malloc.h.
_M_ARENA_MAX: Final = -8

#: Seconds for those events.
_LAST_EVENTS: Final = 1.0

#: The shell that outlives this process; kept here because a collected `Popen` closes its pipe.
_guard: subprocess.Popen[bytes] | None = None

_HEARTBEAT_SECONDS: Final = 5.0

#: Seconds until a worker process must be up; generous, for machines that are busy starting up.
START_TIMEOUT: Final = 180.0


class PoolWorker(Worker):
    """A Dask worker in a session of its own, at a chosen priority, that leaves no process behind.

    Args:
        niceness: Added to the scheduling priority of this process and its children.
        imports: Modules to import before the worker takes tasks.
        scheduler_timeout: Seconds after which a worker that finds no scheduler gives up; `None` for never.
        arenas: See `_Arenas`; did its work when it reached this process.
        **options: See `distributed.Worker`.
    """

    def __init__(
        self,
        *args: Any,
        niceness: int = 0,
        imports: Sequence[str] = (),
        scheduler_timeout: float | None = None,
        arenas: object = None,
        **options: Any,
    ) -> None:
        quiet_dask()
        logging.getLogger("prefect.task_runs").addFilter(_is_no_success)
        _own_session()
        if niceness:
            # Linux keeps niceness per thread and threads inherit it, so this comes before Dask starts any.
            os.nice(niceness)
            _rank_session(niceness)
        super().__init__(*args, **options)
        self._imports = tuple(imports)
        self._scheduler_timeout = scheduler_timeout

    async def start_unsafe(self) -> PoolWorker:
        """Load the modules, then register.

        A task that came earlier would import the same modules at the same time, which packages whose modules import one
        another in a circle do not survive.
        """
        await asyncio.get_running_loop().run_in_executor(None, _import_ahead, self._imports)
        # Not Dask's `death_timeout`, which would count the imports too: on a busy machine these take longer.
        try:
            async with asyncio.timeout(self._scheduler_timeout):
                return await super().start_unsafe()
        except TimeoutError:
            # Printed: what is raised here is wrapped, sent and wrapped again before it ends the nanny.
            error = PoolError(
                f"no scheduler at {self.scheduler.address} within {self._scheduler_timeout:g} s",
                "If its flow still runs, look for a firewall between this node and it",
            )
            print(error, file=sys.stderr, flush=True)
            raise error from None

    async def heartbeat(self) -> None:
        """Tell the scheduler what is going on here, less often than Dask would: two processes a second add up.

        What the scheduler acts on, ended tasks and lost connections, reaches it at once without.
        """
        await super().heartbeat()
        beat = self.periodic_callbacks["heartbeat"]
        beat.callback_time = max(beat.callback_time, 1000 * _HEARTBEAT_SECONDS)

    async def close(  # type: ignore[override]
        self, timeout: float = 30, executor_wait: bool = True, nanny: bool = True, reason: str = "worker-close"
    ) -> str | None:
        """End the worker; at once when a task runs that nobody wants any more, because nothing can stop a thread.

        That is so when its nanny ends it, when the scheduler is gone, and when the scheduler has given the task to
        another worker.
        """
        if self.state.all_running_tasks and (not nanny or reason in _UNWANTED):
            if nanny and self.nanny:
                with suppress(Exception):  # Otherwise it would start the worker anew.
                    async with self.rpc(str(self.nanny)) as nanny_comm:
                        await asyncio.wait_for(nanny_comm.close_gracefully(reason=reason), _LAST_EVENTS)
            await asyncio.get_running_loop().run_in_executor(None, _send_prefect_rest)
            os._exit(0)
        return await super().close(timeout=timeout, executor_wait=executor_wait, nanny=nanny, reason=reason)


class PoolNanny(Nanny):
    """Keeps one worker process alive; ends it quickly when asked.

    Args:
        niceness: See `PoolWorker`.
        imports: See `PoolWorker`.
        scheduler_timeout: See `PoolWorker`; also for the nanny itself.
        **options: See `distributed.Nanny`.
    """

    def __init__(
        self,
        *args: Any,
        niceness: int = 0,
        imports: Sequence[str] = (),
        scheduler_timeout: float | None = None,
        **options: Any,
    ) -> None:
        options |= {
            "worker_class": PoolWorker,
            "dashboard_address": "127.0.0.1:0",
            "preload": [],
            "preload_nanny": [],
            "niceness": niceness,
            "imports": tuple(imports),
            "scheduler_timeout": scheduler_timeout,
        }
        super().__init__(*args, **options)
        if scheduler_timeout is not None:
            self.rpc.timeout = scheduler_timeout
        self.config = dask.config.merge(self.config, WORKER_CONFIG)
        # Dask would write these into the environment of *this* process (threads per library, one for all pools). The
        # pool's own variables reach the worker through `env`, early enough for every library a task loads.
        self.env = {name: value for name, value in self.env.items() if name not in self.pre_spawn_env}
        self.env.update({name: str(value) for name, value in (options.get("env") or {}).items()})
        self.pre_spawn_env = {}
        self.worker_kwargs["arenas"] = _Arenas(self.env.get("MALLOC_ARENA_MAX", ""))

    async def kill(self, timeout: float = 5, reason: str = "nanny-kill") -> None:
        """End the worker process, at once while it starts."""
        process = self.process
        if process is None:
            return
        if process.status == Status.starting and process.process is not None and process.process.pid:
            # Dask would wait until the process is up, only to end it.
            await process.process.kill()
            with suppress(TimeoutError):
                await asyncio.wait_for(process.stopped.wait(), _CLOSE_TIMEOUT)
        await super().kill(timeout=_CLOSE_TIMEOUT, reason=reason)


class LocalNanny(PoolNanny):
    """A nanny in the process of the scheduler, for a worker of this machine."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "host": "127.0.0.1", "death_timeout": START_TIMEOUT})


def quiet_dask() -> None:
    """Keep Dask's own log lines off the terminal; this project reports what matters on its own loggers."""
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    for name, logger in list(logging.Logger.manager.loggerDict.items()):
        if name.startswith("distributed.") and isinstance(logger, logging.Logger):
            logger.setLevel(logging.NOTSET)
    logging.getLogger("distributed.scheduler").addFilter(_is_news)


def _is_no_success(record: logging.LogRecord) -> bool:
    """Not: that one of thousands of task runs ended well, which its state says already."""
    return record.levelno > logging.INFO or not record.getMessage().startswith("Finished in state")


def _is_news(record: logging.LogRecord) -> bool:
    """Not: what the scheduler reports to all flow runs met one that has just closed its connection."""
    return not (record.exc_info and isinstance(record.exc_info[1], CommClosedError))


def _own_session() -> None:
    """Become the leader of a session, and see that everything in it dies with this process.

    Ctrl-C in a terminal reaches every process of the foreground group: outside of it, the flow decides when workers
    end. And whatever way this process ends, SIGKILL included, a shell that waits for the end of a pipe then kills the
    processes that tasks had started.
    """
    try:
        os.setsid()
    except PermissionError:
        return  # Already a leader.
    # The nanny's thread starts this process with SIGINT blocked; ffmpeg and tasks shall see an ordinary one.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    global _guard
    _guard = subprocess.Popen(
        ["/bin/sh", "-c", f"read -r _; kill -9 -{os.getpid()} 2>/dev/null"],
        stdin=subprocess.PIPE,  # Its write end closes with this process, by whatever way it ends.
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )


class _Arenas:
    """Limits the arenas of malloc in the process that unpickles it.

    glibc reads `MALLOC_ARENA_MAX` when a process starts, but a nanny sets the variables of its worker later, when the
    first threads have made arenas that all later threads share. A worker's arguments are unpickled before any thread
    starts.

    Args:
        limit: The value of the variable; empty for no limit.
    """

    def __init__(self, limit: str) -> None:
        self.limit = limit

    def __reduce__(self) -> tuple[Callable[[str], _Arenas], tuple[str]]:
        return _limit_arenas, (self.limit,)


def _limit_arenas(limit: str) -> _Arenas:
    if limit.isdigit() and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, int(limit))
    return _Arenas(limit)


def _rank_session(niceness: int) -> None:
    """Give the session of this process a scheduling priority against other sessions.

    Where the kernel groups processes by session (`sched_autogroup_enabled`, the default of most distributions), the
    niceness of a process counts only within its own session, and a worker that leads one would get as much time as
    all of inference.
    """
    with suppress(OSError):  # No such kernel feature, or a control group that decides instead.
        Path("/proc/self/autogroup").write_text(str(niceness))


def _send_prefect_rest() -> None:
    if "prefect.events.worker" in sys.modules:
        from prefect.events.worker import EventsWorker

        EventsWorker.drain_all(timeout=_LAST_EVENTS, at_exit=False)  # Logs too: all queued services share one list.


def _import_ahead(modules: tuple[str, ...]) -> None:
    gc.disable()  # Imports make objects that stay; collecting among them costs a tenth of the time.
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception:  # The task that needs it reports it; here it is only a head start.
            continue
    from infra.prefect_models import complete_models  # Here: nannies need none.

    complete_models()
    gc.freeze()
    gc.enable()
