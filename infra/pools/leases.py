"""How long each worker held its node, where that was and where its log is: what a run cost and where to look."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Lease:
    """The time one worker held a node, or a share of it.

    Attributes:
        pool: Name of the pool.
        worker: Name of the worker.
        started: When the node was taken, seconds since the epoch.
        ended: When it was given back; `None` while it is held.
        node: Name of the node.
        job: Number of the batch job; empty for a process of this machine.
        log: Path of the worker's log; empty where there is none.
    """

    pool: str
    worker: str
    started: float
    ended: float | None = None
    node: str = ""
    job: str = ""
    log: str = ""

    def seconds(self, since: float, until: float) -> float:
        """Seconds held between two times."""
        ended = until if self.ended is None else min(self.ended, until)
        return max(0.0, ended - max(self.started, since))

    def __str__(self) -> str:
        place = f"{self.worker} on {self.node or 'an unknown node'}"
        if self.job:
            place += f", Slurm job {self.job}"
        return f"{place}, log {self.log}" if self.log else place


class Leases:
    """All leases of one cluster, by the name of the worker; a name may be used again."""

    def __init__(self) -> None:
        self._leases: dict[str, list[Lease]] = {}

    def begin(self, pool: str, worker: str, node: str = "") -> Lease:
        """The open lease of a worker; begun now where there is none."""
        lease = self.latest(worker)
        if lease is None or lease.ended is not None:
            lease = Lease(pool, worker, time.time(), node=node or socket.gethostname())
            self._leases.setdefault(worker, []).append(lease)
        return lease

    def end(self, worker: str) -> None:
        """The worker is gone."""
        lease = self.latest(worker)
        if lease is not None and lease.ended is None:
            lease.ended = time.time()

    def latest(self, worker: str) -> Lease | None:
        """The last lease of a worker."""
        leases = self._leases.get(worker)
        return leases[-1] if leases else None

    def node_seconds(self, since: float, until: float | None = None) -> dict[str, float]:
        """Seconds that workers of each pool held their nodes between two times (until now by default)."""
        until = time.time() if until is None else until
        seconds: dict[str, float] = {}
        for lease in self:
            seconds[lease.pool] = seconds.get(lease.pool, 0.0) + lease.seconds(since, until)
        return {pool: round(value, 3) for pool, value in sorted(seconds.items())}

    def __iter__(self) -> Iterator[Lease]:
        return iter([lease for leases in list(self._leases.values()) for lease in list(leases)])
