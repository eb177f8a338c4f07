"""uvicorn's server, ended by signals as a server should be: it drains first."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from types import FrameType

import uvicorn

from kvarn.server.state import ServerState

logger = logging.getLogger("kvarn.server")
CLOSING_SECONDS = 5
"""How long connections may take to close in the end."""


class DrainingServer(uvicorn.Server):
    """The first SIGTERM or SIGINT drains, the second ends at once; the process ends with exit code 0.

    While it drains, requests that came before are answered, new ones are refused with 503, and probes are answered.
    Those that are not answered within the time are failed by their engines, which their clients are told.
    """

    def __init__(self, config: uvicorn.Config, state: ServerState, drain_seconds: float) -> None:
        config.timeout_graceful_shutdown = CLOSING_SECONDS
        super().__init__(config)
        self._state = state
        self._drain_seconds = drain_seconds
        self._drained_by: float | None = None
        """When draining ends at the latest; None: it has not begun."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes a signal."""
        del frame
        if self._drained_by is not None or self.should_exit:
            self.force_exit = self.should_exit = True
            return
        self._state.door.close()
        self._drained_by = time.monotonic() + self._drain_seconds
        if self._state.door.inside:
            name = signal.Signals(sig).name
            left = f"finishing {self._state.door.inside} requests within {self._drain_seconds:g} s"
            logger.warning("%s: %s; once more ends at once", name, left)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True where the server is to end."""
        if self._drained_by is not None:
            self._state.door.close()  # an administrator who resumes does not undo a signal
            done = self._state.door.inside == 0 or time.monotonic() >= self._drained_by
            self.should_exit = self.should_exit or done
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Fails what is left, and closes the connections."""
        if self.force_exit:
            self.config.timeout_graceful_shutdown = 0
        closing = asyncio.create_task(self._state.models.close())
        await super().shutdown(sockets)
        await closing
