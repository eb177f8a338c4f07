"""What the routes share: the engine, once it is there, its names, and the threads that read requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from kvarn.engine import AsyncLLM
from kvarn.server.body import BodyReader
from kvarn.server.errors import RETRY_SECONDS, ApiError
from kvarn.server.limits import ServerLimits
from kvarn.server.prompts import PromptEncoder
from kvarn.server.refusals import Refusals, limit_names

WORKERS = 2
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Served:
    """A model that answers: its engine, what makes its prompts, and the name to answer with."""

    llm: AsyncLLM
    prompts: PromptEncoder
    name: str


class ServerState:
    """Where the engine comes later, `open` says so; until then `ready` refuses. The engine is not owned."""

    def __init__(self, limits: ServerLimits) -> None:
        self.limits = limits
        self.bodies = BodyReader(limits)
        self.refusals = Refusals(limit_names())
        self.created = int(time.time())
        self.llm: AsyncLLM | None = None
        self.names: tuple[str, ...] = ()
        """Names that requests may give the model; the first is the one it goes by."""
        self._prompts: PromptEncoder | None = None
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="kvarn-server")

    def open(self, llm: AsyncLLM, served_model_names: Sequence[str]) -> None:
        """From now on requests are answered by `llm`, under these names and its own."""
        self.names = tuple(dict.fromkeys((*served_model_names, llm.model_name)))
        self._prompts = PromptEncoder(llm)
        self.llm = llm

    def ready(self) -> AsyncLLM:
        """The engine. Raises ApiError 503 while there is none or it has failed."""
        if self.llm is None:
            raise ApiError(503, "the model is loading", code="loading", headers={"Retry-After": RETRY_SECONDS})
        if not self.llm.is_running:
            raise ApiError(503, "the engine has stopped", code="engine_stopped")
        return self.llm

    async def served(self, name: str | None) -> Served:
        """The model that a request names; None: the first. Raises ApiError 404 for one that is not served here."""
        llm, name = self.ready(), self.check_model(name)
        assert self._prompts is not None
        return Served(llm, self._prompts, name)

    def check_model(self, name: str | None) -> str:
        """The name to answer with, for the name that a request gives the model. Raises ApiError 404."""
        if name is None or name in self.names:
            return name or self.names[0]
        known = " or ".join(self.names)
        message = f"the model {name[:100]!r} is not served here; it is {known}"
        raise ApiError(404, message, param="model", code="model_not_found")

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Runs what may take long (reading a large body, tokenizing it) beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, work)
