"""The queues of a cluster, and which of them each pool of workers uses: the one description of both.

Adds to the partitions of `infra.slurm.description` what a cloud needs: instance types, how they are bought, prices.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from infra.aws.cluster.instances import InstanceType, instance_type
from infra.slurm.description import Partition, SlurmDescription
from tasks.errors import SettingsError


class Capacity(StrEnum):
    """How instances are bought, in ParallelCluster's words."""

    SPOT = "SPOT"
    ON_DEMAND = "ONDEMAND"


@dataclass(frozen=True)
class Queue:
    """A queue: instances that start when jobs wait for them and end when none does.

    Attributes:
        name: Its name, and that of its partition in Slurm.
        instances: Names of the instance types it may start. All have as many CPUs and GPUs: a node is as large as the
            smallest of them.
        maximum: Instances at a time.
        capacity: How they are bought.
        priority_tier: Jobs that may go to several queues go to the one of the highest tier that has room.
        maximum_minutes: Time limit of jobs, or `None` for none.
        zones: In how many of the site's zones, from the first on; `None` for all. Scarce types are in few.
    """

    name: str
    instances: tuple[str, ...]
    maximum: int
    capacity: Capacity = Capacity.ON_DEMAND
    priority_tier: int = 1
    maximum_minutes: int | None = None
    zones: int | None = None

    def __post_init__(self) -> None:
        if not self.instances:
            raise SettingsError(f"queue {self.name!r} has no instance type", "Name at least one")
        types = self.types
        for kind in ("vcpus", "gpus"):
            if len(found := {getattr(each, kind) for each in types}) > 1:
                raise SettingsError(
                    f"queue {self.name!r} mixes instance types with {' and '.join(map(str, sorted(found)))} {kind}",
                    "Choose types with as many, or make a queue of each",
                )
        if self.zones is not None and self.zones < 1:
            raise SettingsError(f"queue {self.name!r} is in {self.zones} zones", "Use 1 or more, or None for all")
        self.partition()  # Refuses names and sizes that Slurm would refuse.

    @property
    def types(self) -> tuple[InstanceType, ...]:
        """Its instance types."""
        return tuple(instance_type(name) for name in self.instances)

    @property
    def cpus(self) -> int:
        """CPUs of a node."""
        return self.types[0].vcpus

    @property
    def gpus(self) -> int:
        """GPUs of a node."""
        return self.types[0].gpus

    @property
    def memory_mb(self) -> int:
        """Memory of a node that jobs may ask for."""
        return min(each.memory_mb for each in self.types)

    @property
    def hourly_price(self) -> float:
        """The most that a node costs in an hour, in US dollars: the dearest type, on demand. Spot prices change."""
        return max(each.hourly_price for each in self.types)

    def partition(self, nodes: int | None = None) -> Partition:
        """The partition of this queue, with all its nodes or at most so many."""
        return Partition(
            self.name,
            nodes=self.maximum if nodes is None else min(nodes, self.maximum),
            cpus=self.cpus,
            memory_mb=self.memory_mb,
            gpus=self.gpus,
            maximum_minutes=self.maximum_minutes,
            priority_tier=self.priority_tier,
        )


@dataclass(frozen=True)
class Jobs:
    """The jobs of one pool of workers.

    Attributes:
        queues: Names of the queues they may go to.
        maximum: Jobs at a time.
        per_node: Jobs that share a node, each with its share of CPUs, memory and GPUs.
        slots: Chunks that one job works on at a time.
        idle_minutes: How long a job without work stays.
        walltime: Longest time of a job, `HH:MM:SS` or `D-HH:MM:SS`.
    """

    queues: tuple[str, ...]
    maximum: int
    per_node: int = 1
    slots: int = 1
    idle_minutes: float = 5.0
    walltime: str = "08:00:00"

    def __post_init__(self) -> None:
        if not self.queues:
            raise SettingsError("a pool has no queue", "Name at least one")
        if min(self.maximum, self.per_node, self.slots) < 1:
            raise SettingsError(
                f"the pool on {','.join(self.queues)} has maximum={self.maximum}, per_node={self.per_node}, "
                f"slots={self.slots}",
                "Use 1 or more of each",
            )


@dataclass(frozen=True)
class PoolsBlock:
    """A block of pools, as flows name it: `superres upscale --pools NAME`."""

    name: str
    cpu: Jobs
    gpu: Jobs


@dataclass(frozen=True)
class Queues:
    """All queues of a cluster, and the blocks of pools that use them.

    Attributes:
        queues: The queues; jobs that name none go to the first.
        blocks: The blocks.
    """

    queues: tuple[Queue, ...]
    blocks: tuple[PoolsBlock, ...]

    def __post_init__(self) -> None:
        self.slurm_description()  # Refuses what Slurm would refuse: none, or two of one name.
        used: set[str] = set()
        for block in self.blocks:
            for pool, jobs in (("cpu", block.cpu), ("gpu", block.gpu)):
                for name in jobs.queues:
                    self._check_fit(f"pool {pool} of block {block.name!r}", jobs, self.queue(name), pool == "gpu")
                used.update(jobs.queues)
        for queue in self.queues:
            if queue.name not in used:
                raise SettingsError(f"no pool uses the queue {queue.name!r}", "Name it in a block, or remove it")

    def _check_fit(self, where: str, jobs: Jobs, queue: Queue, needs_gpu: bool) -> None:
        if bool(queue.gpus) != needs_gpu:
            has = "has GPUs" if queue.gpus else "has no GPU"
            raise SettingsError(f"{where} cannot use queue {queue.name!r}, which {has}", "Name another queue")
        if jobs.per_node > queue.cpus or (needs_gpu and queue.gpus % jobs.per_node):
            raise SettingsError(
                f"{where} puts {jobs.per_node} jobs on a node of queue {queue.name!r} with {queue.cpus} CPUs and "
                f"{queue.gpus} GPUs",
                "Choose a number that divides its GPUs, or is not above its CPUs",
            )

    def queue(self, name: str) -> Queue:
        """The queue of this name.

        Raises:
            SettingsError: There is none.
        """
        for queue in self.queues:
            if queue.name == name:
                return queue
        raise SettingsError(f"there is no queue {name!r}", f"There are: {', '.join(each.name for each in self.queues)}")

    def slurm_description(self, nodes: int | None = None) -> SlurmDescription:
        """The same cluster for `infra.slurm`, with at most so many nodes of each queue."""
        return SlurmDescription(tuple(queue.partition(nodes) for queue in self.queues))


_SPOT_TYPES: Final = ("c7i.8xlarge", "c7a.8xlarge", "c6i.8xlarge")

#: CPU jobs go to spot instances while there are any: a job that is taken away costs one chunk. GPUs are bought on
#: demand: a chunk is minutes of a dear device, and capacity is scarce as it is.
PRODUCTION: Final = Queues(
    (
        Queue("cpu-spot", _SPOT_TYPES, maximum=40, capacity=Capacity.SPOT, priority_tier=2),
        Queue("cpu", ("c7i.8xlarge", "c7a.8xlarge"), maximum=20),
        Queue("gpu", ("g6e.2xlarge", "g6.2xlarge"), maximum=16),
        Queue("gpu-large", ("p5.4xlarge",), maximum=2, zones=1),
    ),
    (
        PoolsBlock(
            "slurm",
            cpu=Jobs(("cpu-spot", "cpu"), maximum=20, per_node=2, slots=4),
            gpu=Jobs(("gpu",), maximum=16),
        ),
        PoolsBlock(
            "slurm-large",
            cpu=Jobs(("cpu-spot", "cpu"), maximum=20, per_node=2, slots=4),
            gpu=Jobs(("gpu-large",), maximum=2),
        ),
    ),
)

#: The smallest that shows everything.
DEVELOPMENT: Final = Queues(
    (
        Queue("cpu-spot", ("c7i.2xlarge", "c7a.2xlarge"), maximum=4, capacity=Capacity.SPOT, priority_tier=2),
        Queue("cpu", ("c7i.2xlarge", "c7a.2xlarge"), maximum=2),
        Queue("gpu", ("g4dn.xlarge",), maximum=2),
    ),
    (PoolsBlock("slurm", cpu=Jobs(("cpu-spot", "cpu"), maximum=4, slots=2), gpu=Jobs(("gpu",), maximum=2)),),
)
