"""How runs in threads are stopped: signals reach the main thread alone, so the others look whether they should end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, TypeVar, cast

from prefect.futures import PrefectFuture

from infra.pools.runner import PoolFuture

T = TypeVar("T")

#: Seconds between two looks of a run that waits for a task run.
LOOK_SECONDS: Final = 1.0

_stop: ContextVar[threading.Event | None] = ContextVar("stop", default=None)


class RunStopped(BaseException):
    """Whoever started this run wants it to end. No `Exception`, as `KeyboardInterrupt` is none, whose echo it is."""


@contextmanager
def stopped_by(stop: threading.Event) -> Iterator[None]:
    """Have the runs of this block, in threads that copy its context too, end soon after `stop` is set."""
    token = _stop.set(stop)
    try:
        yield
    finally:
        _stop.reset(token)


def check_stop() -> None:
    """End here if somebody wants that.

    Raises:
        RunStopped: Somebody does.
    """
    if (stop := _stop.get()) is not None and stop.is_set():
        raise RunStopped("stopped together with what it was a part of")


def settled(future: PrefectFuture[T], seconds: float = LOOK_SECONDS) -> bool:
    """Wait a moment for a task run on a pool; whether it has ended."""
    check_stop()
    pooled = cast(PoolFuture[T], future)  # Its `state` would ask Prefect each time.
    pooled.wait(seconds)
    return pooled.is_settled


def result_of_task(future: PrefectFuture[T]) -> Any:
    """What a task run on a pool returns, once it has ended."""
    while not settled(future):
        pass
    return future.result()
