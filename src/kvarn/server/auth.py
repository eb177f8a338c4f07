"""Who asks: the key of a request, and the account that it is held against."""

from __future__ import annotations

from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from kvarn.server.errors import ApiError
from kvarn.server.keys.account import Account
from kvarn.server.keys.ring import KeyRing
from kvarn.server.record import RequestRecord

HEALTH = "/health"
"""It and what is below it needs no key: who asks is a machine that knows none."""
FREE_METHODS = ("GET", "HEAD", "OPTIONS")
"""Their requests tell and compute nothing, so they count neither as requests of a key nor for its concurrency."""


class Authentication:
    """ASGI middleware: where keys are set, every route needs one but for health and those that are left open.

    `request.state.visit` is what the request takes of its key's account.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, open_paths: Collection[str]) -> None:
        """open_paths: of what anybody may see."""
        self._app = app
        self._keys = keys
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on. Raises ApiError 401 without a good key, 429 where the key's limits are reached."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        account = self._account(scope)
        record: RequestRecord = scope["state"]["record"]
        record.key, record.more_headers = account.name, account.headers
        visit = account.begin(counted=scope["method"] not in FREE_METHODS)
        scope["state"]["visit"] = visit
        try:
            await self._app(scope, receive, send)
        finally:
            visit.end(record.tokens)

    def _account(self, scope: Scope) -> Account:
        path = scope["path"]
        if not self._keys or path in self._open_paths or path == HEALTH or path.startswith(f"{HEALTH}/"):
            return self._keys.open
        account = self._keys.find(key_of(scope))
        if account is None:
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY, or as x-api-key: KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return account


def key_of(scope: Scope) -> str:
    """The key that the request brings, as OpenAI's or as Anthropic's clients do; empty where it brings none, or two."""
    given = set()
    for name, value in scope["headers"]:
        text = value.decode("latin-1")
        if name == b"x-api-key":
            given.add(text.strip())
        elif name == b"authorization":
            scheme, _, key = text.partition(" ")
            given.add(key.strip() if scheme.lower() == "bearer" else "")
    return given.pop() if len(given) == 1 else ""
