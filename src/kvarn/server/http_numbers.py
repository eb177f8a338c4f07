"""How requests over HTTP were answered: by route and status, and how long it took."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

from starlette.types import Scope

from kvarn.engine.histogram import Histogram, HistogramSnapshot

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class HttpNumbers:
    """Counts of one application: an `HttpWatcher`. The event loop's thread writes; any may read."""

    def __init__(self) -> None:
        self._responses: Counter[tuple[str, str, str]] = Counter()
        self._seconds: dict[tuple[str, str], Histogram] = {}

    def begun(self, scope: Scope) -> _Stopwatch:
        """A request has come."""
        del scope
        return _Stopwatch(self)

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """One request is done with. seconds: until the last byte was written."""
        self._responses[route, method, str(status)] += 1
        key = route, f"{status // 100}xx"
        if key not in self._seconds:
            self._seconds[key] = Histogram(SECONDS)
        self._seconds[key].observe(seconds)

    @property
    def responses(self) -> Mapping[tuple[str, str, str], int]:
        """By route, method and status."""
        return MappingProxyType(self._responses.copy())

    @property
    def seconds(self) -> Mapping[tuple[str, str], HistogramSnapshot]:
        """By route and class of status, such as 4xx."""
        return {key: histogram.snapshot() for key, histogram in self._seconds.copy().items()}


class _Stopwatch:
    def __init__(self, numbers: HttpNumbers) -> None:
        self._numbers = numbers
        self._began = time.perf_counter()

    def ended(self, route: str, method: str, status: int) -> None:
        """Counts the request."""
        self._numbers.answered(route, method, status, time.perf_counter() - self._began)
