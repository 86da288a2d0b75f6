"""What is measured of a stage and of a job."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import pytest

from tasks.chunk_report import StageReport
from tasks.errors import SettingsError
from tasks.metrics import MetricsSettings, Sample, samples_of_job, samples_of_stage

REPORT: Final = StageReport("upscale", 3, started=1e9, seconds=4.0, engine={"threads": None}, bytes=500)


def _of_stage(report: StageReport = REPORT, pool: str = "gpu") -> list[Sample]:
    return samples_of_stage(report, frames=100, model="compact", pool=pool, queue_wait=0.5, retries=1)


def test_a_stage_gives_what_it_took_with_all_its_dimensions() -> None:
    dimensions = ("upscale", "compact", "gpu")
    assert set(_of_stage()) == {
        Sample("Seconds", 4.0, "Seconds", *dimensions),
        Sample("Frames", 100, "Count", *dimensions),
        Sample("FramesPerSecond", 25.0, "Count/Second", *dimensions),
        Sample("Bytes", 500, "Bytes", *dimensions),
        Sample("Retries", 1, "Count", *dimensions),
        Sample("QueueWait", 0.5, "Seconds", *dimensions),
        Sample("GpuSeconds", 4.0, "Seconds", *dimensions),
    }


@pytest.mark.parametrize(("pool", "engine"), [("cpu", {"threads": None}), ("cpu", None), ("gpu", {"threads": 4})])
def test_only_work_on_a_gpu_is_seconds_of_a_gpu(pool: str, engine: dict[str, Any] | None) -> None:
    samples = _of_stage(replace(REPORT, engine=engine), pool)
    assert "GpuSeconds" not in {sample.name for sample in samples}


def test_a_reused_chunk_counts_as_no_work() -> None:
    assert {sample.name for sample in _of_stage(StageReport.reused("upscale", 3))} == {"QueueWait", "Retries"}


def test_a_stage_too_short_to_be_measured_has_no_speed() -> None:
    assert "FramesPerSecond" not in {sample.name for sample in _of_stage(replace(REPORT, seconds=0.0))}


def test_a_job_gives_its_outcome_and_what_it_took() -> None:
    samples = samples_of_job(
        "failed", seconds=60.0, node_seconds={"cpu": 50.0, "gpu": 20.0}, cost=0.25, model="compact"
    )
    assert set(samples) == {
        Sample("JobsPublished", 0, "Count"),
        Sample("JobsFailed", 1, "Count"),
        Sample("JobsCancelled", 0, "Count"),
        Sample("JobSeconds", 60.0, "Seconds", model="compact"),
        Sample("NodeSeconds", 50.0, "Seconds", pool="cpu"),
        Sample("NodeSeconds", 20.0, "Seconds", pool="gpu"),
        Sample("Cost", 0.25, "None", model="compact"),
    }


def test_a_job_without_prices_has_no_cost() -> None:
    assert "Cost" not in {sample.name for sample in samples_of_job("published", seconds=1.0)}


@pytest.mark.parametrize("namespace", ["AWS/Mine", "two words", "a" * 256, "héé"])
def test_a_namespace_that_cloudwatch_would_refuse_is_refused(namespace: str) -> None:
    with pytest.raises(SettingsError, match="cannot be a namespace"):
        MetricsSettings(namespace=namespace)


def test_a_file_that_node_exporter_would_not_read_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"ends in \.prom"):
        MetricsSettings(file="/var/lib/metrics.txt")


def test_the_file_lies_in_the_home_of_the_project_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPERRES_HOME", "/srv/superres")
    assert str(MetricsSettings().path) == "/srv/superres/metrics/superres.prom"
