"""A request's body: bounded while it arrives, JSON, and validated with errors that name the field."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from kvarn.server.errors import RETRY_SECONDS, ApiError
from kvarn.server.limits import ServerLimits
from kvarn.server.protocol import LIMIT_NAMES, ModelRequest, screen

Model = TypeVar("Model", bound=ModelRequest)

KINDS = {
    "string_type": "a string",
    "bool_type": "true or false",
    "int_type": "an integer",
    "float_type": "a number",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}
"""What pydantic's error types say was wanted."""
PROMPTS = ("prompt", "input")
MANY_BYTES = 64 << 10
"""Of a body that may hold so much that collections while it is read cost more than the reading."""
SHOWN = 40
"""Characters of a wrong value that a message repeats."""


class BodyReader:
    """Reads bodies within limits: of each, and of all that are being read at the same time."""

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._held = 0
        """Bytes of the bodies that are neither refused nor understood yet."""

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body, which counts as held until the context ends.

        Raises ApiError 408, 413, 415, 429, and 499 where the client leaves.
        """
        body = bytearray()
        try:
            await self._take(request, body)
            yield bytes(body)
        finally:
            self._held -= len(body)

    async def _take(self, request: Request, body: bytearray) -> None:
        """Fills the body. Whoever sends one that is refused may send on for a moment before that is told."""
        most = self._limits.max_body_bytes
        try:
            _check_headers(request, most)
            await self._receive(request, body)
        except ApiError as error:
            waits = "expect" in request.headers and not body  # it sends nothing until it is told to
            if error.status in TOLD_AT_THE_END and not waits:
                await _drop_rest(request, 2 * most - len(body))
            raise

    async def _receive(self, request: Request, body: bytearray) -> None:
        timeout = self._limits.body_timeout
        try:
            async with asyncio.timeout(timeout):
                async for chunk in request.stream():
                    body += chunk
                    self._held += len(chunk)
                    self._check(len(body))
        except ClientDisconnect:
            raise ApiError(499, "the client closed the connection") from None
        except TimeoutError:
            message = f"the body did not come within {timeout:g} s (--body-timeout)"
            raise ApiError(408, message, code="body_timeout", headers=CLOSE) from None

    def _check(self, length: int) -> None:
        if length > self._limits.max_body_bytes:
            raise _too_large(self._limits.max_body_bytes)
        most = self._limits.max_unparsed_bytes
        if self._held > most:
            message = f"more than {most} bytes of bodies are being read (--max-unparsed-bytes); try again later"
            raise ApiError(429, message, code="too_many_bytes", headers={"Retry-After": RETRY_SECONDS, **CLOSE})


CLOSE = {"Connection": "close"}
"""A body that is refused is not read to its end, however long it is."""
TOLD_AT_THE_END, LINGER_SECONDS = (413, 415, 429), 1.0
"""Refusals that wait for the rest of the body, so long at most."""


async def _drop_rest(request: Request, most: int) -> None:
    """Takes in what the client still sends, `most` bytes of it, and keeps nothing: a connection that is closed with
    bytes unread is reset, and a client that sends all before it reads would lose the answer."""
    with suppress(ClientDisconnect, TimeoutError, RuntimeError):  # RuntimeError: it has all come already
        async with asyncio.timeout(LINGER_SECONDS):
            async for chunk in request.stream():
                most -= len(chunk)
                if most < 0:
                    return


def _check_headers(request: Request, limit: int) -> None:
    # A browser sends other types across origins without asking first, so no page can make it post here.
    kind = request.headers.get("content-type", "nothing").split(";")[0].strip().lower()
    if kind != "application/json":
        message = f"the Content-Type must be application/json, not {kind[:SHOWN]}"
        raise ApiError(415, message, code="unsupported_media_type")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        message = f"the body must come without a Content-Encoding, not as {coding[:SHOWN]}"
        raise ApiError(415, message, code="unsupported_media_type")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> ApiError:
    message = f"the body is larger than {limit} bytes (--max-body-bytes)"
    return ApiError(413, message, code="body_too_large", headers=CLOSE)


def check_entries(body: ModelRequest, limits: ServerLimits) -> None:
    """Raises ApiError 400, naming parameter and limit, for a body that has more of something than is allowed."""
    for name, limit in LIMIT_NAMES.items():
        value, most = getattr(body, name, None), getattr(limits, limit)
        if not isinstance(value, list | tuple | dict) or len(value) <= most:
            continue
        if name in PROMPTS and not isinstance(value[0], str | list):
            continue  # one prompt, of token ids
        message = f"{name} must have at most {most} entries, not {len(value)} ({limit})"
        raise ApiError(400, message, param=name, code="invalid_value")
    for name in type(body).model_fields:
        value, most = getattr(body, name), limits.max_values
        if _may_hold_much(name, value) and _num_values(value, most) > most:
            message = f"{name} must hold at most {most} values, those inside of lists and objects counted (max_values)"
            raise ApiError(400, message, param=name, code="invalid_value")
    for name in ("n", "best_of"):
        n = getattr(body, name, None)
        if isinstance(n, int) and n > limits.max_n:
            message = f"{name} must be at most {limits.max_n}, not {n} (max_n)"
            raise ApiError(400, message, param=name, code="invalid_value")


def _may_hold_much(name: str, value: Any) -> bool:
    """Texts and token ids have limits of their own."""
    if isinstance(value, list):
        return bool(value) and (name not in PROMPTS or isinstance(value[0], dict))
    return isinstance(value, dict)


def _num_values(value: Any, most: int) -> int:
    """Values inside of a list or an object, at every depth; some number above `most` as soon as it is more."""
    inside, count = [value], 0
    while inside and count <= most:
        each = inside.pop()
        count += len(each)
        if count <= most:
            values = each.values() if isinstance(each, dict) else each
            inside += [item for item in values if isinstance(item, list | dict)]
    return count


def parse(model: type[Model], body: bytes) -> Model:
    """The body as a request model. Takes long for a long body. Raises ApiError 400 naming the first field at fault."""
    values = screen(_json_object(body), model.model_fields, model.screening)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _refusal(error) from None


_collector = threading.Lock()


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keeps Python's garbage collector from going through all that is read so far again and again.

    For 8 MiB of small lists that is 2 s instead of 0.3, in which no other thread gets on.
    """
    with _collector:
        was_on = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_on:
                gc.enable()


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        with _collector_paused() if len(body) > MANY_BYTES else nullcontext():
            value = json.loads(body, parse_constant=_no_constant)
    except RecursionError:
        raise _not_json("it is nested too deep") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _not_json(str(error)) from None
    except ValueError:  # Python's limit; its own message is for programmers
        raise _not_json("a number has too many digits") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return value


def _no_constant(name: str) -> None:
    raise _not_json(f"{name} is no number")


def _not_json(reason: str) -> ApiError:
    return ApiError(400, f"the body is not JSON: {reason}", code="invalid_json")


def _refusal(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    kind, path = first["type"], _path(first["loc"])
    if kind == "extra_forbidden":
        return ApiError(400, f"unknown parameter {path}", param=path, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"{path} is missing", param=path, code="missing_parameter")
    wanted = f"must be {KINDS[kind]}" if kind in KINDS else first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{path} {wanted}, not {_shown(first['input'])}", param=path, code="invalid_type")


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content` from pydantic's location."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part[:64]}" if path else part[:64]
    return path


def _shown(value: Any) -> str:
    """A wrong value, short enough for a message."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value[:SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]}…"
