"""What a `ModelPool` keeps of a model, and what it asks of those who load it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, NamedTuple, Protocol, TypeVar


class Hosted(Protocol):
    """A model in memory."""

    @property
    def is_running(self) -> bool:
        """False once it has failed for good."""
        ...

    async def close(self) -> None:
        """Releases all that it holds. The pool calls it once, when no request has a lease."""
        ...


H = TypeVar("H", bound=Hosted)
H_co = TypeVar("H_co", bound=Hosted, covariant=True)


class Loader(Protocol[H_co]):
    """Brings models into memory."""

    async def load(self, name: str) -> H_co:
        """Loads a model, by the name it goes by. One at a time; may be waited for in vain, but is never cancelled."""
        ...


class ModelState(StrEnum):
    """Where a model is."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    """Or waiting until there is room."""
    LOADED = "loaded"
    UNLOADING = "unloading"
    """New requests wait until it is loaded again; those that it has are answered first."""
    FAILED = "failed"
    """It could not be loaded, or its engine has stopped."""


@dataclass(frozen=True, slots=True)
class PooledModel:
    """A model that may be asked for. num_bytes: what it takes in memory when it is loaded."""

    name: str
    num_bytes: int = 0
    aliases: tuple[str, ...] = ()
    """Other names for it."""
    max_model_len: int | None = None
    """Tokens of its longest sequence; None: not known before it is loaded."""
    keep_seconds: float | None = None
    """How long it stays after its last request; None: what holds for all."""


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A snapshot of a model."""

    name: str
    aliases: tuple[str, ...]
    state: ModelState
    num_bytes: int
    max_model_len: int | None
    in_flight: int
    """Requests that have it."""
    waiting: int
    """Requests that wait for it to be loaded."""
    loads: int
    """How often it was loaded."""
    keep_seconds: float
    """How long it stays after its last request."""
    reason: str
    """Why it has failed; empty where it has not."""


class Lease(Generic[H]):
    """A model that cannot be unloaded until the lease is released."""

    def __init__(self, name: str, hosted: H, release: Callable[[], None]) -> None:
        self.name = name
        """What the model goes by."""
        self.hosted = hosted
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Gives it back. Idempotent. In the pool's event loop."""
        if self._release is not None:
            release, self._release = self._release, None
            release()


class Waiter(NamedTuple, Generic[H]):
    """Somebody who waits for a model, and how long it is to stay afterwards; None: as it was."""

    lease: asyncio.Future[Lease[H]]
    keep_seconds: float | None


@dataclass(slots=True, eq=False)
class Place(Generic[H]):
    """A pool's book on one model. Changed by the pool alone."""

    model: PooledModel
    keep_seconds: float
    state: ModelState = ModelState.UNLOADED
    hosted: H | None = None
    in_flight: int = 0
    last_used: float = 0.0
    """When a lease was last given or given back, by the event loop's clock."""
    loads: int = 0
    failure: str = ""
    retry_at: float = 0.0
    """After a failure, when to try again."""
    is_closing: bool = False
    """UNLOADING, and nobody has it any more."""
    timer: asyncio.TimerHandle | None = None
    """Ends its stay."""
    waiters: deque[Waiter[H]] = field(default_factory=deque)
    unloaded: list[asyncio.Future[None]] = field(default_factory=list)
    """Told when it is unloaded."""

    @property
    def is_wanted(self) -> bool:
        """Whether anybody still waits for it."""
        return any(not waiter.lease.done() for waiter in self.waiters)

    @property
    def is_held(self) -> bool:
        """Whether its memory is taken, or about to be."""
        return self.state in (ModelState.LOADED, ModelState.UNLOADING)

    def stay(self) -> None:
        """Ends the countdown."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def status(self) -> ModelStatus:
        """A snapshot."""
        stopped = self.state is ModelState.LOADED and self.hosted is not None and not self.hosted.is_running
        return ModelStatus(
            self.model.name,
            self.model.aliases,
            ModelState.FAILED if stopped else self.state,
            self.model.num_bytes,
            self.model.max_model_len,
            self.in_flight,
            sum(not waiter.lease.done() for waiter in self.waiters),
            self.loads,
            self.keep_seconds,
            "its engine has stopped" if stopped else self.failure,
        )
