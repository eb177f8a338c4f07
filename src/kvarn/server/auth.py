"""API keys: who may ask, and whose request it is."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from kvarn.errors import ConfigError
from kvarn.server.errors import ApiError

MAX_KEYS = 1024
MAX_KEY_CHARS = 512
GUARDED = "/v1/"
"""What needs a key; pages, /health and /metrics do not."""


class ApiKeys:
    """The keys that are good, each the key of one tenant. Holds digests only.

    A tenant is named by a digest of its key, so that the name says nothing of the key and stays the same when the
    server is started again with its keys in another order.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        """Raises ConfigError for a key that is empty, too long, not printable ASCII, or given twice. Never shows it."""
        if len(keys) > MAX_KEYS:
            raise ConfigError(f"api_key: there may be at most {MAX_KEYS} keys, not {len(keys)}")
        for number, key in enumerate(keys, 1):
            if not 1 <= len(key) <= MAX_KEY_CHARS or not (key.isascii() and key.isprintable()) or key != key.strip():
                must = f"1 to {MAX_KEY_CHARS} printable ASCII characters, no space first or last"
                raise ConfigError(f"api_key number {number} must be {must}")
            if key in keys[: number - 1]:
                raise ConfigError(f"api_key number {number} is given twice")
        self._tenants = [(_digest("key", key), _digest("tenant", key)[:8].hex()) for key in keys]

    def __bool__(self) -> bool:
        """Whether there are any; without, everybody may ask, and all are one tenant."""
        return bool(self._tenants)

    def tenant(self, key: str) -> str | None:
        """Whose key it is; None for one that is not good. Takes the same time whichever it is."""
        given, found = _digest("key", key), None
        for digest, tenant in self._tenants:
            if hmac.compare_digest(digest, given):
                found = tenant
        return found


def _digest(purpose: str, key: str) -> bytes:
    return hmac.new(key.encode("utf-8", "surrogateescape"), f"kvarn {purpose}".encode(), hashlib.sha256).digest()


class Authentication:
    """ASGI middleware: routes under `GUARDED` need `Authorization: Bearer KEY`, and are told the tenant.

    It is in `request.state.tenant`; the empty string where no keys are set.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or raises ApiError 401."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        tenant: str | None = ""
        if self._keys and scope["path"].startswith(GUARDED):
            tenant = self._keys.tenant(_bearer(scope))
        if tenant is None:
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        scope.setdefault("state", {})["tenant"] = tenant
        await self._app(scope, receive, send)


def _bearer(scope: Scope) -> str:
    """The key that the request brings; empty where it brings none."""
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    scheme, _, key = values[0].decode("latin-1").partition(" ") if len(values) == 1 else ("", "", "")
    return key.strip() if scheme.lower() == "bearer" else ""
