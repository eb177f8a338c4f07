"""`serve`: listens at once, loads the model beside it, answers, drains on SIGINT or SIGTERM, and ends cleanly."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import uvicorn

from kvarn.engine import AsyncLLM
from kvarn.errors import ConfigError, KvarnError
from kvarn.planning import MemoryPlan
from kvarn.request import Pooling
from kvarn.scheduler import Observer
from kvarn.server.app import DEFAULT_MAX_BODY_BYTES, create_app
from kvarn.server.auth import ApiKeys
from kvarn.server.draining import DrainingServer
from kvarn.server.errors import ApiError
from kvarn.server.models import ModelPool, PoolLimits
from kvarn.server.models.budget import Budget, share_out
from kvarn.server.models.hosted import EngineLoader, ModelSpec
from kvarn.server.state import ServerState
from kvarn.server.watching import HttpWatcher

BACKLOG = 2048
"""Connections that the system keeps until the event loop takes them."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What to serve and where. models: at least one; the first is meant where a request names none. port 0: a free one.
    """

    models: tuple[ModelSpec, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """See `ApiKeys`; without, everybody may ask."""
    drain_seconds: float = 30.0
    """How long answers in flight may go on after SIGINT or SIGTERM; then they end with an error."""
    lazy: bool = False
    """Whether the first model, too, is loaded only when it is asked for."""
    memory_budget: int | None = None
    """Bytes that the models may take together; None: what memory_utilization leaves."""
    pool: PoolLimits = field(default_factory=PoolLimits)
    pooling: Pooling = Pooling.MEAN
    """Of embeddings whose request does not say."""

    def __post_init__(self) -> None:
        ApiKeys(self.api_keys)
        if not self.models:
            raise ConfigError("there must be a model to serve")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535, not {self.port}")
        if self.max_body_bytes < 1:
            raise ConfigError(f"max_body_bytes must be at least 1, not {self.max_body_bytes}")
        if not 0 <= self.drain_seconds <= 86400:
            raise ConfigError(f"drain_seconds must be between 0 and 86400, not {self.drain_seconds:g}")


OnListening = Callable[[str], None]
OnBudget = Callable[[Budget], None]
OnPlan = Callable[[str, MemoryPlan], None]
OnReady = Callable[[Sequence[tuple[str, AsyncLLM]], float], None]


@dataclass(frozen=True, slots=True)
class Told:
    """Who is told of a server's start. None of them need do anything.

    listening: the URL, when the port is open. budget: how memory is shared out, where there are several models. plan: a
    model's name and what it takes, in another thread, before its weights are read. ready: the engines in memory and
    the seconds since the start, when requests are answered.
    """

    listening: OnListening = lambda _url: None
    budget: OnBudget = lambda _budget: None
    plan: OnPlan = lambda _name, _plan: None
    ready: OnReady = lambda _engines, _seconds: None


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            reason = "it is in use: stop what listens there or choose another --port"
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}") from error


def serve(
    options: ServeOptions,
    told: Told | None = None,
    *,
    observer: Observer | None = None,
    watchers: Sequence[HttpWatcher] = (),
) -> None:
    """Serves until SIGINT or SIGTERM, and then until what is in flight is answered (see `DrainingServer`).

    While the first model loads, everything but pages and probes answers 503. Raises ConfigError where the port is taken
    or a model does not fit, and what loading the first model raises (KvarnError), after the server has stopped.
    observer: told of every decision and step of the engines, in their threads. watchers: of every request.
    """
    told = told or Told()
    listener = _listen(options.host, options.port)
    budget = share_out(options.models, options.memory_budget)
    loader = EngineLoader(budget.specs, budget.rooms, on_plan=told.plan, observer=observer)
    models = ModelPool(budget.pooled(), loader, budget=budget.num_bytes, limits=options.pool)
    app = create_app(
        None, models=models, max_body_bytes=options.max_body_bytes, api_keys=options.api_keys, pooling=options.pooling,
        watchers=watchers,
    )  # fmt: skip
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", server_header=False)
    server = DrainingServer(config, app.state.server, options.drain_seconds)
    host, port = listener.getsockname()[:2]
    told.listening(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    if budget.num_bytes is not None:
        told.budget(budget)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        failure = runner.run(_run(server, listener, app.state.server, options, told))
    if failure is not None:
        raise failure


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def _run(
    server: uvicorn.Server, listener: socket.socket, state: ServerState, options: ServeOptions, told: Told
) -> Exception | None:
    started = time.perf_counter()

    async def load() -> None:
        if not options.lazy:
            await state.models.load(options.models[0].name)
        state.open()
        if not server.should_exit:
            told.ready(state.engines(), time.perf_counter() - started)

    loading = asyncio.create_task(load())

    def stop_on_failure(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            server.should_exit = True

    loading.add_done_callback(stop_on_failure)
    try:
        await server.serve(sockets=[listener])
    finally:
        await state.models.close()
        await asyncio.gather(loading, return_exceptions=True)
    return _failure(loading.exception())


def _failure(error: BaseException | None) -> Exception | None:
    """What the start failed with; None where it did not, or was ended by a signal."""
    if isinstance(error, ApiError):
        error = error.__cause__
    if error is not None and not isinstance(error, KvarnError):
        logging.getLogger("kvarn.server").error("loading failed", exc_info=error)
    return error if isinstance(error, Exception) else None
