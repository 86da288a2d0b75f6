"""Sends values to CloudWatch, a minute of each series as one set of statistics.

Every combination of a name and its dimensions (`phase`, `model`, `pool`) is a metric of its own there, paid for each
month and each with alarms of its own: about twenty for a model, and a few more for jobs. Totals over all dimensions,
which no alarm can add up by itself, are kept for the names in `_TOTALS` only. Frames and seconds are not among them:
each frame goes through three phases.

A call whose answer is lost is made again, and CloudWatch does not see that it is the same: such a minute counts twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from tasks.aws import AwsSettings, aws_client
from tasks.metrics.recorder import RefusedError
from tasks.metrics.samples import Series, Statistics

#: Metrics that CloudWatch takes in one call.
_CALL_LIMIT: Final = 1000

#: Also summed up over all their dimensions.
_TOTALS: Final = frozenset({"Retries", "GpuSeconds", "NodeSeconds", "Cost", "JobSeconds"})

#: Answers that no repetition changes, such as to a minute of more than two weeks ago.
_REFUSALS: Final = frozenset(
    {"InvalidParameterValue", "InvalidParameterCombination", "MissingParameter", "MissingRequiredParameter"}
)


class CloudWatch:
    """One namespace.

    Args:
        namespace: Its name.
        aws: How to reach it.

    Raises:
        SettingsError: There is no block of credentials of the name that `aws` gives.
    """

    limit = _CALL_LIMIT // 2
    """A series can be two metrics: its own and the total."""

    def __init__(self, namespace: str, aws: AwsSettings) -> None:
        self.name = f"CloudWatch namespace {namespace}"
        self._namespace = namespace
        # Here and not at the first call: that is made by another thread, which could tell nobody of wrong settings.
        self._client = aws_client("cloudwatch", aws, patient=False)

    def send(self, batch: Mapping[Series, Statistics]) -> None:
        """Put all values.

        Raises:
            RefusedError: CloudWatch will never take them.
            Exception: Of botocore, when CloudWatch cannot be reached or has too much to do.
        """
        from botocore.exceptions import ClientError

        metrics: dict[tuple[Series, tuple[tuple[str, str], ...]], Statistics] = {}
        for series, statistics in batch.items():
            for key in _keys(series):
                metrics[key] = metrics[key].merged(statistics) if key in metrics else statistics
        try:
            self._client.put_metric_data(
                Namespace=self._namespace,
                MetricData=[_datum(*key, statistics) for key, statistics in metrics.items()],
            )
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "").removesuffix("Exception")
            if code in _REFUSALS:
                raise RefusedError(code) from error
            raise


def _keys(series: Series) -> Iterator[tuple[Series, tuple[tuple[str, str], ...]]]:
    """The metrics that a series is part of: minute and name, and dimensions."""
    bare = series._replace(phase="", model="", pool="")
    given = (("phase", series.phase), ("model", series.model), ("pool", series.pool))
    dimensions = tuple((name, _plain(value)) for name, value in given if value)
    yield bare, dimensions
    if dimensions and series.name in _TOTALS:
        yield bare, ()


def _plain(value: str) -> str:
    """As CloudWatch allows values of dimensions; the name of somebody's own model may be anything."""
    printable = "".join(sign if sign.isascii() and sign.isprintable() else "?" for sign in value)
    return printable.lstrip(" :").rstrip()[:1024] or "?"


def _datum(series: Series, dimensions: tuple[tuple[str, str], ...], statistics: Statistics) -> dict[str, Any]:
    return {
        "MetricName": series.name,
        "Dimensions": [{"Name": name, "Value": value} for name, value in dimensions],
        "Timestamp": datetime.fromtimestamp(series.minute, UTC),
        "Unit": series.unit,
        "StatisticValues": {
            "SampleCount": float(statistics.count),
            "Sum": statistics.sum,
            "Minimum": statistics.minimum,
            "Maximum": statistics.maximum,
        },
    }
