"""The admin listener: a second, small application on an address of its own, by default this machine's alone."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import re
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from kvarn import __version__
from kvarn.errors import ConfigError
from kvarn.server import errors
from kvarn.server.auth import key_of
from kvarn.server.connection import bounded_protocol
from kvarn.server.errors import ApiError
from kvarn.server.front import Front
from kvarn.server.listening import Tls, is_loopback
from kvarn.server.routes.admin import add_admin_routes
from kvarn.server.routes.life import add_life_routes
from kvarn.server.state import ServerState

_HOST = re.compile(r"(\[[^\[\]]*\]|[^:]*)(?::[0-9]*)?")
"""A Host header: the name or address, and perhaps a port."""


@dataclass(frozen=True, slots=True)
class AdminOptions:
    """Where to listen. port None: nowhere; 0: a free one. Raises ConfigError."""

    host: str = "127.0.0.1"
    port: int | None = None
    key: str = field(default="", repr=False)
    """That every request must bring; may be left out where only this machine can ask."""

    def __post_init__(self) -> None:
        if self.port is not None and not 0 <= self.port <= 65535:
            raise ConfigError(f"admin_port must be between 0 and 65535, not {self.port}")
        if self.port is not None and not self.key and not is_loopback(self.host):
            raise ConfigError(
                f"admin_host {self.host} is open to others: give an --admin-key (or KVARN_ADMIN_KEY), or leave it at "
                "127.0.0.1"
            )
        if not self.key.isascii() or not self.key.isprintable() or self.key != self.key.strip():
            raise ConfigError("admin_key must be printable ASCII characters, no space first or last")


def create_admin_app(state: ServerState, options: AdminOptions) -> FastAPI:
    """The application over the state of the server that is administered."""
    app = FastAPI(title="kvarn admin", version=__version__, docs_url=None, redoc_url=None)
    app.state.server = state
    errors.install(app)
    app.add_middleware(AdminGuard, options=options)
    app.add_middleware(Front, state=state, quiet=())
    add_admin_routes(app, state)
    add_life_routes(app, state)
    return app


class AdminGuard:
    """ASGI middleware: lets requests with the key in; where there is none, those of this machine's own programs.

    A browser on this machine reaches the listener too, and with it every page that it shows: so without a key, what a
    page sends is refused (it has an Origin), and what comes by a name that somebody else may have pointed here.
    """

    def __init__(self, app: ASGIApp, options: AdminOptions) -> None:
        self._app = app
        self._options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on. Raises ApiError 401, 403."""
        if scope["type"] == "http":
            self._check(scope)
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        if self._options.key:
            given = key_of(scope).encode("utf-8", "surrogateescape")
            if not hmac.compare_digest(given, self._options.key.encode()):
                message = "the admin key is missing or wrong; send it as Authorization: Bearer KEY"
                raise ApiError(401, message, code="invalid_admin_key", headers={"WWW-Authenticate": "Bearer"})
            return
        headers = dict(scope["headers"])
        host = _HOST.fullmatch(headers.get(b"host", b"").decode("latin-1"))
        if b"origin" in headers or host is None or not is_loopback(host[1]):
            message = "without an admin key no page, and no name but this machine's own, is let in"
            raise ApiError(403, message, code="not_local")


class _Beside(uvicorn.Server):
    """A server beside another one in the same event loop, whose business signals are."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


@contextlib.asynccontextmanager
async def admin_server(
    state: ServerState, options: AdminOptions, listener: socket.socket | None, tls: Tls
) -> AsyncIterator[None]:
    """Serves the admin routes while the context lasts; nothing where there is no listener, which is owned."""
    if listener is None:
        yield
        return
    config = uvicorn.Config(
        create_admin_app(state, options),
        http=bounded_protocol(state.limits, state.refusals),
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=1,
        ssl_certfile=tls.cert,
        ssl_keyfile=tls.key,
    )
    server = _Beside(config)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await asyncio.gather(running, return_exceptions=True)
