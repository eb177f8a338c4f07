"""`TenantLoads`: what the requests of each tenant are doing right now, for the dashboard."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

WINDOW_SECONDS = 60


@dataclass(frozen=True, slots=True)
class TenantLoad:
    """One tenant's requests over HTTP. name: of its key; empty where no keys are set."""

    name: str
    answering: int
    """Requests of which some text has come."""
    waiting: int
    """Those of which none has."""
    tokens: int
    """Of prompts and answers, in the last `WINDOW_SECONDS`."""


class TenantLoads:
    """Counts of all tenants. For one event loop's thread. Who has not asked for a minute is forgotten."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tenants: dict[str, _Tenant] = {}

    @contextmanager
    def request(self, tenant: str, prompt_tokens: int) -> Iterator[RequestLoad]:
        """A request in flight, for as long as the context lasts."""
        load = RequestLoad(self._tenants.setdefault(tenant, _Tenant()), prompt_tokens, self._clock)
        try:
            yield load
        finally:
            load.end()

    def snapshot(self) -> tuple[TenantLoad, ...]:
        """As it is now, who got most tokens first."""
        now = self._clock()
        found = [tenant.load(name, now) for name, tenant in self._tenants.items()]
        for load in found:
            if not (load.answering or load.waiting or load.tokens):
                del self._tenants[load.name]
        busy = (load for load in found if load.name in self._tenants)
        return tuple(sorted(busy, key=lambda load: (-load.tokens, load.name)))


class RequestLoad:
    """What one request adds to its tenant's load. Made by `TenantLoads`."""

    def __init__(self, tenant: _Tenant, prompt_tokens: int, clock: Callable[[], float]) -> None:
        self._tenant = tenant
        self._prompt_tokens = prompt_tokens
        self._clock = clock
        self._answering = False
        tenant.waiting += 1

    def gained(self, tokens: int) -> None:
        """Some tokens of its answer have come; with the first, its prompt counts too."""
        if not tokens:
            return
        if not self._answering:
            self._answering = True
            self._tenant.waiting -= 1
            self._tenant.answering += 1
            tokens += self._prompt_tokens
        self._tenant.add(int(self._clock()), tokens)

    def end(self) -> None:
        """Nothing more comes of it."""
        if self._answering:
            self._tenant.answering -= 1
        else:
            self._tenant.waiting -= 1


class _Tenant:
    """Requests in flight, and tokens by the second in which they came: a minute of them."""

    def __init__(self) -> None:
        self.answering = self.waiting = 0
        self._seconds: deque[tuple[int, int]] = deque()

    def add(self, second: int, tokens: int) -> None:
        if self._seconds and self._seconds[-1][0] == second:
            tokens += self._seconds.pop()[1]
        self._seconds.append((second, tokens))
        self._forget(second)

    def load(self, name: str, now: float) -> TenantLoad:
        self._forget(int(now))
        return TenantLoad(name, self.answering, self.waiting, sum(tokens for _, tokens in self._seconds))

    def _forget(self, second: int) -> None:
        while self._seconds and self._seconds[0][0] <= second - WINDOW_SECONDS:
            self._seconds.popleft()
