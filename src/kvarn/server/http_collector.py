"""`HttpNumbers` as metrics, under the names that FastAPI's instrumentation gives them."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from kvarn.server.http_numbers import HttpNumbers
from kvarn.server.metrics import histogram_family


class HttpCollector(Collector):
    """Answers over HTTP."""

    def __init__(self, numbers: HttpNumbers) -> None:
        self._numbers = numbers

    def collect(self) -> Iterator[Metric]:
        """Responses by route, method and status; seconds by route and class of status."""
        responses = CounterMetricFamily(
            "http_requests", "Requests over HTTP that are done with.", labels=["handler", "method", "status"]
        )
        for labels, count in self._numbers.responses.items():
            responses.add_metric(labels, count)
        yield responses
        yield histogram_family(
            "http_request_duration_seconds",
            "Of a request over HTTP, until the last byte of its answer.",
            ["handler", "status"],
            self._numbers.seconds,
        )
