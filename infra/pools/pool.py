"""What a pool is: a name, how many workers of what size, and how one of them starts.

Pure data, free of Dask and Prefect: site settings, the command line and tests build pools without paying for either.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from tasks.cores import assumed_flops, usable_cores
from tasks.errors import SettingsError

if TYPE_CHECKING:
    from distributed.security import Security

#: Variables by which numerical libraries size their thread pools.
_THREAD_VARIABLES: Final = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)

#: See `Pool.coming`.
Coming = Literal["start", "keep", "ignore"]

#: What every worker imports before it takes tasks; the first task run would otherwise pay for it.
ENGINE: Final = ("infra.pools.remote",)


class WorkerStart(Protocol):
    """How one worker of a pool starts: a process here, or a job of a batch system."""

    def spec(self, pool: Pool, index: int, security: Security | None) -> dict[str, Any]:
        """The entry `{"cls": ..., "options": ...}` of a Dask `worker_spec` for the worker `<pool>-<index>`.

        Args:
            pool: The pool.
            index: Number of the worker.
            security: Credentials of the cluster, as files where `shared_directory` names a place for them.
        """
        ...

    @property
    def interval(self) -> float:
        """Seconds between two looks at the demand for this kind of worker."""
        ...

    @property
    def scheduler_host(self) -> str:
        """Address at which these workers can reach the scheduler."""
        ...

    @property
    def shared_directory(self) -> Path | None:
        """Where workers on other machines find the credentials; `None` for workers of this one."""
        ...

    @property
    def flops(self) -> float:
        """FLOP/s that inference on one worker is assumed to sustain."""
        ...

    async def watch(self, workers: Collection[Any], urgent: bool) -> None:
        """Bring the status of these workers up to date where nothing else does, soon if it is `urgent`."""
        ...


@dataclass(frozen=True)
class LocalWorker:
    """A worker that is a process on this machine, restarted when it dies.

    Attributes:
        env: Environment of the worker process and of everything it starts, set before any numerical library loads.
        niceness: Added to the scheduling priority (0 to 19), inherited by child processes.
        memory_limit: Bytes after which Dask would interfere; 0 for never. Chunks keep their frames outside Dask.
        devices: CUDA devices, one per worker: worker `i` sees only `devices[i]`. Empty for none.
        imports: Modules imported before the worker takes tasks.
    """

    env: Mapping[str, str] = field(default_factory=dict)
    niceness: int = 0
    memory_limit: int = 0
    devices: tuple[str, ...] = ()
    imports: tuple[str, ...] = ENGINE

    @property
    def interval(self) -> float:
        """Seconds between two looks at the demand: starting a process is cheap, so look often."""
        return 0.25

    @property
    def scheduler_host(self) -> str:
        """This machine only."""
        return "127.0.0.1"

    @property
    def shared_directory(self) -> Path | None:
        """None: credentials stay in memory."""
        return None

    @property
    def flops(self) -> float:
        """Those of a GPU, or of the cores of this machine."""
        return assumed_flops(usable_cores(), on_gpu=bool(self.devices))

    async def watch(self, workers: Collection[Any], urgent: bool) -> None:
        """Nothing to do: nannies in this process know how their workers are."""

    def spec(self, pool: Pool, index: int, security: Security | None) -> dict[str, Any]:
        """The `worker_spec` entry of worker `index`: a nanny in this process, the worker in one of its own."""
        from infra.pools.worker import LocalNanny

        env = dict(self.env)
        if self.devices:
            env["CUDA_VISIBLE_DEVICES"] = self.devices[index % len(self.devices)]
        return {
            "cls": LocalNanny,
            "options": {
                "nthreads": tasks_held(pool.slots),
                "resources": {pool.name: tasks_held(pool.slots)},
                "memory_limit": self.memory_limit,
                "env": env,
                "niceness": self.niceness,
                "imports": self.imports,
                "security": security,
            },
        }


@dataclass(frozen=True)
class Pool:
    """A named kind of worker and its bounds.

    Attributes:
        name: Prefix of the worker names (`gpu-0`) and the Dask resource that tasks ask for; the tag is `pool:<name>`.
        slots: Tasks that one worker runs at a time.
        minimum: Workers that always exist while the pools are open.
        maximum: Workers there may be at most; equal to `minimum` for a pool of fixed size.
        idle_seconds: How long a worker without work stays. Longer than one chunk, or workers come and go in between.
        coming: What tasks count for whose inputs are not there yet. `start`: workers start while the inputs are made.
            `keep`: workers that exist stay for them, beyond `idle_seconds`. `ignore`: nothing.
        maximum_losses: Workers that one task run may lose before it counts as failed.
        start: How a worker starts.
    """

    name: str
    slots: int = 1
    minimum: int = 0
    maximum: int = 1
    idle_seconds: float = 120.0
    coming: Coming = "start"
    maximum_losses: int = 5
    start: WorkerStart = field(default_factory=LocalWorker)

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise SettingsError(f"pool name {self.name!r} is not a plain word", "Use letters, digits and underscores")
        bounds_fit = 0 <= self.minimum <= self.maximum and self.maximum >= 1
        if self.slots < 1 or not bounds_fit or self.idle_seconds < 0 or self.maximum_losses < 1:
            raise SettingsError(
                f"pool {self.name!r} asks for slots={self.slots}, minimum={self.minimum}, maximum={self.maximum}, "
                f"idle_seconds={self.idle_seconds}, maximum_losses={self.maximum_losses}",
                "Use slots >= 1, 0 <= minimum <= maximum, maximum >= 1, idle_seconds >= 0 and maximum_losses >= 1",
            )

    def worker_name(self, index: int) -> str:
        """Name of the worker with this index."""
        return f"{self.name}-{index}"

    def owns(self, worker_name: object) -> bool:
        """Whether a worker of this name belongs to the pool."""
        prefix, _, index = str(worker_name).rpartition("-")
        return prefix == self.name and index.isdigit()

    def workers_for(self, units: float) -> int:
        """Workers needed for this many resource units, within the bounds of the pool."""
        return max(self.minimum, min(self.maximum, math.ceil(units / self.slots)))


def tasks_held(slots: int) -> int:
    """Tasks that a worker may hold: those that run, and one that gets ready for the moment when one of them is through.

    That is what Dask is told, as threads and as resources; the dispatcher decides whether there is a further one.
    """
    return slots + 1


def local_pools(
    *,
    cpu_slots: int = 2,
    cpu_imports: tuple[str, ...] = (),
    gpu_imports: tuple[str, ...] = (),
    idle_seconds: float = 120.0,
    minimum: int = 0,
) -> tuple[Pool, Pool]:
    """The `cpu` and `gpu` pools of this machine.

    The `cpu` pool is one process whose tasks drive ffmpeg; it and its ffmpeg run at niceness 10, so that decoding ahead
    never takes cores from inference. The `gpu` pool is one process per CUDA device. Without a device it is one process
    that computes on all usable cores; its threads soon sleep, not spin, while they wait.

    Args:
        cpu_slots: Tasks the `cpu` pool runs at a time.
        cpu_imports: Modules that the `cpu` worker imports ahead of its first task.
        gpu_imports: Modules that `gpu` workers import ahead of their first task, for instance `("torch",)`.
        idle_seconds: How long a worker without work stays.
        minimum: Workers of each pool that always exist while the pools are open.
    """
    devices = cuda_devices()
    cores = usable_cores()
    cpu = Pool(
        "cpu",
        slots=cpu_slots,
        minimum=minimum,
        maximum=1,
        idle_seconds=idle_seconds,
        start=LocalWorker(env=thread_settings(1), niceness=10, imports=(*ENGINE, *cpu_imports)),
    )
    gpu = Pool(
        "gpu",
        slots=1,
        minimum=minimum,
        maximum=max(1, len(devices)),
        idle_seconds=idle_seconds,
        start=LocalWorker(
            # Beside a GPU the cores feed the device: an equal share for each worker.
            env=inference_settings(max(1, cores // max(1, len(devices)))),
            devices=devices,
            imports=(*ENGINE, *gpu_imports),
        ),
    )
    return cpu, gpu


def cuda_devices() -> tuple[str, ...]:
    """The CUDA devices this process may use, found without loading a CUDA library.

    `CUDA_VISIBLE_DEVICES` decides where it is set (a batch system sets it); otherwise the devices the driver shows.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # CUDA itself ignores everything from the first invalid entry on; -1 is the usual way to say "none".
        devices = []
        for entry in (entry.strip() for entry in visible.split(",")):
            if not entry or entry.startswith("-"):
                break
            devices.append(entry)
        return tuple(devices)
    try:
        return tuple(str(index) for index, _ in enumerate(os.scandir("/proc/driver/nvidia/gpus")))
    except OSError:
        return ()


def thread_settings(count: int) -> dict[str, str]:
    """Environment in which numerical libraries use `count` threads."""
    # OMP_WAIT_POLICY: GNU OpenMP otherwise spins between parallel regions and takes the cores that ffmpeg could use.
    return {**dict.fromkeys(_THREAD_VARIABLES, str(count)), "OMP_WAIT_POLICY": "passive"}


def inference_settings(threads: int) -> dict[str, str]:
    """Environment in which torch computes with this many threads."""
    # One malloc arena: in others glibc cannot keep large freed blocks, and inference pays page faults. A little
    # spinning, tens of microseconds, bridges the pauses between layers; falling asleep in each costs a twentieth of the
    # speed, and spinning for as long as GNU OpenMP likes takes as much from the encoders.
    return {**thread_settings(threads), "MALLOC_ARENA_MAX": "1", "GOMP_SPINCOUNT": "20000"}


def common_host(pools: Iterable[Pool]) -> str:
    """Address at which the workers of all pools can reach this machine."""
    hosts = {pool.start.scheduler_host for pool in pools}
    return next(iter(sorted(hosts - {"127.0.0.1"})), "127.0.0.1")
