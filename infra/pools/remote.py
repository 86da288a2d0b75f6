"""A Prefect task run as it travels to a worker, and what the worker does with it."""

from __future__ import annotations

import asyncio
import hashlib
import io
import pickle
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final, TypeVar

import cloudpickle  # type: ignore[import-untyped]
from distributed import get_worker
from prefect import Flow, Task
from prefect.client.schemas.objects import State
from prefect.context import SettingsContext, SyncClientContext
from prefect.events.worker import EventsWorker
from prefect.task_engine import run_task_async, run_task_sync

from infra.pools.scheduler import DEVICE_MESSAGE
from tasks.device import Word, listening
from tasks.errors import PoolError
from tasks.place import this_place

#: Where this project's packages lie, here as on the nodes.
_CHECKOUT: Final = Path(__file__).resolve().parents[2]

#: Seconds a finished task run waits at most for its last events to leave, so that what Prefect shows is not behind
#: what the flow knows.
_EVENTS_WAIT: Final = 0.25

K = TypeVar("K")
V = TypeVar("V")

#: Flow runs whose shared context a worker remembers.
_KEPT_CONTEXTS: Final = 4


class _ByNamePickler(cloudpickle.Pickler):
    """Pickles tasks and flows of importable modules by name.

    `cloudpickle` alone would copy a task's function by value, because the module's attribute is the task and not the
    function: on the worker it would then see copies of its module's globals, a fresh cache for every task run.
    """

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Task | Flow):
            module, name = _importable_name(obj)
            if name:
                return _named, (module, name)
        return super().reducer_override(obj)


def _importable_name(obj: Task[Any, Any] | Flow[Any, Any]) -> tuple[str, str]:
    module = getattr(obj.fn, "__module__", None) or ""
    name = getattr(obj.fn, "__name__", "")
    loaded = sys.modules.get(module)
    if module != "__main__" and loaded is not None and getattr(loaded, name, None) is obj:
        return _dotted_name(loaded), name
    return module, ""


def _dotted_name(module: ModuleType) -> str:
    """The name under which a worker can import a module.

    A deployment names its flow by a path (`flows/upscale_video.py:upscale_video`); loaded from that, the module bears
    the name of its file only.
    """
    try:
        parts = Path(module.__file__ or "").resolve().relative_to(_CHECKOUT).with_suffix("").parts
    except ValueError:
        return module.__name__
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _named(module: str, name: str) -> Any:
    __import__(module)
    return getattr(sys.modules[module], name)


def pack(thing: Any) -> bytes:
    """Serialize something for a worker."""
    buffer = io.BytesIO()
    _ByNamePickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(thing)
    return buffer.getvalue()


@dataclass(frozen=True)
class PackedContext:
    """What all task runs of a flow run share: flow, flow run, tags and settings, packed once.

    Attributes:
        digest: Names the content; a worker unpacks each digest once.
        content: The packed result of `prefect.context.serialize_context()`, without the settings.
        settings: Those; equal for many flow runs.
    """

    digest: str
    content: bytes
    settings: bytes

    @classmethod
    def of(cls, context: dict[str, Any]) -> PackedContext:
        """Pack a serialized context."""
        rest = {name: value for name, value in context.items() if name != "settings_context"}
        content, settings = pack(rest), pack(context["settings_context"])
        return cls(hashlib.sha256(content + settings).hexdigest(), content, settings)


class _Site:
    """Prefect's settings and its API client on a worker, made once for all flow runs that have these settings.

    Prefect would rebuild its settings (50 models) and two HTTP clients (each reading all certificate authorities) for
    every task run: 150 ms of computing, three quarters of all that a task run costs.
    """

    def __init__(self, settings: bytes) -> None:
        made = SettingsContext(**pickle.loads(settings))
        self._profile, self._settings = made.profile, made.settings
        # Threads share no client: a context of Prefect's can be entered only once at a time.
        self._clients = threading.local()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Settings and API client, for the current thread."""
        with SettingsContext(profile=self._profile, settings=self._settings):
            client = getattr(self._clients, "context", None)
            if client is None:
                client = self._clients.context = SyncClientContext()
                client.client.__enter__()  # Keeps its connections open between task runs.
            with client:
                yield


@dataclass(frozen=True)
class _Hydrated:
    """A shared context on a worker, made once."""

    context: dict[str, Any]
    site: _Site


_hydrated: OrderedDict[str, _Hydrated] = OrderedDict()
_sites: OrderedDict[bytes, _Site] = OrderedDict()
_hydrating = threading.Lock()


def _kept(kept: OrderedDict[K, V], key: K, make: Callable[[], V]) -> V:
    """The value of a key, made if it is not there; values that were used longest ago give way."""
    if key not in kept:
        kept[key] = make()
    kept.move_to_end(key)
    if len(kept) > _KEPT_CONTEXTS:
        kept.popitem(last=False)
    return kept[key]


def _hydrate(packed: PackedContext) -> _Hydrated:
    with _hydrating:
        site = _kept(_sites, packed.settings, lambda: _Site(packed.settings))
        return _kept(_hydrated, packed.digest, lambda: _Hydrated(pickle.loads(packed.content), site))


def run_packed(task_run: bytes, packed: PackedContext, label: str) -> State[Any]:
    """Run one Prefect task run on a worker.

    Args:
        task_run: The packed keywords of `prefect.task_engine.run_task_sync`; of its context only what is this task
            run's own.
        packed: The rest of the context.
        label: The task run as a person knows it, for messages.

    Returns:
        The final state, its result included.
    """
    shared = _hydrate(packed)
    with shared.site.active(), listening(_speaker()):
        arguments: dict[str, Any] = pickle.loads(task_run)
        arguments["context"] = {**shared.context, **arguments["context"]}
        task: Task[Any, Any] = arguments["task"]
        if (place := this_place()).job:
            # So that who sees the task run finds the node and the log, also when this worker does not live to tell.
            task = arguments["task"] = task.with_options(task_run_name=_literal(f"{label} on {place}"))
        try:
            if task.isasync:
                return asyncio.run(run_task_async(**arguments, return_type="state"))  # type: ignore[arg-type]
            return run_task_sync(**arguments, return_type="state")  # type: ignore[return-value]
        finally:
            _send_events()


def _speaker() -> Callable[[Word], None]:
    """Passes on to the scheduler what the task of the current thread says about the device.

    A task that has waited for it in vain, because its flow ended meanwhile, ends here: its thread cannot be stopped.
    """
    worker = get_worker()
    key = worker.get_current_task()

    def pass_on(word: Word) -> None:
        known = worker.state.tasks.get(key)
        if word == "taken" and (known is None or known.state == "cancelled"):
            raise PoolError("the flow ended before this task run had the device")
        worker.loop.add_callback(worker.batched_send, {"op": DEVICE_MESSAGE, "key": key, "word": word})

    return pass_on


def _literal(name: str) -> str:
    """A name as a template that gives just this name."""
    return name.replace("{", "{{").replace("}", "}}")


def _send_events() -> None:
    deadline = time.monotonic() + _EVENTS_WAIT
    for worker in list(EventsWorker._instances.values()):  # type: ignore[misc]
        while isinstance(worker, EventsWorker) and worker._queue.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.005)
