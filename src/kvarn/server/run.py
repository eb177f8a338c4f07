"""`serve`: listens at once, loads the model beside it, answers, and ends cleanly on SIGINT or SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn

from kvarn.config import EngineConfig
from kvarn.engine import AsyncLLM
from kvarn.errors import ConfigError, KvarnError
from kvarn.planning import MemoryPlan
from kvarn.scheduler import Observer
from kvarn.server.admin import AdminOptions, admin_server
from kvarn.server.app import create_app
from kvarn.server.connection import bounded_protocol
from kvarn.server.cors import check_origins
from kvarn.server.keys.ring import KeyRing
from kvarn.server.limits import ServerLimits
from kvarn.server.listening import Tls, listen, url_of
from kvarn.server.logs import FORMATS, configure_logging
from kvarn.server.state import ServerState

GRACE_SECONDS = 5
"""How long answers in flight may go on after SIGINT or SIGTERM; then they end with an error event."""
CLOSING_SECONDS = 5
"""How long the connections may take after that."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What to serve and where. port 0: a free one. served_model_names: the first is told, all are understood."""

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_names: tuple[str, ...] = ()
    limits: ServerLimits = field(default_factory=ServerLimits)
    engine: EngineConfig = field(default_factory=EngineConfig)
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Keys that are good, each a tenant's; without these and a file of keys everybody may ask."""
    keys_file: Path | None = None
    """More keys; see `kvarn.server.keys.file`."""
    metrics_open: bool = False
    """Whether /metrics needs no key."""
    log_format: str = "text"
    """One of `kvarn.server.logs.FORMATS`."""
    access_log: bool = True
    """Whether each finished request is logged."""
    cors_origins: tuple[str, ...] = ()
    """Pages of which origins may ask; see `kvarn.server.cors`."""
    tls: Tls = field(default_factory=Tls)
    admin: AdminOptions = field(default_factory=AdminOptions)

    def __post_init__(self) -> None:
        self.key_ring()
        check_origins(self.cors_origins)
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535, not {self.port}")
        if self.log_format not in FORMATS:
            raise ConfigError(f"log_format must be one of {', '.join(FORMATS)}, not {self.log_format!r}")

    def key_ring(self) -> KeyRing:
        """Who may ask. Raises ConfigError."""
        with_priorities = self.engine.scheduler.policy == "priority"
        return KeyRing(self.api_keys, self.keys_file, with_priorities=with_priorities)


class _Server(uvicorn.Server):
    """uvicorn's server, but a signal ends the process with exit code 0, and no stream is cut without a word."""

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config)
        self._state = state

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends the server in its own time, a second SIGINT at once."""
        del frame
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Lets answers finish for a while, then fails those that are left, which their clients are told."""
        closing = asyncio.create_task(self._close_engine())
        try:
            await super().shutdown(sockets)
        finally:
            closing.cancel()
            await asyncio.gather(closing, return_exceptions=True)

    async def _close_engine(self) -> None:
        await asyncio.sleep(GRACE_SECONDS)
        if self._state.llm is not None:
            await self._state.llm.close()


OnListening = Callable[[str], None]
OnPlan = Callable[[MemoryPlan], None]
OnReady = Callable[[AsyncLLM, float], None]


def serve(
    options: ServeOptions,
    *,
    on_listening: OnListening | None = None,
    on_plan: OnPlan = lambda _plan: None,
    on_ready: OnReady | None = None,
    observer: Observer | None = None,
) -> None:
    """Serves until SIGINT or SIGTERM; streams in flight get a few seconds to finish.

    While the model loads, everything but the pages answers 503. on_listening(url) is called when the port is open,
    on_plan(plan) in another thread before weights are read, on_ready(engine, seconds since start) when requests are
    answered. Raises ConfigError where the port is taken, and what loading raises (KvarnError), after the server has
    stopped. observer: told of every decision and step of the engine, in its thread.
    """
    admin = options.admin
    listener = listen(options.host, options.port)
    admin_listener = None if admin.port is None else listen(admin.host, admin.port, "--admin-port")
    app = create_app(
        None, limits=options.limits, keys=options.key_ring(), metrics_open=options.metrics_open,
        cors_origins=options.cors_origins,
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
        timeout_graceful_shutdown=GRACE_SECONDS + CLOSING_SECONDS,
        ssl_certfile=options.tls.cert,
        ssl_keyfile=options.tls.key,
    )
    server = _Server(config, app.state.server)
    if on_listening is not None:
        on_listening(url_of(listener, options.tls.scheme))
    if admin_listener is not None:
        logging.getLogger("kvarn.server").info("admin routes on %s", url_of(admin_listener, options.tls.scheme))
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        state = app.state.server
        failure = runner.run(_run(server, listener, admin_listener, state, options, on_plan, on_ready, observer))
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
    on_plan: OnPlan,
    on_ready: OnReady | None,
    observer: Observer | None,
) -> Exception | None:
    started = time.perf_counter()

    async def load() -> None:
        llm = await asyncio.to_thread(
            AsyncLLM.from_model, options.model, options.engine, on_plan=on_plan, observer=observer
        )
        state.open(llm, options.served_model_names)
        if on_ready is not None and not server.should_exit:
            on_ready(llm, time.perf_counter() - started)

    loading = asyncio.create_task(load())

    def stop_on_failure(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            server.should_exit = True

    loading.add_done_callback(stop_on_failure)
    try:
        async with admin_server(state, options.admin, admin_listener, options.tls):
            await server.serve(sockets=[listener])
    finally:
        await asyncio.gather(loading, return_exceptions=True)
        if state.llm is not None:
            await state.llm.close()
    error = loading.exception()
    if error is not None and not isinstance(error, KvarnError):
        logging.getLogger("kvarn.server").error("loading failed", exc_info=error)
    return error if isinstance(error, Exception) else None
