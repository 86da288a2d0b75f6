"""A real Slurm on one machine, for tests and development: controller, nodes and queue, up in a second.

As root or as a plain user, beside any other Slurm. Where this machine has none, Debian's packages are unpacked into
`~/.cache/media-super-resolution/slurm`; nothing is installed. On the command line:

    eval "$(python -m infra.slurm up)"      start one, and use it in this shell
    sinfo; sbatch --wrap "hostname"
    python -m infra.slurm down

In a program, with faults on demand:

    with LocalSlurm() as slurm, slurm.use():
        subprocess.run(["sbatch", "--partition=gpu", "--gres=gpu:1", "--wrap", "sleep 60"], check=True)
        slurm.set_node("gpu-1", "down")
        print(slurm.squeue())

`SlurmDescription` says which partitions and nodes there are; `DEVELOPMENT` is the default. GPUs are pretended: Slurm
counts them and gives each job its `CUDA_VISIBLE_DEVICES`. Nodes are daemons that share this machine, so memory and CPUs
are counted, not enforced. There is no accounting (`sacct`); `LocalSlurm.squeue` shows ended jobs too.
"""

from __future__ import annotations

from infra.slurm.configuration import Place, Timings, gres_conf, slurm_conf
from infra.slurm.description import DEVELOPMENT, Node, Partition, SlurmDescription, WhenPreempted
from infra.slurm.errors import SlurmError, SlurmMissingError
from infra.slurm.local import Job, LocalSlurm
from infra.slurm.network import can_use_network_namespaces
from infra.slurm.programs import Programs, find_programs

__all__ = [
    "DEVELOPMENT",
    "Job",
    "LocalSlurm",
    "Node",
    "Partition",
    "Place",
    "Programs",
    "SlurmDescription",
    "SlurmError",
    "SlurmMissingError",
    "Timings",
    "WhenPreempted",
    "can_use_network_namespaces",
    "find_programs",
    "gres_conf",
    "slurm_conf",
]
