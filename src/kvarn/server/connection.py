"""What a connection may do around requests: uvicorn's protocol, with bounds on heads and slow readers."""

from __future__ import annotations

import asyncio
import socket
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from kvarn.server.errors import ApiError
from kvarn.server.limits import ServerLimits
from kvarn.server.record import RequestRecord
from kvarn.server.refusals import Refusals

INTERNET = frozenset({socket.AF_INET, socket.AF_INET6})


class BoundedProtocol(HttpToolsProtocol):
    """One connection. uvicorn itself bounds neither the time nor the size of a head, nor how long writing may take."""

    limits: ClassVar[ServerLimits]
    refusals: ClassVar[Refusals]
    _head_timer: asyncio.TimerHandle | None = None
    """Runs while a head is awaited or incomplete."""
    _write_timer: asyncio.TimerHandle | None = None
    """Runs while more lies unsent than is to be."""
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Takes the connection, unless there are too many."""
        super().connection_made(transport)
        most = self.limits.max_connections
        if len(self.connections) > most:
            message = f"there are more than {most} connections (--max-connections); try again later"
            self._refuse(503, message, code="busy")
            return
        transport.set_write_buffer_limits(high=self.limits.max_unsent_bytes)
        self._drop_vanished(transport)
        self._await_head()

    def _drop_vanished(self, transport: asyncio.Transport) -> None:
        """Has the system end connections whose peers take nothing that is sent, also after they were closed here."""
        option = getattr(socket, "TCP_USER_TIMEOUT", None)
        connection = transport.get_extra_info("socket")
        if option is not None and connection is not None and connection.family in INTERNET:
            connection.setsockopt(socket.IPPROTO_TCP, option, min(int(self.limits.read_timeout * 2000), 2**31 - 1))

    def connection_lost(self, exc: Exception | None) -> None:
        """Lets go of all timers."""
        self._end_head()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads on; refuses a head that grows too long without coming to an end."""
        was_in_head = self._head_timer is not None
        super().data_received(data)
        if self._head_timer is None or self.transport.is_closing():
            return
        self._head_bytes += len(data) if was_in_head else 0
        most = self.limits.max_header_bytes
        if self._head_bytes > most:
            message = f"the headers have more than {most} bytes (--max-header-bytes)"
            self._refuse(431, message, code="headers_too_large")

    def on_message_begin(self) -> None:
        """A head begins."""
        self._await_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """It is all there."""
        self._end_head()
        super().on_headers_complete()

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limits.header_timeout, self._late_head)

    def _end_head(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _late_head(self) -> None:
        if self._head_bytes:
            limit = self.limits.header_timeout
            self._refuse(408, f"the headers did not come within {limit:g} s (--header-timeout)", code="header_timeout")
        else:
            self.transport.close()  # nothing was asked

    def pause_writing(self) -> None:
        """Told that the client does not read what is sent."""
        super().pause_writing()
        self._stop_write_timer()
        self._write_timer = self.loop.call_later(self.limits.read_timeout, self._unread)

    def resume_writing(self) -> None:
        """Told that it has read most of it."""
        self._stop_write_timer()
        super().resume_writing()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _unread(self) -> None:
        """Ends the connection; what is computed for it ends with that."""
        message = f"the client left its answer unread for {self.limits.read_timeout:g} s (--read-timeout)"
        record: RequestRecord | None = self.cycle.scope["state"].get("record") if self.cycle else None
        if record is not None and not self.cycle.response_complete:
            record.error, record.message = "slow_reader", message  # it is counted when the request has ended
        else:
            self.refusals.count(message)
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Refuses what is no HTTP, in the shape of all errors."""
        self._refuse(400, msg, code="invalid_http")

    def _refuse(self, status: int, message: str, *, code: str) -> None:
        """Answers without the application, and ends the connection."""
        self.refusals.count(message)
        self._end_head()
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()  # an answer to an earlier request is on its way: none can be put into it
            return
        body = ApiError(status, message, code=code).response("").body
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()


def bounded_protocol(limits: ServerLimits, refusals: Refusals) -> type[asyncio.Protocol]:
    """The protocol for `uvicorn.Config.http`. refusals: told of what is refused before it reaches the application."""
    return type("Connection", (BoundedProtocol,), {"limits": limits, "refusals": refusals})
