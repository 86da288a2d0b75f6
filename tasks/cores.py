"""How many cores there are to use, which is not how many the machine has, and about how fast they are."""

from __future__ import annotations

import math
import os
from pathlib import Path


def usable_cores() -> int:
    """Cores this process may really use, which in a container or a batch job are fewer than `os.cpu_count()`.

    Its affinity mask, cut by the CPU quota of its control group and by what its Slurm job reserved: not every Slurm
    binds a job to its cores.
    """
    cores = len(os.sched_getaffinity(0))
    quota = _cgroup_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    reserved = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if reserved.isdigit():
        cores = min(cores, int(reserved))
    return max(1, min(cores, math.floor(quota + 0.5))) if quota else max(1, cores)


def assumed_flops(cores: int, on_gpu: bool) -> float:
    """FLOP/s that a worker with these cores, or with a GPU, sustains; the order of magnitude, for sizing chunks."""
    return 5e13 if on_gpu else 8e10 * cores


def _cgroup_quota(membership: Path, root: Path) -> float | None:
    """Cores by CPU quota of the control group (version 2, then 1) and all its parents; `None` without a quota."""
    quotas: list[float] = []
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root if not controllers else root / "cpu"
        folder = base / group.lstrip("/")
        # Inside a container the named group may be outside what is mounted: then only the mounted root exists.
        for candidate in (folder, *folder.parents):
            quota = _read_quota(candidate)
            if quota:
                quotas.append(quota)
            if candidate == base:
                break
    return min(quotas, default=None)


def _read_quota(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if quota == "max" or int(quota) <= 0:
        return None
    return int(quota) / int(period)
