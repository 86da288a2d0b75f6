"""Sums values up in memory and has a thread send them, so that no run ever waits for, or fails with, a service."""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final, Protocol

from tasks.aws import AwsSettings
from tasks.errors import SettingsError
from tasks.home import default_home
from tasks.metrics.samples import Sample, Series, Statistics

logger = logging.getLogger(__name__)

#: Seconds between two calls. A killed run loses no more than these, and CloudWatch keeps nothing finer than a minute.
INTERVAL: Final = 15.0

#: Seconds that `close` waits at most: enough for one call that hangs, see `tasks.aws`.
CLOSE_SECONDS: Final = 5.0

#: Series kept while the service is away: a few MB, and hours of a run with some tens of series a minute.
SERIES_LIMIT: Final = 10_000

#: What CloudWatch allows in the name of a namespace.
_NAMESPACE: Final = re.compile(r"[\w.\-/#]{1,255}", re.ASCII)


class RefusedError(Exception):
    """The service read the values and will never take them: there is no point in sending them again."""


class Sink(Protocol):
    """Where values go."""

    name: str
    """For log lines."""
    limit: int
    """Series it takes in one call."""

    def send(self, batch: Mapping[Series, Statistics]) -> None:
        """Deliver all or nothing.

        Raises:
            RefusedError: In vain, now and later.
            Exception: Not now.
        """


@dataclass(frozen=True)
class MetricsSettings:
    """Where values go: to CloudWatch if a namespace is given, else to a file for Prometheus.

    Attributes:
        namespace: Of CloudWatch.
        file: What the textfile collector of node_exporter reads; its name must end in `.prom`. Empty for
            `metrics/superres.prom` in `$SUPERRES_HOME` (default `~/.local/share/media-super-resolution`).
        aws: How to reach CloudWatch.

    Raises:
        SettingsError: CloudWatch would not take the namespace, or node_exporter not the file.
    """

    namespace: str = ""
    file: str = ""
    aws: AwsSettings = field(default_factory=AwsSettings)

    def __post_init__(self) -> None:
        if self.namespace and (not _NAMESPACE.fullmatch(self.namespace) or self.namespace.startswith("AWS/")):
            raise SettingsError(
                f"{self.namespace!r} cannot be a namespace of CloudWatch",
                "Use up to 255 letters, digits and any of . - _ / #, not beginning with AWS/",
            )
        if self.file and not self.file.endswith(".prom"):
            raise SettingsError(f"node_exporter does not read {self.file}", "Give it a name that ends in .prom")

    @property
    def path(self) -> Path:
        """The file for Prometheus."""
        if self.file:
            return Path(self.file).expanduser()
        return default_home() / "metrics" / "superres.prom"


class Metrics(AbstractContextManager["Metrics"]):
    """Takes values while a run lasts. Made by `open_metrics`; safe to use from several threads.

    Args:
        sink: Where they go.
        interval: Seconds between two calls.
    """

    def __init__(self, sink: Sink, interval: float = INTERVAL) -> None:
        self._sink = sink
        self._interval = interval
        self._lock = threading.Lock()
        self._pending: dict[Series, Statistics] = {}
        self._under_way = 0
        self._lost = 0
        self._is_down = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def record(self, samples: Iterable[Sample]) -> None:
        """Add values to what is sent next. Returns at once; values that are no numbers count as lost."""
        minute = int(time.time()) // 60 * 60
        with self._lock:
            for sample in samples:
                if self._closing.is_set() or not math.isfinite(sample.value):
                    self._lost += 1
                    continue
                series = Series(minute, sample.name, sample.unit, sample.phase, sample.model, sample.pool)
                self._add(series, Statistics.of(float(sample.value)))

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Send the rest, for `timeout` seconds at most, and say how much was lost. Safe to call twice."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join(timeout)
        with self._lock:
            lost = self._lost + self._under_way + sum(statistics.count for statistics in self._pending.values())
            self._pending.clear()
            self._is_down = True  # A call that still hangs has nothing more to say.
        if lost:
            logger.warning("%d metric values did not reach %s", lost, self._sink.name)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, series: Series, statistics: Statistics) -> None:
        known = self._pending.get(series)
        self._pending[series] = known.merged(statistics) if known else statistics
        if len(self._pending) > SERIES_LIMIT:
            self._lost += self._pending.pop(next(iter(self._pending))).count  # The oldest: they are in order of time.

    def _run(self) -> None:
        while not self._closing.wait(self._interval):
            self._deliver()
        while self._pending and self._deliver():
            pass

    def _deliver(self) -> bool:
        """Make one call if there is something to send.

        Returns:
            Whether another call may do better than to fail like this one.
        """
        with self._lock:
            batch = dict(islice(self._pending.items(), self._sink.limit))
            for series in batch:
                del self._pending[series]
            self._under_way = sum(statistics.count for statistics in batch.values())
        if not batch:
            return True
        try:
            self._sink.send(batch)
        except Exception as error:
            was_refused = isinstance(error, RefusedError)
            with self._lock:
                if was_refused:
                    self._lost += self._under_way
                else:
                    newer, self._pending = self._pending, batch
                    for series, statistics in newer.items():
                        self._add(series, statistics)
                self._under_way = 0
            if not self._is_down:
                logger.warning("metrics do not reach %s (%s); the run goes on", self._sink.name, _reason(error))
            self._is_down = True
            return was_refused
        self._under_way = 0
        if self._is_down:
            logger.info("metrics reach %s again", self._sink.name)
        self._is_down = False
        return True


def open_metrics(settings: MetricsSettings, interval: float = INTERVAL) -> Metrics:
    """Begin to take values for wherever `settings` say.

    Args:
        settings: Where they go.
        interval: Seconds between two calls.

    Raises:
        SettingsError: There is no block of credentials of the name that the settings give.
    """
    # Here: each of the two loads a library that the other has no use for.
    if settings.namespace:
        from tasks.metrics.cloudwatch import CloudWatch

        return Metrics(CloudWatch(settings.namespace, settings.aws), interval)
    from tasks.metrics.prometheus import PrometheusFile

    return Metrics(PrometheusFile(settings.path), interval)


def _reason(error: Exception) -> str:
    """What is wrong in a few words; messages of AWS name accounts and roles, which are nobody's business in a log."""
    if isinstance(error, RefusedError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return code or type(error).__name__
