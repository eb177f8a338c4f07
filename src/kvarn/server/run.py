"""`serve`: listens at once, loads the model beside it, answers, drains on SIGINT or SIGTERM, and ends cleanly."""

from __future__ import annotations

import asyncio
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
from kvarn.server.access import AccessOptions
from kvarn.server.admin import AdminOptions, admin_server
from kvarn.server.app import create_app
from kvarn.server.connection import bounded_protocol
from kvarn.server.draining import DrainingServer
from kvarn.server.errors import ApiError
from kvarn.server.keys.ring import KeyRing
from kvarn.server.limits import ServerLimits
from kvarn.server.listening import listen, url_of
from kvarn.server.logs import FORMATS, configure_logging
from kvarn.server.models import ModelPool, PoolLimits
from kvarn.server.models.budget import Budget, share_out
from kvarn.server.models.hosted import EngineLoader, ModelSpec
from kvarn.server.state import ServerState
from kvarn.server.watching import HttpWatcher

logger = logging.getLogger("kvarn.server")


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What to serve and where. models: at least one; the first is meant where a request names none. port 0: a free one.
    """

    models: tuple[ModelSpec, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    limits: ServerLimits = field(default_factory=ServerLimits)
    access: AccessOptions = field(default_factory=AccessOptions)
    admin: AdminOptions = field(default_factory=AdminOptions)
    log_format: str = "text"
    """One of `kvarn.server.logs.FORMATS`."""
    access_log: bool = True
    """Whether each finished request is logged."""
    drain_seconds: float = 30.0
    """How long answers in flight may go on after SIGINT or SIGTERM; then they end with an error."""
    lazy: bool = False
    """Whether the first model, too, is loaded only when it is asked for."""
    memory_budget: int | None = None
    """Bytes that the models may take together; None: what memory_utilization leaves."""
    pool: PoolLimits = field(default_factory=PoolLimits)
    pooling: Pooling = Pooling.MEAN
    """Of embeddings whose request does not say."""
    watchdog_seconds: float = 0.0
    """How long an engine may be in one step until /health/live says that it hangs; 0: for ever."""

    def __post_init__(self) -> None:
        self.key_ring()
        if not self.models:
            raise ConfigError("there must be a model to serve")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535, not {self.port}")
        if self.log_format not in FORMATS:
            raise ConfigError(f"log_format must be one of {', '.join(FORMATS)}, not {self.log_format!r}")
        if not 0 <= self.drain_seconds <= 86400:
            raise ConfigError(f"drain_seconds must be between 0 and 86400, not {self.drain_seconds:g}")
        if not 0 <= self.watchdog_seconds <= 86400:
            raise ConfigError(f"watchdog_seconds must be between 0 and 86400, not {self.watchdog_seconds:g}")

    def key_ring(self) -> KeyRing:
        """Who may ask. Raises ConfigError."""
        with_priorities = all(spec.engine.scheduler.policy == "priority" for spec in self.models)
        return KeyRing(self.access.api_keys, self.access.keys_file, with_priorities=with_priorities)


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
    access, admin = options.access, options.admin
    listener = listen(options.host, options.port)
    admin_listener = None if admin.port is None else listen(admin.host, admin.port, "--admin-port")
    budget = share_out(options.models, options.memory_budget)
    loader = EngineLoader(budget.specs, budget.rooms, on_plan=told.plan, observer=observer)
    models = ModelPool(budget.pooled(), loader, budget=budget.num_bytes, limits=options.pool)
    app = create_app(
        None, models=models, limits=options.limits, keys=options.key_ring(), metrics_open=access.metrics_open,
        cors_origins=access.cors_origins, pooling=options.pooling, watchers=watchers,
        watchdog_seconds=options.watchdog_seconds,
    )  # fmt: skip
    configure_logging(options.log_format, access=options.access_log)
    config = uvicorn.Config(
        app,
        http=bounded_protocol(options.limits, app.state.server.refusals),
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        ssl_certfile=access.tls.cert,
        ssl_keyfile=access.tls.key,
    )
    server = DrainingServer(config, app.state.server, options.drain_seconds)
    told.listening(url_of(listener, access.tls.scheme))
    if admin_listener is not None:
        logger.info("admin routes on %s", url_of(admin_listener, access.tls.scheme))
    if budget.num_bytes is not None:
        told.budget(budget)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        failure = runner.run(_run(server, listener, admin_listener, app.state.server, options, told))
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
    server: uvicorn.Server,
    listener: socket.socket,
    admin_listener: socket.socket | None,
    state: ServerState,
    options: ServeOptions,
    told: Told,
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
        async with admin_server(state, options.admin, admin_listener, options.access.tls):
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
        logger.error("loading failed", exc_info=error)
    return error if isinstance(error, Exception) else None
