"""Elastic pools of Dask workers behind one scheduler, and the Prefect task runner that uses them.

A `Pool` is a named kind of worker: how many tasks one worker takes, how many workers there may be, how long an idle one
stays, and how one starts. `PooledCluster` runs one scheduler and scales each pool 0 -> n -> 0 by the tasks that ask for
it. `PoolTaskRunner` is what a flow names; its tasks say where they run with a tag:

    @task(tags={"pool:gpu"})
    def upscale(chunk): ...

    @flow(task_runner=PoolTaskRunner())
    def upscale_video(source): ...

A flow opens `local_pools()` by itself at its first task. To start workers while other things load, to keep them warm
over several runs, or to choose other pools, open them first; every flow inside then uses them:

    with open_pools(local_pools()) as cluster:
        upscale_video("film.mkv")

Names are imported on first use, so that `Pool` and `local_pools` cost neither Dask nor Prefect.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infra.pools.cluster import PooledCluster
    from infra.pools.opening import OpenPools, open_pools
    from infra.pools.pool import LocalWorker, Pool, local_pools
    from infra.pools.runner import PoolFuture, PoolTaskRunner
    from infra.pools.slurm import SlurmWorker

__all__ = [
    "LocalWorker",
    "OpenPools",
    "Pool",
    "PoolFuture",
    "PoolTaskRunner",
    "PooledCluster",
    "SlurmWorker",
    "local_pools",
    "open_pools",
]

_MODULES = {
    "LocalWorker": "infra.pools.pool",
    "Pool": "infra.pools.pool",
    "local_pools": "infra.pools.pool",
    "SlurmWorker": "infra.pools.slurm",
    "OpenPools": "infra.pools.opening",
    "PooledCluster": "infra.pools.cluster",
    "open_pools": "infra.pools.opening",
    "PoolTaskRunner": "infra.pools.runner",
    "PoolFuture": "infra.pools.runner",
}


def __getattr__(name: str) -> Any:
    try:
        module = _MODULES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return getattr(importlib.import_module(module), name)
