"""Metrics in a file for Prometheus: counters that grow over runs and processes."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tasks.chunk_report import StageReport
from tasks.metrics import MetricsSettings, open_metrics, samples_of_job, samples_of_stage
from tests.waiting import eventually

#: Sends one frame as often as it is told, and says when it did.
_WRITER: Final = """
import sys
from pathlib import Path
from tasks.metrics.prometheus import PrometheusFile
from tasks.metrics.samples import Series, Statistics
file = PrometheusFile(Path(sys.argv[1]))
for done in range(1, int(sys.argv[2]) + 1):
    file.send({Series(0, "Frames", "Count", "upscale", "compact", "gpu"): Statistics.of(1.0)})
    print(done, flush=True)
"""

LABELS: Final = {"phase": "upscale", "model": 'the "best"\\one', "pool": "gpu"}


def _values(path: Path, **labels: str) -> dict[str, float]:
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(path.read_text())
        for sample in family.samples
        if sample.labels == labels
    }


def _record_a_chunk(path: Path) -> None:
    report = StageReport("upscale", 0, 0.0, 4.0, bytes=500)
    with open_metrics(MetricsSettings(file=str(path))) as metrics:
        metrics.record(
            samples_of_stage(report, frames=100, model=LABELS["model"], pool="gpu", queue_wait=0.5, retries=1)
        )


def _writer(path: Path, times: int) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", _WRITER, str(path), str(times)], stdout=subprocess.PIPE, text=True)


def test_counters_go_on_where_the_last_run_ended(tmp_path: Path) -> None:
    path = tmp_path / "metrics" / "superres.prom"
    for run in (1, 2, 3):
        _record_a_chunk(path)
        assert _values(path, **LABELS) == {
            "superres_stage_seconds_count": run,
            "superres_stage_seconds_sum": 4.0 * run,
            "superres_queue_wait_seconds_count": run,
            "superres_queue_wait_seconds_sum": 0.5 * run,
            "superres_frames_total": 100 * run,
            "superres_written_bytes_total": 500 * run,
            "superres_retries_total": run,
            "superres_gpu_seconds_total": 4.0 * run,
        }
    assert {file.name for file in path.parent.iterdir()} == {"superres.prom", "superres.lock"}


def test_a_job_sets_the_time_of_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "superres.prom"
    before = time.time()
    for _ in range(2):
        with open_metrics(MetricsSettings(file=str(path))) as metrics:
            metrics.record(samples_of_job("published", seconds=8.0, cost=0.5))
    found = _values(path)
    assert before < found.pop("superres_last_job_timestamp_seconds") <= time.time()
    assert found == {
        "superres_job_seconds_count": 2,
        "superres_job_seconds_sum": 16.0,
        "superres_jobs_published_total": 2,
        "superres_jobs_failed_total": 0,
        "superres_jobs_cancelled_total": 0,
        "superres_cost_total": 1.0,
    }
    assert path.read_text().count("\nsuperres_last_job_timestamp_seconds ") == 1, "node_exporter takes nothing twice"
    kinds = {family.name: family.type for family in text_string_to_metric_families(path.read_text())}
    assert kinds["superres_jobs_published"] == "counter"
    assert kinds["superres_last_job_timestamp_seconds"] == "gauge"
    assert kinds["superres_job_seconds"] == "summary"


def test_processes_add_to_one_file_and_readers_always_see_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "superres.prom"
    writers = [_writer(path, 40) for _ in range(4)]
    seen = [0.0]
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            seen.append(_values(path, phase="upscale", model="compact", pool="gpu")["superres_frames_total"])
    assert [writer.wait() for writer in writers] == [0] * 4
    assert seen == sorted(seen)
    assert _values(path, phase="upscale", model="compact", pool="gpu")["superres_frames_total"] == 160
    assert len(set(seen)) > 2, "read while it was written"


def test_a_killed_process_leaves_a_whole_file_and_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "superres.prom"
    writer = _writer(path, 1_000_000)
    assert writer.stdout is not None
    said = 0
    while said < 50:
        said = int(writer.stdout.readline())
    writer.kill()
    rest = writer.stdout.read().split()
    writer.wait()
    said = int(rest[-1]) if rest else said
    kept = _values(path, phase="upscale", model="compact", pool="gpu")["superres_frames_total"]
    assert said <= kept <= said + 1
    _record_a_chunk(path)
    assert _values(path, **LABELS)["superres_frames_total"] == 100


@pytest.mark.parametrize("content", [b"superres_frames_total{ 12\n", b"superres_frames_total many\n", b"\xff\xfe\x00"])
def test_a_damaged_file_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    path = tmp_path / "superres.prom"
    path.write_bytes(content)
    _record_a_chunk(path)
    assert _values(path, **LABELS)["superres_frames_total"] == 100
    (aside,) = tmp_path.glob("superres.damaged-*")
    assert aside.read_bytes() == content
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_what_another_version_counted_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "superres.prom"
    path.write_text("# HELP superres_old_total Old.\n# TYPE superres_old_total counter\nsuperres_old_total 7.0\n")
    _record_a_chunk(path)
    assert _values(path) == {"superres_old_total": 7.0}
    assert _values(path, **LABELS)["superres_frames_total"] == 100


def test_a_folder_that_cannot_be_made_fails_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    metrics = open_metrics(MetricsSettings(file=str(tmp_path / "file" / "superres.prom")), interval=0.01)
    metrics.record(samples_of_job("published", seconds=8.0))
    eventually(lambda: caplog.records)
    time.sleep(0.1)
    metrics.close()
    first, last = [record.getMessage() for record in caplog.records]
    assert "(File exists); the run goes on" in first
    assert last.startswith("4 metric values did not reach")


def test_values_held_up_by_a_missing_folder_arrive_once_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "superres.prom"
    path.parent.touch()
    with open_metrics(MetricsSettings(file=str(path)), interval=0.02) as metrics:
        metrics.record(samples_of_job("published", seconds=8.0))
        time.sleep(0.1)
        path.parent.unlink()
        eventually(path.exists)
    assert _values(path)["superres_jobs_published_total"] == 1
