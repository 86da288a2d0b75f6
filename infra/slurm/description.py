"""What a Slurm cluster is made of: partitions of equal nodes, whose jobs may give way to those of another partition.

Pure data without anything local (folders, ports, host names): the same description can be rendered for one machine and
for a cloud.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from tasks.errors import SettingsError

#: Narrower than Slurm's own rule: also a valid part of a host name, and a valid name of a queue in AWS ParallelCluster.
_NAME: Final = re.compile(r"[a-z]([a-z0-9-]{0,23}[a-z0-9])?")


class WhenPreempted(StrEnum):
    """What happens to a running job whose node a partition of a higher tier wants."""

    REQUEUE = "requeue"
    CANCEL = "cancel"


@dataclass(frozen=True)
class Node:
    """One node, as `SlurmDescription.nodes` lists them."""

    name: str
    cpus: int
    memory_mb: int
    gpus: int


@dataclass(frozen=True)
class Partition:
    """A partition (queue): nodes of its own, all alike, or the nodes of another partition on other terms.

    Attributes:
        name: Lower-case letters, digits and hyphens. Its nodes are called `<name>-1`, `<name>-2` and so on.
        nodes: How many nodes it has; 0 only with `shares_nodes_of`. So are the next three.
        cpus: CPUs of each node.
        memory_mb: Memory of each node that jobs may ask for. A job that does not say gets its share by CPUs.
        gpus: GPUs of each node (`--gres=gpu:<n>`).
        maximum_minutes: Time limit of jobs, or `None` for none.
        priority_tier: Where partitions share nodes, jobs of the higher tier start first, and preempt.
        when_preempted: What happens to jobs of this partition when a higher tier wants their node; `None`: nothing,
            the higher tier waits.
        shares_nodes_of: Name of the partition whose nodes this one uses, instead of nodes of its own.
    """

    name: str
    nodes: int = 0
    cpus: int = 0
    memory_mb: int = 0
    gpus: int = 0
    maximum_minutes: int | None = None
    priority_tier: int = 1
    when_preempted: WhenPreempted | None = None
    shares_nodes_of: str | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name == "default":
            raise SettingsError(
                f"{self.name!r} cannot be the name of a partition",
                "Use up to 25 lower-case letters, digits and hyphens, first a letter, and not the word 'default'",
            )
        if self.maximum_minutes is not None and self.maximum_minutes < 1:
            raise SettingsError(
                f"partition {self.name!r} has a time limit of {self.maximum_minutes} minutes",
                "Use a whole number from 1 on, or None for no limit",
            )
        if not 1 <= self.priority_tier <= 65533:
            raise SettingsError(
                f"partition {self.name!r} has the priority tier {self.priority_tier}", "Use a number from 1 to 65533"
            )
        sizes = (self.nodes, self.cpus, self.memory_mb, self.gpus)
        if self.shares_nodes_of is not None:
            if any(sizes):
                raise SettingsError(
                    f"partition {self.name!r} has sizes of its own and also shares the nodes of "
                    f"{self.shares_nodes_of!r}",
                    "Leave nodes, cpus, memory_mb and gpus out, or leave shares_nodes_of out",
                )
        elif min(self.nodes, self.cpus, self.memory_mb) < 1 or self.gpus < 0:
            raise SettingsError(
                f"partition {self.name!r} asks for nodes={self.nodes}, cpus={self.cpus}, "
                f"memory_mb={self.memory_mb}, gpus={self.gpus}",
                "Use nodes, cpus and memory_mb from 1 on and gpus from 0 on",
            )

    @property
    def node_names(self) -> tuple[str, ...]:
        """Names of its own nodes."""
        return tuple(f"{self.name}-{index}" for index in range(1, self.nodes + 1))


@dataclass(frozen=True)
class SlurmDescription:
    """A whole cluster.

    Attributes:
        partitions: Its partitions; jobs that name none go to the first.
        name: Its name.
    """

    partitions: tuple[Partition, ...]
    name: str = "superres"

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise SettingsError(
                f"{self.name!r} cannot be the name of a cluster",
                "Use up to 25 lower-case letters, digits and hyphens, first a letter",
            )
        if not self.partitions:
            raise SettingsError(f"cluster {self.name!r} has no partition", "Describe at least one")
        names = [partition.name for partition in self.partitions]
        nodes = [node.name for node in self.nodes()]
        for kind, all_names in (("partition", names), ("node", nodes)):
            if twice := sorted({name for name in all_names if all_names.count(name) > 1}):
                raise SettingsError(f"cluster {self.name!r} has two {kind}s named {twice[0]!r}", "Rename a partition")
        for partition in self.partitions:
            if partition.shares_nodes_of is not None:
                self.owner(partition)

    def partition(self, name: str) -> Partition:
        """The partition of this name.

        Raises:
            SettingsError: There is none.
        """
        for partition in self.partitions:
            if partition.name == name:
                return partition
        known = ", ".join(partition.name for partition in self.partitions)
        raise SettingsError(f"cluster {self.name!r} has no partition {name!r}", f"It has: {known}")

    def owner(self, partition: Partition) -> Partition:
        """The partition whose nodes a partition uses: itself, or the one that it shares with.

        Raises:
            SettingsError: It shares with a partition that is not there or has no nodes of its own.
        """
        if partition.shares_nodes_of is None:
            return partition
        owner = self.partition(partition.shares_nodes_of)
        if owner.shares_nodes_of is not None:
            raise SettingsError(
                f"partition {partition.name!r} shares the nodes of {owner.name!r}, which has none of its own",
                f"Let it share those of {owner.shares_nodes_of!r}",
            )
        return owner

    def nodes(self) -> Iterator[Node]:
        """All nodes, in the order of the partitions."""
        for partition in self.partitions:
            for name in partition.node_names:
                yield Node(name, partition.cpus, partition.memory_mb, partition.gpus)


#: Small and complete: room for decoding and encoding beside nodes with GPUs.
DEVELOPMENT: Final = SlurmDescription(
    (
        Partition("cpu", nodes=2, cpus=4, memory_mb=8000),
        Partition("gpu", nodes=2, cpus=4, memory_mb=8000, gpus=2),
    )
)
