"""What the routes share: the models, the door, and the threads that read requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request

from kvarn.engine import AsyncLLM
from kvarn.server.body import BodyReader
from kvarn.server.door import Door
from kvarn.server.errors import RETRY_SECONDS, ApiError
from kvarn.server.limits import ServerLimits
from kvarn.server.load import TenantLoads
from kvarn.server.models import ModelPool
from kvarn.server.models.hosted import HostedModel
from kvarn.server.prompts import PromptEncoder
from kvarn.server.refusals import Refusals, limit_names
from kvarn.server.sse import unless_disconnected

WORKERS = 2
"""Threads of each kind."""
LONG_BODY = 64 << 10
"""Bytes beyond which a body is read, and its prompt is made, by threads of their own."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Served:
    """A model that answers: its engine, what makes its prompts, and the name to answer with."""

    llm: AsyncLLM
    prompts: PromptEncoder
    name: str


class ServerState:
    """Before `open` everybody is refused: the first model is loading. Neither models nor engines are owned."""

    def __init__(
        self, limits: ServerLimits, models: ModelPool[HostedModel], *, watchdog_seconds: float = 0.0
    ) -> None:
        """watchdog_seconds: beyond which an engine that is in one step hangs; 0: none ever does."""
        self.limits = limits
        self._watchdog_seconds = watchdog_seconds
        self.bodies = BodyReader(limits)
        self.refusals = Refusals(limit_names())
        self.models = models
        self.door = Door()
        self.loads = TenantLoads()
        self.created = int(time.time())
        self._is_open = False
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="kvarn-server")
        self._long_workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="kvarn-server-long")

    def open(self) -> None:
        """From now on requests are answered; models that are not in memory are loaded for them."""
        self._is_open = True

    def engines(self) -> list[tuple[str, AsyncLLM]]:
        """The engines in memory, each with the name that its model goes by."""
        return [(name, hosted.llm) for name, hosted in self.models.loaded()]

    def ready(self) -> None:
        """Raises ApiError 503 before requests are answered. That a request's own model is there, `served` sees to."""
        if not self._is_open:
            raise ApiError(503, "the model is loading", code="loading", headers={"Retry-After": RETRY_SECONDS})

    def check_alive(self) -> None:
        """Raises ApiError 503 where an engine hangs, so that nothing but a new process helps."""
        most = self._watchdog_seconds
        for name, llm in self.engines() if most else ():
            seconds = llm.busy_seconds
            if seconds > most:
                message = f"the engine of {name} has been in one step for {seconds:.0f} s, more than {most:g}"
                raise ApiError(503, f"{message} (--watchdog-seconds)", code="engine_stuck")

    def check_ready(self) -> None:
        """Raises ApiError 503 with the reason where no requests should be sent here."""
        retry = {"Retry-After": RETRY_SECONDS}
        self.check_alive()
        if self.door.is_closed:
            raise ApiError(503, "the server is draining", code="draining", headers=retry)
        self.ready()
        for name, llm in self.engines():
            if not llm.is_running:
                raise ApiError(503, f"the engine of {name} has stopped", code="engine_stopped")
            if llm.is_restarting:
                raise ApiError(503, f"the engine of {name} is restarting", code="restarting", headers=retry)

    async def served(self, name: str | None, request: Request, keep_seconds: float | None = None) -> Served:
        """The model that a request names; None: the first. Waits until it is loaded, as long as the client is there; it
        then stays until the request is answered to the end. The request's body must have been read.

        keep_seconds: how long the model stays afterwards, from now on; None: as before.
        Raises ApiError as `ModelPool.acquire` does, and 499.
        """
        lease = self.models.acquire_now(name, keep_seconds)
        if lease is None:
            lease = await unless_disconnected(request.receive, self.models.acquire(name, keep_seconds))
        request.state.ended.callback(lease.release)
        hosted = lease.hosted
        return Served(hosted.llm, hosted.prompts, self.models.check_name(name))

    async def drain(self) -> None:
        """Takes no new requests, and returns when all that came before are answered to the end. `resume` undoes it."""
        self.door.close()
        await self.door.empty()

    def resume(self) -> None:
        """Takes requests again."""
        self.door.open()

    def check_room(self) -> None:
        """Raises QueueFullError where no request gets in, whatever it is: there is one model, and its queue is full."""
        engines = self.engines()
        if len(engines) == len(self.models.statuses()) == 1:
            engines[0][1].check_room()

    async def in_thread(self, work: Callable[[], T], size: int) -> T:
        """Runs what may take long (making a prompt, its tokens) beside the event loop.

        size: bytes of the body that it is about. Long ones wait for each other only, so that they hold up no others.
        """
        workers = self._long_workers if size > LONG_BODY else self._workers
        return await asyncio.get_running_loop().run_in_executor(workers, work)
