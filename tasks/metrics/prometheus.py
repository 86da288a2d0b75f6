"""Adds values to a file that the textfile collector of node_exporter reads.

Processes of one machine share the file and add to what is there, one after the other under a lock, so counters grow
over runs as Prometheus expects. The new file takes the place of the old one by a rename: readers see one or the other.

`FramesPerSecond` is left out, because it cannot be added up:
`rate(superres_frames_total[1h]) / rate(superres_stage_seconds_sum[1h])` gives it for any span of time.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tasks.metrics.samples import Series, Statistics

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

logger = logging.getLogger(__name__)

#: Kind, name and help of what each sample is added to. Summaries also count, for means.
_FAMILIES: Final[Mapping[str, tuple[str, str, str]]] = {
    "Seconds": ("summary", "superres_stage_seconds", "Work on stages of chunks."),
    "QueueWait": ("summary", "superres_queue_wait_seconds", "Stages of chunks that waited for a worker."),
    "Frames": ("counter", "superres_frames", "Frames that went through a stage."),
    "Bytes": ("counter", "superres_written_bytes", "Bytes of chunk files written."),
    "Retries": ("counter", "superres_retries", "Attempts at stages of chunks that failed."),
    "GpuSeconds": ("counter", "superres_gpu_seconds", "Work on GPUs."),
    "NodeSeconds": ("counter", "superres_node_seconds", "Nodes held by workers."),
    "Cost": ("counter", "superres_cost", "Cost of jobs, in the currency of the prices."),
    "JobSeconds": ("summary", "superres_job_seconds", "Jobs from start to end."),
    "JobsPublished": ("counter", "superres_jobs_published", "Jobs that published their result."),
    "JobsFailed": ("counter", "superres_jobs_failed", "Jobs that failed."),
    "JobsCancelled": ("counter", "superres_jobs_cancelled", "Jobs that were cancelled."),
}

_LAST_JOB: Final = ("gauge", "superres_last_job_timestamp_seconds", "When a job ended last.")


class PrometheusFile:
    """One file.

    Args:
        path: Where it is or is to be.
    """

    limit = 1_000_000
    """All there are: the whole file is written anyway."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path

    def send(self, batch: Mapping[Series, Statistics]) -> None:
        """Add the values to the file.

        Raises:
            OSError: It cannot be read or written.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            exposition = _Exposition(self._read())
            for series, statistics in batch.items():
                exposition.add(series, statistics)
            # Not `.prom`, which would be read half written; under the lock, one name is enough.
            partial = self._path.with_suffix(".partial")
            partial.write_bytes(exposition.text())
            os.replace(partial, self._path)

    def _read(self) -> list[Metric]:
        """What is there; what cannot be understood is set aside."""
        from prometheus_client.parser import text_string_to_metric_families

        try:
            return list(text_string_to_metric_families(self._path.read_text()))
        except FileNotFoundError:
            return []
        except ValueError:
            aside = self._path.with_suffix(f".damaged-{time.time_ns()}")
            os.replace(self._path, aside)
            logger.warning("%s is damaged: kept as %s, and begun anew", self._path, aside.name)
            return []


class _Exposition:
    """The metrics of a file, those of other versions of this program included."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = {family.name: family for family in families}

    def add(self, series: Series, statistics: Statistics) -> None:
        if series.name not in _FAMILIES:
            return
        given = {"phase": series.phase, "model": series.model, "pool": series.pool}
        labels = {label: value for label, value in given.items() if value}
        family = self._family(*_FAMILIES[series.name])
        if family.type == "summary":
            _increase(family, "_count", labels, statistics.count)
            _increase(family, "_sum", labels, statistics.sum)
        else:
            _increase(family, "_total", labels, statistics.sum)
        if series.name == "JobSeconds":
            last = self._family(*_LAST_JOB)
            last.samples.clear()
            last.add_sample(last.name, {}, time.time())

    def text(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self)

    def collect(self) -> Iterable[Metric]:
        """What `generate_latest` asks for."""
        return self._families.values()

    def _family(self, kind: str, name: str, documentation: str) -> Metric:
        from prometheus_client.metrics_core import Metric

        if name not in self._families:
            self._families[name] = Metric(name, documentation, kind)
        return self._families[name]


def _increase(family: Metric, suffix: str, labels: dict[str, str], amount: float) -> None:
    name = family.name + suffix
    for index, sample in enumerate(family.samples):
        if sample.name == name and sample.labels == labels:
            family.samples[index] = sample._replace(value=sample.value + amount)
            return
    family.add_sample(name, labels, amount)
