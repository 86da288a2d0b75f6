"""Instance types of the queues, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tasks.errors import SettingsError

#: Share of an instance's memory that jobs may ask for; ParallelCluster keeps the rest for the system.
_SCHEDULABLE: Final = 0.95


@dataclass(frozen=True)
class InstanceType:
    """A type of instance.

    Attributes:
        name: Its name.
        vcpus: Its virtual CPUs, which Slurm counts as CPUs.
        memory_gib: Its memory.
        gpus: How many GPUs it has.
        hourly_price: On demand, Linux, in us-east-1, in US dollars.
        gpu: Which, by their name in `infra.aws.gpus`; empty for none.
    """

    name: str
    vcpus: int
    memory_gib: int
    gpus: int
    hourly_price: float
    gpu: str = ""

    @property
    def memory_mb(self) -> int:
        """MiB that jobs on one of them may ask for."""
        return int(1024 * self.memory_gib * _SCHEDULABLE)


#: When the prices below were taken from the public price list.
PRICES_OF: Final = "2026-07-20"

INSTANCE_TYPES: Final = {
    each.name: each
    for each in (
        InstanceType("t3.medium", 2, 4, 0, 0.042),
        InstanceType("m7i.large", 2, 8, 0, 0.101),
        InstanceType("c7i.2xlarge", 8, 16, 0, 0.357),
        InstanceType("c7a.2xlarge", 8, 16, 0, 0.411),
        InstanceType("c6i.8xlarge", 32, 64, 0, 1.360),
        InstanceType("c7i.8xlarge", 32, 64, 0, 1.428),
        InstanceType("c7a.8xlarge", 32, 64, 0, 1.642),
        InstanceType("g4dn.xlarge", 4, 16, 1, 0.526, "T4"),
        InstanceType("g6.2xlarge", 8, 32, 1, 0.978, "L4"),
        InstanceType("g5.2xlarge", 8, 32, 1, 1.212, "A10G"),
        InstanceType("g6e.2xlarge", 8, 64, 1, 2.242, "L40S"),
        InstanceType("p5.4xlarge", 16, 256, 1, 6.880, "H100"),
        InstanceType("p5en.48xlarge", 192, 2048, 8, 63.30, "H200"),
    )
}


def instance_type(name: str) -> InstanceType:
    """The type of this name.

    Raises:
        SettingsError: It is not in the table.
    """
    try:
        return INSTANCE_TYPES[name]
    except KeyError as error:
        raise SettingsError(
            f"the instance type {name!r} is not known", "Add it to infra/aws/cluster/instances.py with its price"
        ) from error
