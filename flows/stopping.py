"""How runs are stopped and paused from outside, where no signal tells them.

Signals reach the main thread alone, so runs in other threads look whether they should end. What somebody asks for in
the Prefect UI reaches a process as a signal only if a worker started it, and a pause never does: so each run reads its
own state on the server every few seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from typing import Any, Final, TypeVar, cast
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import Pause
from prefect.futures import PrefectFuture
from prefect.states import Cancelled, Running, Suspended

from infra.pools.runner import PoolFuture
from infra.prefect_models import complete_models
from tasks.errors import PoolError, StoppedError

T = TypeVar("T")

#: Seconds between two looks of a run that waits for a task run.
LOOK_SECONDS: Final = 1.0

#: Seconds between two looks at the state that the server has.
_STATE_SECONDS: Final = 2.0

_stop: ContextVar[threading.Event | None] = ContextVar("stop", default=None)


class RunStopped(BaseException):
    """Whoever started this run wants it to end. No `Exception`, as `KeyboardInterrupt` is none, whose echo it is."""


class RunCancelled(RunStopped):
    """Somebody has cancelled this run on the server."""


@contextmanager
def stopped_by(stop: threading.Event) -> Iterator[None]:
    """Have the runs of this block, in threads that copy its context too, end soon after `stop` is set."""
    token = _stop.set(stop)
    try:
        yield
    finally:
        _stop.reset(token)


class StateWatch:
    """The state of a flow run as the server has it, read by a thread of its own: a server that is away stops nothing.

    Args:
        run_id: Of the flow run.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = UUID(run_id)
        self._state: State[Any] | None = None
        self._ended = threading.Event()
        context = copy_context()  # Knows the server.
        self._thread = threading.Thread(target=context.run, args=(self._watch,), name="run-state", daemon=True)
        self._thread.start()

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody wants the run to end."""
        return self._state is not None and (self._state.is_cancelling() or self._state.is_cancelled())

    @property
    def is_paused(self) -> bool:
        """Whether the run shall not go on now."""
        return self._state is not None and self._state.is_paused()

    @property
    def shall_leave(self) -> bool:
        """Whether its process shall end with the pause: with `Suspended`, the UI's button, a worker starts another."""
        return self.is_paused and self._state is not None and bool(self._state.state_details.pause_reschedule)

    @property
    def is_resumed(self) -> bool:
        """Whether the run is about to be started once more."""
        return self._state is not None and (self._state.is_scheduled() or self._state.is_pending())

    @property
    def is_over(self) -> bool:
        """Whether a pause has lasted as long as it was asked for."""
        timeout = self._state.state_details.pause_timeout if self._state is not None else None
        return timeout is not None and timeout.timestamp() < time.time()

    def look(self) -> None:
        """Look now. A server that is away, whatever that may raise, changes nothing."""
        with suppress(Exception), get_client(sync_client=True) as client:
            self._state = client.read_flow_run(self._run_id).state

    def set(self, state: State[Any]) -> None:
        """Tell the server, if it is there."""
        with suppress(Exception), get_client(sync_client=True) as client:
            client.set_flow_run_state(self._run_id, state, force=True)
            self._state = state

    def end(self) -> None:
        """Look no more."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(_STATE_SECONDS):
            with suppress(Exception), get_client(sync_client=True) as client:  # One for as long as all goes well.
                while not self._ended.is_set():
                    self._state = client.read_flow_run(self._run_id).state
                    self._ended.wait(_STATE_SECONDS)


_watch: ContextVar[StateWatch | None] = ContextVar("watch", default=None)


@contextmanager
def watched(run_id: str) -> Iterator[None]:
    """Have `check_stop` and `Pausing` in this block hear what somebody wants of a flow run; of none if it has no id.

    A `Pause` that ends the block, be it Prefect's own at the submission of a task, leaves a run that can be resumed at
    any time.
    """
    if not run_id:
        yield
        return
    complete_models()
    watch = StateWatch(run_id)
    token = _watch.set(watch)
    try:
        yield
    except Pause:
        watch.look()
        if watch.shall_leave:
            # Without its time limit: after it, the button to resume would fail the run.
            watch.set(Suspended())
        raise
    finally:
        _watch.reset(token)
        watch.end()


def cancelled(problem: str, remedy: str) -> Any:
    """What a flow that somebody has cancelled returns: its state for Prefect, and the error for whoever called it."""
    why = StoppedError(problem, remedy)
    return Cancelled(message=str(why), data=why)


def check_stop() -> None:
    """End here if somebody wants that.

    Raises:
        RunStopped: Somebody does.
    """
    if (stop := _stop.get()) is not None and stop.is_set():
        raise RunStopped("stopped together with what it was a part of")
    if (watch := _watch.get()) is not None and watch.is_cancelled:
        raise RunCancelled("cancelled")


class Pausing:
    """Whether a run is to pause, and the pause itself."""

    def __init__(self) -> None:
        self._watch = _watch.get()
        self._leaving = False

    @property
    def is_wanted(self) -> bool:
        """Whether nothing further shall be started."""
        return self._leaving or (self._watch is not None and self._watch.is_paused)

    @property
    def leaves(self) -> bool:
        """Whether the process ends with the pause, so that what has only just begun need not be waited for."""
        self._leaving = self._leaving or (self._watch is not None and self._watch.shall_leave)
        return self._leaving

    def begin(self) -> None:
        """Pause from now on: Prefect, which listens too, has refused to submit a task."""
        self._leaving = True

    @property
    def is_urgent(self) -> bool:
        """Whether the run was resumed before its process had ended: a worker may start the next one already."""
        return self._leaving and self._watch is not None and self._watch.is_resumed

    def rest(self, tell: Callable[[], None] = lambda: None) -> None:
        """Be paused, now that nothing is under way: for as long as the pause lasts, or end.

        Args:
            tell: Called now and then meanwhile.

        Raises:
            Pause: This process ends; the next one goes on with what is finished.
            RunStopped: Somebody cancelled the run.
        """
        watch = self._watch
        if self.leaves:
            raise Pause(state=Suspended())
        if watch is None:
            return
        while watch.is_paused:
            if watch.is_over:
                watch.set(Running())
            check_stop()
            tell()
            time.sleep(LOOK_SECONDS)


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


def first_failure(futures: Sequence[PrefectFuture[Any]]) -> tuple[int, BaseException] | None:
    """The position and the error of the first task run that failed, once all before it have ended.

    Those that wait for each other are given in order: the later ones only say that they could not start.
    """
    for position, future in enumerate(futures):
        cast(PoolFuture[Any], future).wait()
        if future.state.is_completed():
            continue
        failure = future.state.result(raise_on_failure=False)
        if not isinstance(failure, BaseException):
            failure = PoolError(f"task run {future.task_run_id} ended {future.state.name}: {future.state.message}")
        return position, failure
    return None
