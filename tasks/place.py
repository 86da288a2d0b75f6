"""Where a process runs, so that the log of a chunk can be found: node, batch job, log."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A process.

    Attributes:
        node: Name of the node.
        job: Number of its Slurm job; empty outside of one.
        log: Path of the job's log; empty where there is none.
        process: Its number on the node.
    """

    node: str
    job: str
    log: str
    process: int

    def __str__(self) -> str:
        return f"{self.node} job {self.job}" if self.job else f"{self.node} process {self.process}"


def this_place() -> Place:
    """Where this process runs."""
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return Place(node, os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SUPERRES_WORKER_LOG", ""), os.getpid())
