"""Forecasts for the pools and the records of a site: see `tasks.forecast`."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, Final

from blocks.site import load_tracking
from flows.pools import Site
from infra.pools import Pool
from infra.pools.pool import LocalWorker
from tasks.cores import assumed_flops, usable_cores
from tasks.errors import LedgerError
from tasks.forecast import Forecast, Rates, estimated, foresee, measured, tells_speed_of
from tasks.home import default_home
from tasks.ledger import open_ledger
from tasks.ledger.record import JobRecord
from tasks.owner import this_user
from tasks.plan import Plan

#: Latest jobs that are looked through for one with the same model.
_JOBS: Final = 300


@dataclass(frozen=True)
class JobForecast(Forecast):
    """What a job will take, and cost.

    Attributes:
        cost: Of the seconds for which workers are held; `None` where no price is known.
    """

    cost: float | None = None

    @property
    def finish_at(self) -> str:
        """When the job would be done if it began now: local time, ISO 8601."""
        return datetime.fromtimestamp(time.time() + self.wall_seconds).astimezone().isoformat(timespec="seconds")


def earlier_jobs(ledger: str, owner: str = "") -> list[JobRecord]:
    """The latest jobs of an owner, newest first; none where the ledger cannot be read. Makes no ledger."""
    settings = load_tracking(ledger).ledger
    if not (settings.table or settings.file or (default_home() / "jobs.sqlite").exists()):
        return []
    try:
        return open_ledger(settings).by_owner(owner or this_user(), limit=_JOBS)
    except LedgerError:
        return []


def forecast(job: Plan, site: Site, jobs: list[JobRecord], seen: tuple[float, str] | None = None) -> JobForecast:
    """What a job will take on a site.

    Args:
        job: Its plan.
        site: Where it will run.
        jobs: Earlier jobs, newest first, which may tell how fast it will be.
        seen: Seconds that its model takes for one of its frames, as measured just now, and on what device.
    """
    gpu, cpu = (_pool(site, name) for name in ("gpu", "cpu"))
    rates = _rates(job, site, jobs, cpu)
    if seen is not None:
        rates = replace(rates, gpu_seconds=seen[0], basis=f"measured on {seen[1]} with excerpts of this video")
    workers = {pool.name: (pool.maximum, pool.slots) for pool in (gpu, cpu)}
    shares = not _on_gpu(gpu) and all(isinstance(pool.start, LocalWorker) for pool in (gpu, cpu))
    found = foresee(job.chunks, rates, site.capacity, workers=workers, shares_cores=shares)
    return JobForecast(**asdict(found), cost=site.cost(found.node_seconds))


def _rates(job: Plan, site: Site, jobs: list[JobRecord], cpu: Pool) -> Rates:
    cores = getattr(cpu.start, "cores", None) or usable_cores()
    picture = job.facts.picture
    rates = estimated(job.card, picture, job.target, job.profile, flops=site.capacity.flops, cores=cores / cpu.slots)
    settings: dict[str, Any] = job.request.settings()
    on_gpu = _on_gpu(_pool(site, "gpu"))
    fitting = [record for record in jobs if tells_speed_of(record, job.card, settings, on_gpu=on_gpu)]
    if not fitting:
        return rates
    # Speed per pixel depends a little on the size; of equal sizes the newest comes first.
    wanted = picture.width * picture.height
    best = min(fitting, key=lambda record: abs(record.probe["width"] * record.probe["height"] - wanted))
    return measured(best, picture, job.target, rates)


def _pool(site: Site, name: str) -> Pool:
    return next(pool for pool in site.pools if pool.name == name)


def _on_gpu(pool: Pool) -> bool:
    return pool.start.flops == assumed_flops(1, on_gpu=True)
