"""Requests over HTTP, streamed; what comes is kept with the time it came, and read only when the load is over.

aiohttp (the extra `bench`): 40 µs of processor time for an event that comes alone, httpx 110 (two cores that the server
shares, 32 streams, uvloop).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from kvarn.errors import ConfigError, KvarnError

if TYPE_CHECKING:
    import aiohttp

    from kvarn.bench.serve.datasets import Prompt

ENDPOINTS = {"chat": "/chat/completions", "completions": "/completions"}
MAX_ANSWER_BYTES = 64 << 20
MAX_HEAD_BYTES = 65_536
KEEP_ALIVE_SECONDS = 2.0
"""Servers close idle connections after some seconds (uvicorn: 5), and a request on one just being closed is lost."""

CONNECT, TIMEOUT, DISCONNECTED, TRUNCATED, TOO_LONG = "connect", "timeout", "disconnected", "truncated", "too long"


class ServerError(KvarnError):
    """The server did not answer as an OpenAI-compatible one does, before any load was sent."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server and how it is asked. url: its base, with or without /v1. timeout: seconds for a whole answer.

    Raises ConfigError naming the option.
    """

    url: str
    endpoint: str = "chat"
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 600.0
    ignore_eos: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More fields of each request's body."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f"URL must be a server's base such as http://127.0.0.1:8000, not {self.url!r}")
        if self.endpoint not in ENDPOINTS:
            raise ConfigError(f"--endpoint must be chat or completions, not {self.endpoint!r}")
        if not 0.001 <= self.timeout <= 86_400:
            raise ConfigError(f"--timeout must be between 0.001 and 86400 seconds, not {self.timeout}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError("--api-key must be printable ASCII")

    @property
    def base(self) -> str:
        """The URL that routes are added to."""
        base = self.url.rstrip("/")
        return base if base.endswith("/v1") else f"{base}/v1"

    def body(self, prompt: Prompt, model: str) -> bytes:
        """A request's body."""
        asked = {"messages": prompt.messages} if self.endpoint == "chat" else {"prompt": prompt.text}
        fields = {
            "model": model, **asked, "max_tokens": prompt.output_tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}, **({"ignore_eos": True} if self.ignore_eos else {}),
            **self.extra,
        }  # fmt: skip
        return json.dumps(fields).encode()


@dataclass(slots=True)
class Reply:
    """What came back for one request. Times are of `time.perf_counter`."""

    planned: float
    """When it was to be sent; in a closed loop, when it was."""
    sent: float
    end: float = 0.0
    status: int = 0
    """0: there was none."""
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    failure: str = ""
    detail: str = ""


class Client:
    """Sends requests to one target. Owns nothing: the session is closed by who opened it."""

    def __init__(self, target: Target, session: aiohttp.ClientSession) -> None:
        self.target = target
        self._session = session
        self._url = target.base + ENDPOINTS[target.endpoint]

    async def ask(self, body: bytes, planned: float | None = None) -> Reply:
        """One request to its end, whatever that is; failures are in the reply. planned: None for now."""
        import aiohttp

        now = time.perf_counter()
        reply = Reply(now if planned is None else planned, now)
        try:
            async with self._session.post(self._url, data=body, allow_redirects=False) as response:
                reply.status = response.status
                await _keep(response.content, reply)
        except TimeoutError:
            reply.failure = TIMEOUT
        except aiohttp.ClientConnectorError as error:
            reply.failure, reply.detail = CONNECT, str(error)
        except (aiohttp.ClientError, OSError) as error:
            reply.failure, reply.detail = TRUNCATED if reply.status else DISCONNECTED, str(error)
        reply.end = time.perf_counter()
        return reply

    async def models(self) -> list[str]:
        """Names of the models that the server has. Raises ServerError."""
        import aiohttp

        url = f"{self.target.base}/models"
        try:
            async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=30)) as response:
                text = await response.text(errors="replace")
                if response.status != 200:
                    raise ServerError(f"{url} answers {response.status}: {text[:300]}")
            names = [item["id"] for item in json.loads(text)["data"]]
        except (aiohttp.ClientError, OSError) as error:
            raise ServerError(f"{url} cannot be reached: {error or type(error).__name__}") from None
        except (ValueError, KeyError, TypeError):
            raise ServerError(f"{url} does not answer with a list of models; give --model") from None
        if not names:
            raise ServerError(f"{url} lists no model; give --model")
        return names


async def _keep(content: aiohttp.StreamReader, reply: Reply) -> None:
    size = 0
    async for piece in content.iter_any():
        reply.pieces.append((time.perf_counter(), piece))
        size += len(piece)
        if size > MAX_ANSWER_BYTES:
            reply.failure, reply.detail = TOO_LONG, f"more than {MAX_ANSWER_BYTES} bytes"
            return


@contextlib.asynccontextmanager
async def open_client(target: Target) -> AsyncIterator[Client]:
    """A client with connections of its own, as many as there are requests at once; closed at the end."""
    import aiohttp

    headers = {"Content-Type": "application/json"}
    if target.api_key:
        headers["Authorization"] = f"Bearer {target.api_key}"
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
        timeout=aiohttp.ClientTimeout(total=target.timeout),
        headers=headers,
        auto_decompress=True,
        max_line_size=MAX_HEAD_BYTES,
        max_field_size=MAX_HEAD_BYTES,
    ) as session:
        yield Client(target, session)


def check_installed() -> None:
    """Raises ConfigError where aiohttp is not installed."""
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise ConfigError("this needs aiohttp: pip install 'kvarn[bench]'") from None


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where it is installed: it takes less time for each piece."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
