"""What is measured of each stage of each chunk and of each job, and how values are summed up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, get_args

from tasks.chunk_report import StageReport

Name = Literal[
    "Seconds", "Frames", "FramesPerSecond", "Bytes", "Retries", "QueueWait", "GpuSeconds",
    "JobSeconds", "JobsPublished", "JobsFailed", "JobsCancelled", "NodeSeconds", "Cost",
]  # fmt: skip
Outcome = Literal["published", "failed", "cancelled"]

#: Units as CloudWatch calls them. Cost has none: it is in the currency of the prices it was computed with.
_UNITS: Final[Mapping[Name, str]] = {
    "Seconds": "Seconds",
    "FramesPerSecond": "Count/Second",
    "Bytes": "Bytes",
    "QueueWait": "Seconds",
    "GpuSeconds": "Seconds",
    "JobSeconds": "Seconds",
    "NodeSeconds": "Seconds",
    "Cost": "None",
}


@dataclass(frozen=True)
class Sample:
    """One value. Dimensions that do not apply to it are empty."""

    name: Name
    value: float
    unit: str
    phase: str = ""
    """Stage of a chunk: `extract`, `upscale` or `encode`."""
    model: str = ""
    """Name of the model card."""
    pool: str = ""


class Series(NamedTuple):
    """What is summed up together: the values of one name and its dimensions within one minute."""

    minute: int
    """Its start, seconds since the epoch."""
    name: Name
    unit: str
    phase: str
    model: str
    pool: str


@dataclass(frozen=True)
class Statistics:
    """What is kept of the values of a series."""

    count: int
    sum: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, value: float) -> Statistics:
        return cls(1, value, value, value)

    def merged(self, other: Statistics) -> Statistics:
        return Statistics(
            self.count + other.count,
            self.sum + other.sum,
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
        )


def samples_of_stage(
    report: StageReport, *, frames: int, model: str, pool: str, queue_wait: float, retries: int
) -> list[Sample]:
    """What one stage of one chunk took.

    A chunk reused from an earlier attempt was work of that attempt and counted there, so only the wait and the retries
    are of this one: its zero seconds would make the mean look better than any chunk was.

    Args:
        report: What the worker reported.
        frames: Frames of the chunk.
        model: Name of the model card.
        pool: Where it ran. Only `gpu` gives seconds of a GPU, and only if the engine did not run on the CPU there.
        queue_wait: Seconds between the stage being ready and its start.
        retries: Attempts at this stage of this chunk that failed before.
    """

    def sample(name: Name, value: float) -> Sample:
        return _sample(name, value, phase=report.stage, model=model, pool=pool)

    samples = [sample("QueueWait", queue_wait), sample("Retries", retries)]
    if report.was_reused:
        return samples
    samples += [sample("Seconds", report.seconds), sample("Frames", frames), sample("Bytes", report.bytes)]
    if report.seconds > 0:
        samples.append(sample("FramesPerSecond", frames / report.seconds))
    if pool == "gpu" and (report.engine or {}).get("threads") is None:
        samples.append(sample("GpuSeconds", report.seconds))
    return samples


def samples_of_job(
    outcome: Outcome,
    *,
    seconds: float,
    node_seconds: Mapping[str, float] | None = None,
    cost: float | None = None,
    model: str = "",
) -> list[Sample]:
    """What one job took.

    The outcomes that it did not have are recorded as zero: alarms and rates need the series to be there before the
    first failure, and the mean of `JobsFailed` is the share of jobs that fail.

    Args:
        outcome: How it ended.
        seconds: Wall time of the whole job.
        node_seconds: Seconds that workers of each pool held their nodes.
        cost: In the currency of the prices; `None` where nobody named any.
        model: Name of the model card; empty if the job ended before it was known.
    """
    samples = [_sample(f"Jobs{each.capitalize()}", float(each == outcome)) for each in get_args(Outcome)]  # type: ignore[arg-type]
    samples.append(_sample("JobSeconds", seconds, model=model))
    samples += [_sample("NodeSeconds", held, pool=pool) for pool, held in (node_seconds or {}).items()]
    if cost is not None:
        samples.append(_sample("Cost", cost, model=model))
    return samples


def _sample(name: Name, value: float, *, phase: str = "", model: str = "", pool: str = "") -> Sample:
    return Sample(name, value, _UNITS.get(name, "Count"), phase, model, pool)
