"""Pools that are opened before a flow begins, and how a task runner finds them."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any

from infra.pools.pool import Pool, local_pools

if TYPE_CHECKING:
    from infra.pools.cluster import PooledCluster

_current: ContextVar[OpenPools | None] = ContextVar("open_pools", default=None)
_open: list[OpenPools] = []


class OpenPools(AbstractContextManager["PooledCluster"]):
    """Pools being opened or open; a context manager that gives the `PooledCluster`.

    `start()` returns at once and opens them in the background, imports included, so that it overlaps with whatever
    else a program does at its start. Made by `open_pools()`.
    """

    def __init__(self, pools: Iterable[Pool], options: dict[str, Any]) -> None:
        self._pools = tuple(pools)
        self._options = options
        self._cluster: PooledCluster | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._token: Token[OpenPools | None] | None = None

    def start(self) -> OpenPools:
        """Begin to open the pools in the background; does nothing when that has begun."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="open-pools", daemon=True)
            self._thread.start()
        return self

    def wait(self) -> PooledCluster:
        """Wait until tasks can be submitted. Workers may still be starting.

        Raises:
            PoolError: The scheduler could not start.
        """
        self.start()
        assert self._thread is not None
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._cluster is not None
        return self._cluster

    def close(self) -> None:
        """End all workers and the scheduler. Safe to call twice."""
        if self in _open:
            _open.remove(self)
        if self._thread is not None:
            self._thread.join()
        if self._cluster is not None:
            self._cluster.close()

    def __enter__(self) -> PooledCluster:
        cluster = self.wait()
        _open.append(self)
        self._token = _current.set(self)
        return cluster

    def __exit__(self, *_: object) -> None:
        if self._token is not None:
            _current.reset(self._token)
            self._token = None
        self.close()

    def _run(self) -> None:
        try:
            from infra.pools.cluster import PooledCluster

            self._cluster = PooledCluster(self._pools, **self._options)
        except BaseException as error:  # Raised by `wait()`, in the thread that needs the pools.
            self._error = error


def open_pools(
    pools: Iterable[Pool] | None = None,
    *,
    security: Any = True,
    dashboard: bool = False,
    interval: float | None = None,
    warm: bool = True,
) -> OpenPools:
    """Open pools for all flows that run inside the `with` block.

    Example:
        ```python
        with open_pools(local_pools()) as cluster:
            upscale_video("film.mkv")
        ```

    Args:
        pools: The pools; `local_pools()` by default.
        security: See `PooledCluster`.
        dashboard: See `PooledCluster`.
        interval: See `PooledCluster`.
        warm: Start one worker of each pool right away.
    """
    options = {"security": security, "dashboard": dashboard, "interval": interval, "warm": warm}
    return OpenPools(local_pools() if pools is None else pools, options)


def current_cluster() -> PooledCluster | None:
    """The cluster of the innermost `with open_pools()` around the caller, or the only one open in this process.

    The second rule serves notebooks, where the cells of one session do not share a context.
    """
    opened = _current.get()
    if opened is None and len(_open) == 1:
        opened = _open[0]
    return opened.wait() if opened is not None else None
