"""What jobs and their chunks took, for CloudWatch or Prometheus. Imports neither Prefect nor Dask.

    with open_metrics(MetricsSettings(namespace="SuperRes")) as metrics:
        metrics.record(samples_of_stage(report, frames=1440, model="compact", pool="gpu", queue_wait=0.2, retries=0))

Values are summed up in memory and sent every few seconds by a thread of their own, so `record` returns at once and a
service that is slow or away costs the run nothing but the values themselves.
"""

from __future__ import annotations

from tasks.metrics.recorder import Metrics, MetricsSettings, open_metrics
from tasks.metrics.samples import Outcome, Sample, samples_of_job, samples_of_stage

__all__ = ["Metrics", "MetricsSettings", "Outcome", "Sample", "open_metrics", "samples_of_job", "samples_of_stage"]
