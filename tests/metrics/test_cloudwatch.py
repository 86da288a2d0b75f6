"""Metrics in CloudWatch: right sums, few calls, and a service that is away costs the run nothing."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tasks.aws import AwsSettings, aws_client
from tasks.errors import SettingsError
from tasks.metrics import MetricsSettings, Sample, open_metrics, samples_of_job
from tasks.metrics.recorder import SERIES_LIMIT
from tests.metrics.services import Service, answering, closed, silent
from tests.waiting import eventually


def _frames(model: str, value: float = 1.0, pool: str = "") -> Sample:
    return Sample("Frames", value, "Count", "upscale", model, pool)


def _statistics(aws: AwsSettings, namespace: str, name: str, **dimensions: str) -> dict[str, float]:
    """What CloudWatch answers for the last hour."""
    now = datetime.now(UTC)
    metric = {
        "Namespace": namespace,
        "MetricName": name,
        "Dimensions": [{"Name": key, "Value": value} for key, value in dimensions.items()],
    }
    queries = [
        {"Id": stat.lower(), "MetricStat": {"Metric": metric, "Period": 3600, "Stat": stat}}
        for stat in ("Sum", "SampleCount", "Minimum", "Maximum")
    ]
    answer = aws_client("cloudwatch", aws).get_metric_data(
        MetricDataQueries=queries, StartTime=now - timedelta(hours=1), EndTime=now + timedelta(minutes=1)
    )
    return {result["Id"]: sum(result["Values"]) for result in answer["MetricDataResults"]}


def _metrics(service: Service) -> list[dict[str, Any]]:
    return [metric for call in service.calls for metric in call["MetricData"]]


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_sums_there_are_those_recorded(aws: AwsSettings, chance: Random) -> None:
    values: dict[str, list[float]] = {"compact": [], "swin": []}
    with open_metrics(MetricsSettings("Sums", aws=aws), interval=0.05) as metrics:
        for _ in range(300):
            model = chance.choice(list(values))
            values[model].append(chance.uniform(0.0, 1000.0))
            metrics.record([_frames(model, values[model][-1], "gpu")])
            time.sleep(0.001)  # Over several calls.
    for model, recorded in values.items():
        found = _statistics(aws, "Sums", "Frames", phase="upscale", model=model, pool="gpu")
        assert found == pytest.approx(
            {"sum": sum(recorded), "samplecount": len(recorded), "minimum": min(recorded), "maximum": max(recorded)}
        )


def test_what_alarms_watch_also_has_a_total(credentials: None) -> None:
    with answering() as service, open_metrics(MetricsSettings("Totals", aws=service.aws)) as metrics:
        for pool in ("cpu", "gpu"):
            metrics.record(samples_of_job("published", seconds=5.0, node_seconds={pool: 7.0}))
            metrics.record([_frames("compact", 10, pool)])
    found = {
        (metric["MetricName"], *(each["Value"] for each in metric["Dimensions"])): metric["StatisticValues"]
        for metric in _metrics(service)
    }
    assert len(found) == len(_metrics(service)), "no metric twice in a call"
    assert found["NodeSeconds", "gpu"]["Sum"] == 7.0
    assert found["NodeSeconds",] == {"SampleCount": 2.0, "Sum": 14.0, "Minimum": 7.0, "Maximum": 7.0}
    assert found["JobsPublished",]["Sum"] == 2.0
    assert ("Frames",) not in found, "frames of all phases are no number of frames"


def test_times_are_minutes_in_utc(credentials: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        before = time.time()
        with answering() as service, open_metrics(MetricsSettings("Times", aws=service.aws)) as metrics:
            metrics.record([_frames("compact")])
    finally:
        monkeypatch.undo()
        time.tzset()
    (metric,) = _metrics(service)
    assert metric["Timestamp"] % 60 == 0
    assert before - 60 < metric["Timestamp"] <= time.time()


def test_thousands_of_values_are_few_calls_of_no_more_than_the_service_takes(credentials: None) -> None:
    with answering() as service:
        metrics = open_metrics(MetricsSettings("Batches", aws=service.aws))
        for index in range(1200):
            metrics.record([Sample("Retries", 1.0, "Count", model=f"model-{index}")] * 10)
        metrics.close(timeout=30)
    sizes = [len(call["MetricData"]) for call in service.calls]
    assert max(sizes) <= 1000
    assert len(sizes) == 3
    of_all = [metric for metric in _metrics(service) if not metric["Dimensions"]]
    assert sum(metric["StatisticValues"]["Sum"] for metric in of_all) == 12_000


def test_calls_are_no_more_frequent_than_the_interval(credentials: None) -> None:
    with answering() as service, open_metrics(MetricsSettings("Calls", aws=service.aws), interval=0.5) as metrics:
        until = time.monotonic() + 1.2
        while time.monotonic() < until:
            metrics.record([_frames("compact")])
            time.sleep(0.001)
        assert 1 <= len(service.calls) <= 2


def test_names_that_cloudwatch_would_refuse_are_made_plain(credentials: None) -> None:
    with answering() as service, open_metrics(MetricsSettings("Names", aws=service.aws)) as metrics:
        metrics.record([_frames(model) for model in (": mömo\n ", "é" * 2000, "  ")])
    values = [metric["Dimensions"][1]["Value"] for metric in _metrics(service)]
    assert values == ["m?mo?", "?" * 1024, "?"]


@pytest.mark.parametrize("place", ["closed", "silent", "throttling"])
def test_a_service_that_is_away_costs_the_run_no_time(
    credentials: None, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    with silent() as hanging, answering("ThrottlingException") as throttling:
        aws = {"closed": closed(), "silent": hanging, "throttling": throttling.aws}[place]
        metrics = open_metrics(MetricsSettings("Away", aws=aws), interval=0.01)
        slowest = 0.0
        for index in range(5000):
            begun = time.monotonic()
            metrics.record([_frames(f"model-{index % 50}")])
            slowest = max(slowest, time.monotonic() - begun)
        assert slowest < 0.5
        begun = time.monotonic()
        metrics.close()
        assert time.monotonic() - begun < 6.0
    first, last = _warnings(caplog)
    assert "do not reach CloudWatch namespace Away" in first
    assert last == "5000 metric values did not reach CloudWatch namespace Away"
    assert "a-secret-that-must-not-show" not in caplog.text


def test_close_waits_no_longer_than_it_is_told(credentials: None, caplog: pytest.LogCaptureFixture) -> None:
    with silent() as hanging:
        metrics = open_metrics(MetricsSettings("Close", aws=hanging))
        metrics.record([_frames("compact")] * 3)
        begun = time.monotonic()
        metrics.close(timeout=0.2)
        assert time.monotonic() - begun < 1.0
    time.sleep(0.2)  # The call that hung fails now.
    assert _warnings(caplog) == ["3 metric values did not reach CloudWatch namespace Close"]


def test_each_outage_is_one_warning_and_what_it_held_up_arrives_once(
    credentials: None, caplog: pytest.LogCaptureFixture
) -> None:
    with answering() as service, open_metrics(MetricsSettings("Outages", aws=service.aws), interval=0.02) as metrics:
        for outage in (1, 2):
            service.refusal = "ThrottlingException"
            metrics.record([_frames("compact", 10.0)])
            tried = len(service.calls)
            eventually(lambda tried=tried: len(service.calls) >= tried + 4)
            service.calls.clear()
            service.refusal = ""
            metrics.record([_frames("compact", 5.0)])
            eventually(lambda: sum(metric["StatisticValues"]["SampleCount"] for metric in _metrics(service)) >= 2)
            assert sum(metric["StatisticValues"]["Sum"] for metric in _metrics(service)) == 15.0
            assert len(_warnings(caplog)) == outage


def test_what_will_never_be_taken_does_not_hold_up_the_rest(
    credentials: None, caplog: pytest.LogCaptureFixture
) -> None:
    with answering("InvalidParameterValue") as service:
        metrics = open_metrics(MetricsSettings("Refused", aws=service.aws), interval=0.02)
        metrics.record([_frames("bad", 3.0)])
        eventually(lambda: service.calls)
        time.sleep(0.1)
        assert len(service.calls) == 1, "not sent again"
        service.refusal = ""
        metrics.record([_frames("good")])
        metrics.close()
    assert [metric["Dimensions"][1]["Value"] for metric in _metrics(service)] == ["bad", "good"]
    assert _warnings(caplog)[-1].startswith("1 metric values")


def test_the_rest_is_still_sent_at_the_end_when_something_is_refused(credentials: None) -> None:
    with answering("InvalidParameterValue") as service:
        with open_metrics(MetricsSettings("Rest", aws=service.aws)) as metrics:
            metrics.record(_frames(f"model-{index}") for index in range(700))
        assert [len(call["MetricData"]) for call in service.calls] == [500, 200]


def test_what_is_kept_is_bounded_and_the_oldest_goes_first(credentials: None, caplog: pytest.LogCaptureFixture) -> None:
    with answering() as service:
        metrics = open_metrics(MetricsSettings("Bounded", aws=service.aws))
        metrics.record(_frames(f"model-{index}") for index in range(SERIES_LIMIT + 50))
        metrics.close(timeout=60)
    kept = {metric["Dimensions"][1]["Value"] for metric in _metrics(service)}
    assert kept == {f"model-{index}" for index in range(50, SERIES_LIMIT + 50)}
    assert _warnings(caplog) == ["50 metric values did not reach CloudWatch namespace Bounded"]


def test_values_that_are_no_numbers_spoil_nothing(credentials: None, caplog: pytest.LogCaptureFixture) -> None:
    with answering() as service, open_metrics(MetricsSettings("Numbers", aws=service.aws)) as metrics:
        metrics.record([_frames("compact", value) for value in (float("nan"), float("inf"), 2.0)])
    (metric,) = _metrics(service)
    assert metric["StatisticValues"]["Sum"] == 2.0
    assert _warnings(caplog) == ["2 metric values did not reach CloudWatch namespace Numbers"]


def test_a_closed_recorder_takes_nothing_and_closes_twice(credentials: None) -> None:
    with answering() as service:
        with open_metrics(MetricsSettings("Closed", aws=service.aws)) as metrics:
            metrics.record([_frames("compact")])
        metrics.record([_frames("compact")])
        metrics.close()
    assert len(service.calls) == 1


def test_both_kinds_of_store_have_the_same_sums(aws: AwsSettings, tmp_path: Path, chance: Random) -> None:
    file = tmp_path / "superres.prom"
    stores = [open_metrics(MetricsSettings("Both", aws=aws)), open_metrics(MetricsSettings(file=str(file)))]
    recorded = {"cpu": 0.0, "gpu": 0.0}
    for _ in range(200):
        pool, seconds = chance.choice(list(recorded)), chance.uniform(0.0, 50.0)
        recorded[pool] += seconds
        for store in stores:
            store.record(samples_of_job("published", seconds=1.0, node_seconds={pool: seconds}))
    for store in stores:
        store.close()
    families = {family.name: family for family in text_string_to_metric_families(file.read_text())}
    for pool, seconds in recorded.items():
        assert _statistics(aws, "Both", "NodeSeconds", pool=pool)["sum"] == pytest.approx(seconds)
        (sample,) = (each for each in families["superres_node_seconds"].samples if each.labels == {"pool": pool})
        assert sample.value == pytest.approx(seconds)


def test_a_block_of_credentials_that_is_not_there_is_refused_at_the_start(prefect_api: object) -> None:
    with pytest.raises(SettingsError, match="no block of type AWS Credentials called 'nobody'"):
        open_metrics(MetricsSettings("Settings", aws=AwsSettings(credentials="nobody")))
