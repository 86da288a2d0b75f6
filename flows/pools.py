"""Which pools a flow uses: those that are open around it, else those that its parameter `pools` names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from blocks.stages import CPU_IMPORTS, GPU_IMPORTS
from infra.pools import Pool, local_pools
from infra.pools.opening import current_cluster
from tasks.chunks import Capacity

if TYPE_CHECKING:
    from infra.pools import PooledCluster


def pools_of_this_machine() -> tuple[Pool, ...]:
    """A `cpu` and a `gpu` pool whose workers load what their stages need while they wait for the first chunk."""
    return local_pools(cpu_imports=CPU_IMPORTS, gpu_imports=GPU_IMPORTS)


def pools_of_flow_run() -> Iterable[Pool]:
    """The pools that the parameters of the current flow run name.

    Raises:
        SettingsError: There are none of that name.
        PoolError: Slurm would not run their jobs.
    """
    from prefect.runtime import flow_run

    from blocks.pools import load_pools

    options = flow_run.parameters.get("options") or {}
    block = load_pools(options.get("pools", "local") if isinstance(options, dict) else options.pools)
    block.check()
    return block.pools()


@dataclass(frozen=True)
class Site:
    """Where a flow run works.

    Attributes:
        scratch: Where chunk files live, if the pools have a folder for them.
        capacity: What their workers can do at one time.
    """

    scratch: str | None
    capacity: Capacity
    hourly_prices: dict[str, float]
    """Of one worker of each pool; zero where nobody said."""
    pools: tuple[Pool, ...]

    def cost(self, node_seconds: dict[str, float]) -> float | None:
        """What seconds of workers cost; `None` where no price is known."""
        if not any(self.hourly_prices.values()):
            return None
        return round(sum(self.hourly_prices.get(pool, 0.0) * s / 3600 for pool, s in node_seconds.items()), 4)


class PoolOptions(Protocol):
    """Options of any flow that name its pools."""

    pools: str


def site_of_flow_run(options: PoolOptions) -> Site:
    """The site of a flow run with these parameters; starts nothing."""
    return site_of(options.pools)


def site_of(name: str) -> Site:
    """The site whose pools have this name, with the pools that are open, if there are any; starts nothing.

    Raises:
        SettingsError: There are no such pools.
    """
    from blocks.pools import load_pools

    block = load_pools(name)
    cluster = current_cluster()
    pools = block.pools() if cluster is None else tuple(cluster.pools.values())
    return Site(block.scratch_directory or None, capacity_of(pools), block.hourly_prices, pools)


def capacity_of(pools: tuple[Pool, ...]) -> Capacity:
    """What a `cpu` and a `gpu` pool can do at one time."""
    slots = {pool.name: pool.maximum * pool.slots for pool in pools}
    flops = next(pool.start.flops for pool in pools if pool.name == "gpu")
    return Capacity(slots["gpu"], slots["cpu"], flops)


def cluster_of_flow_run() -> PooledCluster:
    """The open pools that the tasks of the current flow run use; opened now where none are."""
    from prefect.context import FlowRunContext

    from infra.pools import PoolTaskRunner

    context = FlowRunContext.get()
    assert context is not None and isinstance(context.task_runner, PoolTaskRunner)
    return context.task_runner.cluster
