"""The blocks of pools that flows use on a cluster, as `superres blocks save` reads them."""

from __future__ import annotations

import json
from typing import Any, Final

from infra.aws.cluster.queues import Jobs, Queues

#: Where the file system is mounted on all nodes.
SHARED: Final = "/fsx"


def pools_toml(queues: Queues) -> str:
    """The text of a file with one `[slurm-pools.NAME]` for each block.

    Each job asks for its share of the CPUs, the memory and the GPUs of the smallest node it may run on.
    """
    lines = ["# Made from the description of the cluster's queues: python -m infra.aws.cluster pools"]
    for block in queues.blocks:
        lines += ["", f"[slurm-pools.{block.name}]"]
        facts = {
            "scratch_directory": f"{SHARED}/superres/scratch",
            "shared_directory": f"{SHARED}/superres",
            "log_directory": f"{SHARED}/superres/logs",
        }
        lines += [f"{name} = {_toml(value)}" for name, value in facts.items()]
        lines += [f"cpu = {_toml(_nodes(queues, block.cpu))}", f"gpu = {_toml(_nodes(queues, block.gpu))}"]
    return "\n".join(lines) + "\n"


def _nodes(queues: Queues, jobs: Jobs) -> dict[str, Any]:
    """What `blocks.pools.SlurmNodes` wants to know."""
    used = [queues.queue(name) for name in jobs.queues]
    gpus = min(queue.gpus for queue in used) // jobs.per_node
    return {
        "partition": ",".join(jobs.queues),
        "cores": min(queue.cpus for queue in used) // jobs.per_node,
        # Memory is scheduled: without an amount a job would get its share by CPUs, with too much it would never start.
        "memory": f"{min(queue.memory_mb for queue in used) // jobs.per_node}MB",
        "gres": f"gpu:{gpus}" if gpus else "",
        "maximum": jobs.maximum,
        "slots": jobs.slots,
        "walltime": jobs.walltime,
        "idle_minutes": jobs.idle_minutes,
        "hourly_price": round(max(queue.hourly_price for queue in used) / jobs.per_node, 4),
    }


def _toml(value: Any) -> str:
    """A value in TOML, whose strings, numbers and lists are written as in JSON."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(each)}" for name, each in value.items()) + " }"
    return json.dumps(value)
