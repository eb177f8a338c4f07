"""`Refusals` as a metric."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from kvarn.server.refusals import Refusals


class RefusalCollector(Collector):
    """`kvarn:limit_refusals` of a server."""

    def __init__(self, refusals: Refusals) -> None:
        self._refusals = refusals

    def collect(self) -> Iterator[Metric]:
        """One counter with the limit's name as its label."""
        family = CounterMetricFamily(
            "kvarn:limit_refusals", "Requests refused or broken off because of a limit.", labels=["limit"]
        )
        for limit, count in self._refusals.counts().items():
            family.add_metric([limit], count)
        yield family
