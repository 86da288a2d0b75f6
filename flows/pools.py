"""The pools that flows open when nobody opened others: those of this machine."""

from __future__ import annotations

from infra.pools import Pool, local_pools


def pools_of_this_machine() -> tuple[Pool, ...]:
    """A `cpu` and a `gpu` pool whose workers load what their stages need while they wait for the first chunk."""
    return local_pools(cpu_imports=("tasks.extract", "tasks.encode"), gpu_imports=("tasks.upscale",))
