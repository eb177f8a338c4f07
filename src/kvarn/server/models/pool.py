"""`ModelPool`: loads models when they are asked for, within one memory budget, and unloads those used least lately."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic

from kvarn.errors import ConfigError
from kvarn.server.errors import ApiError, to_api_error
from kvarn.server.keep_alive import FOREVER
from kvarn.server.models.pooled import H, Lease, Loader, ModelState, ModelStatus, Place, PooledModel, Waiter

logger = logging.getLogger("kvarn.server")
RETRY_SECONDS = 10.0
"""After a load has failed, how long requests are told so before the next one has it tried again."""


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """max_waiting: requests that wait for models to be loaded, of all models together. wait_seconds: for how long.
    keep_seconds: how long a model stays after its last request, where neither it nor its requests say otherwise."""

    max_waiting: int = 256
    wait_seconds: float = 120.0
    keep_seconds: float = FOREVER

    def __post_init__(self) -> None:
        if self.max_waiting < 1:
            raise ConfigError(f"max_waiting_for_load must be at least 1, not {self.max_waiting}")
        if not 0 < self.wait_seconds < math.inf:
            raise ConfigError(f"load_timeout must be above 0, not {self.wait_seconds}")
        if not self.keep_seconds >= 0:
            raise ConfigError(f"idle_unload must be at least 0, not {self.keep_seconds}")


class ModelPool(Generic[H]):
    """Models by name. What they take together never exceeds the budget, also while one is loaded or unloaded.

    All methods belong to one event loop, whose clock it goes by. One model is loaded at a time, in the order in which
    they were first asked for. Where there is no room, those go that were used least lately, first those that nobody
    has; one that somebody has takes no new requests then, and goes when the last has ended, so that no stream of
    requests keeps others out for ever.
    """

    def __init__(
        self, models: Sequence[PooledModel], loader: Loader[H], *, budget: int | None = None,
        limits: PoolLimits | None = None,
    ) -> None:  # fmt: skip
        """models: the first is the one that is meant where no name is given. budget: bytes; None: no bound.

        Raises ConfigError where a name is given twice, or a model takes more than the budget.
        """
        self._loader = loader
        self.budget = budget
        """Bytes that the models may take together; None: no bound."""
        self._most = math.inf if budget is None else budget
        self._limits = limits or PoolLimits()
        self._places: list[Place[H]] = []
        self._names: dict[str, Place[H]] = {}
        for model in models:
            if model.num_bytes > self._most:
                raise ConfigError(f"{model.name} takes {model.num_bytes} bytes, but the budget is {budget}")
            keep = self._limits.keep_seconds if model.keep_seconds is None else model.keep_seconds
            self._places.append(Place(model, keep))
            for name in dict.fromkeys((model.name, *model.aliases)):
                if name in self._names:
                    raise ConfigError(f"the name {name!r} is given to two models")
                self._names[name] = self._places[-1]
        self._queue: deque[Place[H]] = deque()
        """To be loaded, the first of them now, or once there is room."""
        self._being_loaded: Place[H] | None = None
        self._news = asyncio.Event()
        """Something has changed that a load may wait for."""
        self._worker: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def names(self) -> tuple[str, ...]:
        """All names, each model's own before its aliases."""
        return tuple(self._names)

    def check_name(self, name: str | None) -> str:
        """The name to answer with: the given one, or the first. Raises ApiError 404."""
        if name is None:
            return self.names[0]
        if name not in self._names:
            known = ", ".join(self.names)
            message = f"the model {name[:100]!r} is not served here; known: {known}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return name

    def statuses(self) -> list[ModelStatus]:
        """A snapshot of each model, in the order given."""
        return [place.status() for place in self._places]

    def status(self, name: str) -> ModelStatus:
        """Of one model, by any of its names. Raises ApiError 404."""
        return self._names[self.check_name(name)].status()

    def loaded(self) -> list[tuple[str, H]]:
        """The models in memory and what they go by, in the order given."""
        return [(place.model.name, place.hosted) for place in self._places if place.hosted is not None]

    @property
    def held_bytes(self) -> int:
        """What the models take that are loaded, being loaded or being unloaded."""
        return sum(place.model.num_bytes for place in self._places if place.is_held or place is self._being_loaded)

    def adopt(self, name: str, hosted: H) -> None:
        """Takes a model that is in memory already. Before anything is asked for."""
        place = self._names[name]
        place.hosted, place.state = hosted, ModelState.LOADED

    async def acquire(self, name: str | None, keep_seconds: float | None = None) -> Lease[H]:
        """The model, once it is loaded. keep_seconds: how long it stays after its last request from now on; None: as
        before.

        Raises ApiError: 404 for a name that nothing has, 429 where too many wait, 503 where it does not come in time,
        cannot be loaded, or has failed.
        """
        return await self._acquire(self._names[self.check_name(name)], keep_seconds, self._limits.wait_seconds)

    async def _acquire(self, place: Place[H], keep_seconds: float | None, seconds: float | None) -> Lease[H]:
        if place.state is ModelState.LOADED:
            return self._lease(place, keep_seconds)
        self._check_waiting(place)
        waiter: Waiter[H] = Waiter(asyncio.get_running_loop().create_future(), keep_seconds)
        place.waiters.append(waiter)
        self._want(place)
        try:
            async with asyncio.timeout(seconds):
                return await waiter.lease
        except BaseException as error:
            if not self._withdrawn(place, waiter):
                waiter.lease.result().release()  # it came in the same moment
            if isinstance(error, TimeoutError):
                raise self._unavailable(place, "was not loaded in time (--load-timeout)") from None
            raise

    def _check_waiting(self, place: Place[H]) -> None:
        """Raises ApiError where a request may not wait for the model."""
        if self._closed:
            raise self._unavailable(place, "is gone: the server ends")
        left = place.retry_at - asyncio.get_running_loop().time()
        if place.state is ModelState.FAILED and left > 0:
            raise self._unavailable(place, f"cannot be loaded: {place.failure}", left)
        waiting = sum(len(other.waiters) for other in self._places)
        if waiting >= self._limits.max_waiting:
            message = f"{waiting} requests wait for models to be loaded, the limit is {self._limits.max_waiting}"
            message += " (--max-waiting-for-load); try again later"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})

    def _withdrawn(self, place: Place[H], waiter: Waiter[H]) -> bool:
        """Whether somebody who does not wait any more got nothing."""
        if waiter in place.waiters:
            place.waiters.remove(waiter)
        self._news.set()
        return waiter.lease.cancelled() or not waiter.lease.done() or waiter.lease.exception() is not None

    @staticmethod
    def _unavailable(place: Place[H], what: str, retry: float = 1.0) -> ApiError:
        headers = {"Retry-After": str(max(1, math.ceil(retry)))}
        return ApiError(503, f"the model {place.model.name} {what}", code="model_unavailable", headers=headers)

    async def load(self, name: str) -> None:
        """Has a model loaded, again where its engine has failed; it then stays as if a request had ended. Waits for as
        long as that takes. Raises ApiError as `acquire` does, from what loading raised."""
        place = self._names[self.check_name(name)]
        place.retry_at = 0.0
        if place.status().state is ModelState.FAILED:
            await self.unload(name)
        (await self._acquire(place, None, None)).release()

    async def unload(self, name: str) -> None:
        """Unloads a model, once the requests that have it have ended. Raises ApiError 404, 409 while it is loading."""
        place = self._names[self.check_name(name)]
        if place.state is ModelState.LOADING:
            raise ApiError(409, f"the model {place.model.name} is being loaded", code="model_loading")
        if place.state is ModelState.LOADED:
            self._leave(place)
        if place.state is ModelState.UNLOADING:
            unloaded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            place.unloaded.append(unloaded)
            await unloaded

    async def close(self) -> None:
        """Unloads all models, at once: who has one is told by its engine. Who waits gets ApiError 503. Idempotent."""
        self._closed = True
        for place in self._places:
            place.stay()
            self._refuse_waiters(place, self._unavailable(place, "is gone: the server ends"))
        self._news.set()
        if self._worker is not None:
            await self._worker
        for place in self._places:
            if place.hosted is not None and not place.is_closing:
                self._start_closing(place)
        await asyncio.gather(*self._closing)

    def _lease(self, place: Place[H], keep_seconds: float | None) -> Lease[H]:
        hosted = place.hosted
        assert hosted is not None
        if not hosted.is_running:
            raise ApiError(503, f"the engine of {place.model.name} has stopped", code="engine_stopped")
        place.in_flight += 1
        place.last_used = asyncio.get_running_loop().time()
        place.stay()
        if keep_seconds is not None:
            place.keep_seconds = keep_seconds
        return Lease(place.model.name, hosted, lambda: self._released(place))

    def _released(self, place: Place[H]) -> None:
        place.in_flight -= 1
        place.last_used = asyncio.get_running_loop().time()
        if place.in_flight == 0:
            self._unused(place)

    def _unused(self, place: Place[H]) -> None:
        """Nobody has it: it goes now, later, or stays."""
        self._news.set()
        if place.state is ModelState.UNLOADING and not place.is_closing:
            self._start_closing(place)
        elif place.state is ModelState.LOADED and place.keep_seconds == 0:
            self._leave(place)
        elif place.state is ModelState.LOADED and place.keep_seconds < FOREVER:
            place.timer = asyncio.get_running_loop().call_later(place.keep_seconds, self._leave, place)

    def _leave(self, place: Place[H]) -> None:
        place.state = ModelState.UNLOADING
        place.stay()
        if place.in_flight == 0:
            self._start_closing(place)

    def _start_closing(self, place: Place[H]) -> None:
        place.stay()
        place.is_closing = True
        place.state = ModelState.UNLOADING
        task = asyncio.get_running_loop().create_task(self._close(place))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close(self, place: Place[H]) -> None:
        assert place.hosted is not None
        try:
            await place.hosted.close()
        except Exception:
            logger.exception("the model %s could not be closed", place.model.name)
        place.hosted, place.is_closing, place.state = None, False, ModelState.UNLOADED
        logger.info("unloaded %s", place.model.name)
        unloaded, place.unloaded = place.unloaded, []
        for future in unloaded:
            if not future.done():
                future.set_result(None)
        self._news.set()
        if place.is_wanted:
            self._want(place)

    def _want(self, place: Place[H]) -> None:
        """Has it loaded, where that is not under way."""
        if place.state not in (ModelState.UNLOADED, ModelState.FAILED) or self._closed:
            return
        place.state = ModelState.LOADING
        self._queue.append(place)
        if self._worker is None:
            self._worker = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        """Loads what is wanted, one after the other."""
        while self._queue:
            place = self._queue[0]
            if await self._make_room(place):
                await self._load(place)
            else:
                place.state = ModelState.UNLOADED
            self._queue.popleft()
        self._worker = None

    async def _make_room(self, place: Place[H]) -> bool:
        """Has others unloaded until the model fits; False where meanwhile nobody wants it any more."""
        leaving: list[Place[H]] = []
        while place.is_wanted and not self._closed:
            missing = place.model.num_bytes - (self._most - self.held_bytes)
            if missing <= 0:
                break
            missing -= sum(other.model.num_bytes for other in self._places if other.state is ModelState.UNLOADING)
            for victim in self._least_used():
                if missing <= 0:
                    break
                missing -= victim.model.num_bytes
                leaving.append(victim)
                self._leave(victim)
            self._news.clear()
            await self._news.wait()
        self._stay_after_all(leaving)
        return place.is_wanted and not self._closed

    def _least_used(self) -> list[Place[H]]:
        """Those that may be told to go, in that order."""
        loaded = [place for place in self._places if place.state is ModelState.LOADED]
        return sorted(loaded, key=lambda place: (place.in_flight > 0, place.last_used))

    def _stay_after_all(self, leaving: Iterable[Place[H]]) -> None:
        """Those that have not gone yet stay, as their room is not needed, unless somebody asked that they go."""
        for place in leaving:
            runs = place.hosted is not None and place.hosted.is_running
            if runs and place.state is ModelState.UNLOADING and not (place.is_closing or place.unloaded):
                place.state = ModelState.LOADED
                self._serve_waiters(place)

    async def _load(self, place: Place[H]) -> None:
        self._being_loaded = place
        try:
            hosted = await self._loader.load(place.model.name)
        except Exception as error:
            told = to_api_error(error)
            place.state, place.failure = ModelState.FAILED, told.message
            place.retry_at = asyncio.get_running_loop().time() + RETRY_SECONDS
            logger.error("%s could not be loaded: %s", place.model.name, told.message)
            refusal = self._unavailable(place, f"cannot be loaded: {told.message}", RETRY_SECONDS)
            refusal.__cause__ = error
            self._refuse_waiters(place, refusal)
        else:
            place.hosted, place.state, place.failure = hosted, ModelState.LOADED, ""
            place.loads += 1
            keep = place.model.keep_seconds
            place.keep_seconds = self._limits.keep_seconds if keep is None else keep
            place.last_used = asyncio.get_running_loop().time()
            self._serve_waiters(place)
        finally:
            self._being_loaded = None

    def _serve_waiters(self, place: Place[H]) -> None:
        waiters, place.waiters = place.waiters, deque()
        for waiter in waiters:
            if waiter.lease.done():
                continue
            try:
                waiter.lease.set_result(self._lease(place, waiter.keep_seconds))
            except ApiError as error:
                waiter.lease.set_exception(error)
        if place.in_flight == 0:
            self._unused(place)

    def _refuse_waiters(self, place: Place[H], error: ApiError) -> None:
        waiters, place.waiters = place.waiters, deque()
        for waiter in waiters:
            if not waiter.lease.done():
                waiter.lease.set_exception(error)
