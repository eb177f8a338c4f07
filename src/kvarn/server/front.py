"""`Front`: the middleware around everything. Request ids, URLs and headers, errors, the access log."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvarn.server.errors import ApiError, noted
from kvarn.server.limits import ServerLimits
from kvarn.server.logs import ACCESS
from kvarn.server.record import REQUEST_ID, RequestRecord, request_id_of
from kvarn.server.state import ServerState

access = logging.getLogger(ACCESS)
CLIENT_LEFT = 499
"""What nginx logs where there was nobody to answer."""
MAX_LOGGED_PATH = 200


class Front:
    """ASGI middleware: `request.state.record` has the `RequestRecord`, and every answer its `x-request-id`.

    What goes wrong behind it, and is not answered there, is answered here.
    """

    def __init__(self, app: ASGIApp, state: ServerState, quiet: Collection[str]) -> None:
        """quiet: paths that are asked for so often that they are logged only where they fail."""
        self._app = app
        self._state = state
        self._quiet = frozenset(quiet)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, and logs it when it is over."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = self._record(scope)
        scope.setdefault("state", {})["record"] = record
        identity = (REQUEST_ID.encode(), record.request_id.encode())

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), identity, *record.more_headers()]}
            await send(message)

        try:
            _check_head(scope, self._state.limits)
            await self._app(scope, receive, tell)
        except Exception as error:
            found = noted(error, record)
            if record.status:
                raise  # it has begun, so there is nothing but to break it off
            await found.response(scope["path"])(scope, receive, tell)
        finally:
            self._finished(record)

    def _record(self, scope: Scope) -> RequestRecord:
        offered = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
        began = time.monotonic()
        return RequestRecord(
            request_id_of(None if offered is None else offered.decode("latin-1")),
            method=scope["method"],
            path=scope["path"][:MAX_LOGGED_PATH],
            began=began,
            deadline=began + self._state.limits.request_timeout,
        )

    def _finished(self, record: RequestRecord) -> None:
        record.status = record.status or CLIENT_LEFT
        if record.message:
            self._state.refusals.count(record.message)
        if access.isEnabledFor(logging.INFO) and (record.status >= 400 or record.path not in self._quiet):
            access.info("request", extra={"fields": record.fields(time.monotonic())})


def _check_head(scope: Scope, limits: ServerLimits) -> None:
    """Raises ApiError 414 and 431 for a URL or headers that are too long."""
    url = len(scope["raw_path"]) + len(scope["query_string"])
    if url > limits.max_url_bytes:
        message = f"the URL has {url} bytes, at most {limits.max_url_bytes} are allowed (--max-url-bytes)"
        raise ApiError(414, message, code="url_too_long")
    size = url + sum(len(name) + len(value) for name, value in scope["headers"])
    if size > limits.max_header_bytes:
        message = f"the headers have {size} bytes, at most {limits.max_header_bytes} are allowed (--max-header-bytes)"
        raise ApiError(431, message, code="headers_too_large")
