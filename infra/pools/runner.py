"""The Prefect task runner of the pools: tags become resources, futures settle, lost workers become states that end.

What it changes of `prefect_dask.DaskTaskRunner`, and why:

* A task goes to Dask only when its inputs are there, with their values, and a slot of its pool is free (see
  `dispatch`). Dask keeps no results between tasks, so a lost worker never makes a finished task run again, and a pool
  without work can go to zero while the flow is still going.
* A task run whose worker was lost waits for the next free slot, ahead of everything submitted after it. How often is
  counted here, per task run (`Pool.maximum_losses`); Dask would count every task that was ever queued on that worker.
* A future keeps the final state and releases the Dask key at once.
* What the scheduler reports instead of a state (a task that kills its workers, a pool that cannot start, a cancelled
  key) becomes a `Crashed` state of the task run. Stock, such a task run stays `Running` for ever.
"""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING, Any, Final, TypeVar
from uuid import UUID, uuid4

import distributed
from distributed.scheduler import KilledWorker
from prefect import Task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterId
from prefect.client.schemas.objects import State
from prefect.context import AssetContext, FlowRunContext, TagsContext, serialize_context
from prefect.exceptions import MissingContextError, UpstreamTaskError
from prefect.futures import PrefectFuture, PrefectTaskRunFuture
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed, Pending
from prefect.task_engine import _create_task_run_locally
from prefect.utilities.collections import visit_collection
from prefect.utilities.engine import (
    collect_task_run_inputs_sync,
    emit_task_run_state_change_event,
    resolve_to_final_result,
)
from prefect_dask import DaskTaskRunner
from prefect_dask.client import PrefectDaskClient

from infra.pools.opening import current_cluster
from infra.pools.pool import Pool, local_pools
from infra.pools.remote import PackedContext, pack, run_packed
from tasks.errors import PoolError

if TYPE_CHECKING:
    from infra.pools.cluster import PooledCluster

R = TypeVar("R")

logger = logging.getLogger(__name__)

#: A task names its pool by a tag that starts with this.
POOL_TAG: Final = "pool:"


class PoolFuture(PrefectTaskRunFuture[R]):
    """The future of a task run on a pool. Holds its final state once settled, and nothing of Dask's."""

    def __init__(self, task_run_id: UUID) -> None:
        super().__init__(task_run_id)
        self._settled = threading.Event()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[PrefectFuture[R]], None]] = []
        self._failed_input: PrefectFuture[Any] | None = None

    def settle(self, state: State[R], failed_input: PrefectFuture[Any] | None = None) -> None:
        """Take the last state and wake everybody who waits. Only the first call counts.

        Args:
            state: The final state, or `NotReady` for a task run that never began.
            failed_input: Why it never began.
        """
        with self._lock:
            if self._settled.is_set():
                return
            self._final_state = state
            self._failed_input = failed_input
            self._settled.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)

    @property
    def is_settled(self) -> bool:
        """Whether the final state is known."""
        return self._settled.is_set()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the task run has ended, or for `timeout` seconds."""
        self._settled.wait(timeout)

    def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> R:
        """The task's return value.

        Args:
            timeout: Seconds to wait; `None` for as long as it takes.
            raise_on_failure: Raise what the task raised; otherwise return it.

        Raises:
            TimeoutError: The task run did not end in time.
            PoolError: It was lost more often than allowed, or its pool cannot start workers.

        What failed before this task run could begin is raised here too: stock, it would be that "its result is not
        available".
        """
        if not self._settled.wait(timeout):
            raise TimeoutError(f"Task run {self.task_run_id} did not complete within {timeout} seconds")
        if self._failed_input is not None:
            return self._failed_input.result(raise_on_failure=raise_on_failure)
        assert self._final_state is not None
        return self._final_state.result(raise_on_failure=raise_on_failure, _sync=True)  # type: ignore[call-overload]

    def add_done_callback(self, fn: Callable[[PrefectFuture[R]], None]) -> None:
        """Call `fn(self)` when the task run has ended, at once if it has."""
        with self._lock:
            if not self._settled.is_set():
                self._callbacks.append(fn)
                return
        fn(self)

    def __reduce__(self) -> Any:
        raise PoolError(
            "a future of a task run cannot travel to a worker inside another object",
            "Pass the future itself as an argument, or its result()",
        )


class _Submission:
    """One submitted task run: from its inputs to its final state."""

    def __init__(
        self,
        runner: PoolTaskRunner,
        task: Task[Any, Any],
        pool: str,
        parameters: dict[str, Any],
        wait_for: Any,
        dependencies: dict[str, set[Any]] | None,
        order: int,
    ) -> None:
        self.runner = runner
        self.task = task
        self.pool = pool
        self.parameters = parameters
        self.wait_for = wait_for
        self.order = order
        self.future: PoolFuture[Any] = PoolFuture(uuid4())
        self.label = task.name
        self.inputs = {
            name: collect_task_run_inputs_sync(value) | (dependencies or {}).get(name, set())
            for name, value in parameters.items()
        }
        self.shared_context = runner._shared_context()
        asset_context = AssetContext.from_task_and_inputs(
            task=task, task_run_id=self.future.task_run_id, task_inputs=self.inputs, copy_to_child_ctx=True
        )
        self.own_context = {"asset_context": asset_context.serialize()}
        # What happens later happens in other threads, which do not know the flow run.
        self.flow_context = contextvars.copy_context()
        self.dask_future: distributed.Future | None = None
        self._upstream: list[PrefectFuture[Any]] = []
        self._task_run = b""
        self._attempts = 0
        self._losses = 0
        self._lock = threading.Lock()
        self._missing = 1

    def begin(self) -> None:
        """Ask for a slot now, or as soon as the last input is there."""
        self._upstream = _futures_in((self.parameters, self.wait_for))
        with self._lock:
            self._missing += len(self._upstream)
        self.runner.cluster.dispatcher.expect(self.pool, 1)
        for future in self._upstream:
            future.add_done_callback(self._input_ended)
        self._input_ended(None)

    def _input_ended(self, _: object) -> None:
        with self._lock:
            self._missing -= 1
            if self._missing:
                return
        self.runner.cluster.dispatcher.expect(self.pool, -1)
        if self.runner._closing:
            return  # The inputs ended because the flow did; `_end_abandoned` ends this one.
        try:
            self._pack()
        except UpstreamTaskError as error:
            # Prefect's rule for a task whose input failed; found here, it does not cost a worker.
            failed = next((future for future in self._upstream if not future.state.is_completed()), None)
            self.end_here(Pending(name="NotReady", message=str(error)), failed)
        except Exception as error:
            self.crash(error)
        else:
            self.runner.cluster.dispatcher.put(self.pool, self.order, self)

    def _pack(self) -> None:
        parameters = _states_for_futures(self.parameters)
        wait_for = _states_for_futures(self.wait_for) if self.wait_for else None
        values, _ = _values_of((parameters, wait_for))
        self.label = _label(self.task, values)
        self._task_run = pack(
            {
                "task": self.task,
                "task_run_id": self.future.task_run_id,
                "parameters": parameters,
                "wait_for": wait_for,
                "dependencies": self.inputs,
                "context": self.own_context,
            }
        )

    def start(self) -> None:
        """Go to Dask: a slot is free."""
        try:
            if self.runner._closing:
                raise PoolError("the flow ended before this task run")
            self.dask_future = self.runner.client.submit(
                run_packed,
                self._task_run,
                self.shared_context,
                self.label,
                # Dask may not have forgotten the key of an attempt that was just lost.
                key=f"{self.task.name}-{uuid4() if self._attempts else self.future.task_run_id}",
                resources={self.pool: 1},
                priority=-self.order,
                pure=False,
            )
        except Exception as error:
            self.runner.cluster.dispatcher.ended(self.pool)
            self.fail(PoolError(f"{self.label} could not be started: {error}"))
            return
        self._attempts += 1
        self.dask_future.add_done_callback(self._dask_ended)

    def fail(self, error: PoolError) -> None:
        """End as crashed, unless the whole flow ends, which has words of its own."""
        if not self.runner._closing:
            self.crash(error)

    def _dask_ended(self, dask_future: distributed.Future) -> None:
        self.runner.cluster.dispatcher.ended(self.pool, dask_future.key)
        try:
            state = dask_future.result()
        except KilledWorker as loss:
            if not self.runner._closing:
                self._lost(str(loss.last_worker.name), self.runner.cluster.was_bystander(dask_future.key))
        except BaseException as error:  # Dask's cancellation is not an `Exception`.
            if not self.runner._closing:
                self.crash(error)
        else:
            if state.is_final():
                self.future.settle(state)
            else:
                self.crash(PoolError(f"{self.label} ended as {state.name!r} on its worker: {state.message}"))
        finally:
            dask_future.release()

    def _lost(self, worker: str, as_bystander: bool) -> None:
        cluster = self.runner.cluster
        self._losses += not as_bystander
        where = cluster.place_of(worker)
        if self._losses < cluster.pools[self.pool].maximum_losses:
            # Into the log of the flow run too: whoever watches it wonders why this one takes longer.
            self.flow_context.copy().run(self._warn, f"{self.label} lost its worker, {where}")
            logger.debug("%s starts again", self.label)
            cluster.dispatcher.put(self.pool, self.order, self)
            return
        times = "once" if self._losses == 1 else f"{self._losses} times"
        remedy = "Look for memory limits, a faulty device or a crash in the logs of the worker, then run the job again"
        self.crash(PoolError(f"{self.label} lost its worker {times}, the last one {where}", remedy))

    def _warn(self, text: str) -> None:
        with suppress(MissingContextError):
            get_run_logger().warning("%s", text)

    def crash(self, error: BaseException) -> None:
        """End the task run as `Crashed`, here and in Prefect."""
        if self.future.is_settled:
            return
        if not isinstance(error, PoolError):
            error = PoolError(f"{self.label} was lost: {error}", "Run the job again; finished chunks are kept")
        logger.error("%s", error)
        self.end_here(Crashed(message=str(error), data=error))

    def end_here(self, state: State[Any], failed_input: PrefectFuture[Any] | None = None) -> None:
        """End the task run from this process, in Prefect too."""
        state.state_details.task_run_id = self.future.task_run_id
        try:
            self.flow_context.copy().run(self._record, state)
        except Exception as failure:  # The state still ends the future; only what Prefect shows is behind.
            logger.warning("the end of %s could not be recorded: %s", self.label, failure)
        self.future.settle(state, failed_input)

    def _record(self, state: State[Any]) -> None:
        named = isinstance(self.task.task_run_name, str)
        with get_client(sync_client=True) as client:
            known = client.read_task_runs(
                task_run_filter=TaskRunFilter(id=TaskRunFilterId(any_=[self.future.task_run_id])), limit=1
            )
            if known:
                if known[0].state is None or not known[0].state.is_final():
                    client.set_task_run_state(self.future.task_run_id, state, force=True)
                # Its worker may have died before it had told Prefect the name. Looked at only now: what else workers
                # have said is older than the state above, and changes nothing any more.
                if named and not client.read_task_run(self.future.task_run_id).name.startswith(self.label):
                    client.set_task_run_name(self.future.task_run_id, self.label)
                return
        # Prefect has not heard of it: no worker began it, or what the worker said is still on its way.
        task_run = _create_task_run_locally(
            task=self.task,
            id=self.future.task_run_id,
            parameters={},
            extra_task_inputs=None,
        )
        initial = task_run.state
        if named:
            task_run.name = self.label
        task_run.state = state
        state.state_details.flow_run_id = task_run.flow_run_id
        emit_task_run_state_change_event(task_run=task_run, initial_state=initial, validated_state=state)


class PoolTaskRunner(DaskTaskRunner):
    """Runs the tasks of a flow on named pools.

    Every task names its pool by a tag, `pool:cpu` or `pool:gpu`. The runner uses the pools that are open around the
    flow (`open_pools`); without any it opens its own at the first task and closes them with the flow. Tasks submitted
    first run first.

    Example:
        ```python
        @task(tags={"pool:gpu"})
        def upscale(chunk): ...

        @flow(task_runner=PoolTaskRunner())
        def upscale_video(source):
            futures = [upscale.submit(chunk) for chunk in chunks]
        ```

    Args:
        pools: A function that makes the pools, importable, called in the context of the flow run; used when no pools
            are open.
    """

    def __init__(self, pools: Callable[[], Iterable[Pool]] = local_pools) -> None:
        super().__init__()
        self.pools = pools
        self._order = count()
        self._contexts: dict[frozenset[str], PackedContext] = {}
        self._unsettled: set[_Submission] = set()
        self._unsettled_lock = threading.Lock()
        self._client_lock = threading.RLock()
        self._closing = False

    @property
    def name(self) -> str:
        """The name in log lines."""
        return "pools"

    def duplicate(self) -> PoolTaskRunner:
        """A new runner with the same settings."""
        return type(self)(self.pools)

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and isinstance(other, PoolTaskRunner) and self.pools == other.pools

    __hash__ = None  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        return {"pools": self.pools}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def client(self) -> PrefectDaskClient:
        """The client of the scheduler; opens pools at first use when none are open."""
        with self._client_lock:
            if self._client is None:
                self._client = self._exit_stack.enter_context(PrefectDaskClient(self.cluster))
            return self._client

    @property
    def cluster(self) -> PooledCluster:
        """The pools in use; opened at first use when none are open."""
        with self._client_lock:
            if self._cluster is None:
                self._cluster = self._find_or_open()
            return self._cluster  # type: ignore[return-value]

    def submit(  # type: ignore[override]
        self,
        task: Task[Any, Any],
        parameters: dict[str, Any],
        wait_for: Iterable[PrefectFuture[Any]] | None = None,
        dependencies: dict[str, set[Any]] | None = None,
    ) -> PoolFuture[Any]:
        """Submit a task run to the pool that the task names.

        Raises:
            PoolError: The task names no pool, several, or one that does not exist.
        """
        if not self._started:
            raise RuntimeError("The task runner must be started before submitting work.")
        pool = pool_of(task)
        self.client  # noqa: B018 - opens the pools in this thread, where the flow run is known
        if pool not in self.cluster.pools:
            known = ", ".join(sorted(self.cluster.pools))
            raise PoolError(f"task {task.name!r} asks for pool {pool!r}, open are {known}", "Open a pool of that name")
        submission = _Submission(self, task, pool, parameters, wait_for, dependencies, order=next(self._order))
        with self._unsettled_lock:
            self._unsettled.add(submission)
        submission.future.add_done_callback(lambda _: self._forget(submission))
        submission.begin()
        return submission.future

    def __exit__(self, *args: Any) -> None:
        self._closing = True
        with self._unsettled_lock:
            abandoned = list(self._unsettled)
        if abandoned:
            self.cluster.dispatcher.withdraw(abandoned)
        if abandoned and self._client is not None:
            keys = [submission.dask_future for submission in abandoned if submission.dask_future is not None]
            with suppress(Exception):
                self._client.cancel(keys, force=True)
        # Ends the cluster too, when it is this runner's own; only then can no worker report any more.
        super().__exit__(*args)
        if abandoned:
            _end_abandoned(abandoned)

    def _find_or_open(self) -> PooledCluster:
        if distributed.worker.thread_state.__dict__.get("execution_state") is not None:
            raise PoolError("a task submitted a task", "Submit tasks from the flow, call functions from a task")
        if (opened := current_cluster()) is not None:
            return opened
        from infra.pools.cluster import PooledCluster

        return self._exit_stack.enter_context(PooledCluster(self.pools()))

    def _shared_context(self) -> PackedContext:
        # Within one flow run only the tags can differ between submissions.
        tags = frozenset(TagsContext.get().current_tags)
        if tags not in self._contexts:
            # A temporary server that Prefect started by itself is in no setting, and each worker would start another.
            api = PREFECT_API_URL.value() or str(get_client(sync_client=True).api_url)
            with temporary_settings({PREFECT_API_URL: api}):
                context = serialize_context()
            flow_run = FlowRunContext.get()
            if flow_run is not None:
                # As an object: from its serialized form Prefect would rebuild the storage block by name, and to look
                # up a name it imports every installed collection. That is a second per worker for `prefect-aws`.
                context["flow_run_context"]["result_store"] = flow_run.result_store
            self._contexts[tags] = PackedContext.of(context)
        return self._contexts[tags]

    def _forget(self, submission: _Submission) -> None:
        with self._unsettled_lock:
            self._unsettled.discard(submission)


def pool_of(task: Task[Any, Any]) -> str:
    """The pool that a task names by its tag.

    Raises:
        PoolError: It names none, or more than one.
    """
    pools = sorted(tag.removeprefix(POOL_TAG) for tag in task.tags if tag.startswith(POOL_TAG))
    if len(pools) == 1:
        return pools[0]
    problem = f"names {len(pools)} pools ({', '.join(pools)})" if pools else "names no pool"
    raise PoolError(f"task {task.name!r} {problem}", f'Give it one tag such as "{POOL_TAG}cpu" or "{POOL_TAG}gpu"')


def _end_abandoned(submissions: list[_Submission]) -> None:
    """End the task runs that a flow left behind when it ended: a future nobody will settle must not stay `Running`."""
    for submission in submissions:
        state: State[Any] = Crashed(message="the flow ended before this task run")
        if submission.dask_future is None:
            submission.future.settle(state)  # Never submitted, so unknown to Prefect.
        else:
            submission.end_here(state)


def _label(task: Task[Any, Any], parameters: dict[str, Any]) -> str:
    """The task run as a person knows it: its name template filled in, where that is possible."""
    if isinstance(task.task_run_name, str):
        with suppress(Exception):
            return task.task_run_name.format(**parameters)
    return task.name


def _futures_in(expression: Any) -> list[PrefectFuture[Any]]:
    """Each future once, in the order in which they are met."""
    futures: dict[PrefectFuture[Any], None] = {}

    def collect(value: Any) -> Any:
        if isinstance(value, PrefectFuture):
            futures[value] = None
        return value

    visit_collection(expression, visit_fn=collect, return_data=False)
    return list(futures)


def _states_for_futures(expression: Any) -> Any:
    def replace(value: Any) -> Any:
        return value.state if isinstance(value, PrefectFuture) else value

    return visit_collection(expression, visit_fn=replace, return_data=True)


def _values_of(expression: Any) -> Any:
    """Results for states; raises what Prefect's engine would raise on the worker when an input did not complete."""
    return visit_collection(
        expression, visit_fn=resolve_to_final_result, return_data=True, remove_annotations=True, context={}
    )
