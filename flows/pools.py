"""Which pools a flow uses: those that are open around it, else those that its parameter `pools` names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from blocks.stages import CPU_IMPORTS, GPU_IMPORTS
from flows.parameters import UpscaleOptions
from infra.pools import Pool, local_pools

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

    options = UpscaleOptions.model_validate(flow_run.parameters.get("options") or {})
    block = load_pools(options.pools)
    block.check()
    return block.pools()


def scratch_of_flow_run(options: UpscaleOptions) -> str | None:
    """The scratch folder of the pools that a flow run's parameters name, if they have one of their own."""
    if options.pools == "local":
        return None
    from blocks.pools import load_pools

    return load_pools(options.pools).scratch_directory or None


def cluster_of_flow_run() -> PooledCluster:
    """The open pools that the tasks of the current flow run use; opened now where none are."""
    from prefect.context import FlowRunContext

    from infra.pools import PoolTaskRunner

    context = FlowRunContext.get()
    assert context is not None and isinstance(context.task_runner, PoolTaskRunner)
    return context.task_runner.cluster
