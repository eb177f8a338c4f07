"""Every answer that is no success, in the form of the client's API (see `dialects`)."""

from __future__ import annotations

import json
import logging
import math
import secrets
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from kvarn.errors import (
    DeadlineError,
    EngineError,
    KvarnError,
    OverloadError,
    RequestError,
    TemplateError,
    UnreadError,
)  # fmt: skip
from kvarn.server.dialects import dialect_of
from kvarn.server.record import RequestRecord

logger = logging.getLogger("kvarn.server")
RETRY_SECONDS = "1"
MAX_MESSAGE, MAX_PARAM = 1000, 200
"""Characters of a message and of a field's path."""


class ApiError(Exception):
    """An answer with an error. Raised by routes; never holds anything that a client must not see."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        self.request_id = ""
        """Of the request that it answers, as soon as that is known."""

    @property
    def told(self) -> str:
        """The message, no longer than clients are told."""
        return self.message if len(self.message) <= MAX_MESSAGE else f"{self.message[:MAX_MESSAGE]}…"

    @property
    def told_param(self) -> str | None:
        """The field's path, no longer than clients are told."""
        return None if self.param is None else self.param[:MAX_PARAM]

    def response(self, path: str) -> Response:
        """The HTTP response to a request for that path.

        ASCII: what clients sent may be repeated in it, lone surrogates among it.
        """
        body = json.dumps(dialect_of(path).body(self)).encode()
        return Response(body, self.status, self.headers, media_type="application/json")


def to_api_error(error: Exception) -> ApiError:
    """What a client is told of an exception. Unexpected ones are logged with an id, and only the id is told."""
    match error:
        case ApiError():
            return error
        case DeadlineError():
            return _overload(error, code="deadline_not_met")
        case OverloadError():
            return _overload(error, code="queue_full")
        case RequestError():
            return ApiError(400, str(error), param=error.field, code="invalid_value")
        case TemplateError():
            return ApiError(400, str(error), param="messages", code="template_error")
        case UnreadError():
            return ApiError(408, str(error), code="slow_reader")
        case EngineError():
            return ApiError(500, str(error), code="engine_error")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
        case KvarnError():
            return ApiError(500, str(error))
    identity = secrets.token_hex(8)
    logger.error("unexpected error %s", identity, exc_info=error)
    return ApiError(500, f"internal error {identity}; the server's log says more", code="internal_error")


def _overload(error: OverloadError, *, code: str) -> ApiError:
    return ApiError(429, str(error), code=code, headers={"Retry-After": str(max(1, math.ceil(error.retry_after)))})


def noted(error: Exception, record: RequestRecord) -> ApiError:
    """What the client of a request is told of an exception; the request's record has it from now on."""
    found = to_api_error(error)
    found.request_id = record.request_id
    record.error, record.message = found.code or "error", found.message
    return found


def install(app: FastAPI) -> None:
    """Makes every error of the app, routing errors among them, answer in this shape.

    What is unexpected is left to `Front`, which is around all of the app.
    """

    async def answer(request: Request, error: Exception) -> Response:
        record: RequestRecord = request.state.record
        found = noted(error, record)
        if isinstance(error, HTTPException):
            found.message = f"{found.message}: {request.method} {request.url.path[:200]}"
        return found.response(request.url.path)

    for kind in (ApiError, KvarnError, HTTPException):
        app.add_exception_handler(kind, answer)
