"""The server that `kvarn serve` runs, in a thread, ended by what its signal handler does."""

import asyncio
import contextlib
import signal
import socket
import threading

import uvicorn
from gated_engine import PATIENCE
from live_server import wait_until

from kvarn.server import create_app
from kvarn.server.draining import DrainingServer


class EndingServer:
    """A `DrainingServer` over an engine; `state` is its `ServerState`."""

    def __init__(self, app, drain_seconds=PATIENCE) -> None:
        self.state = app.state.server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        config = uvicorn.Config(app, log_level="critical", lifespan="off")
        self._server = DrainingServer(config, self.state, drain_seconds)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started)

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        await self._server.serve(sockets=[self._listener])

    def signal(self, number=signal.SIGTERM) -> None:
        """What the process does when it gets the signal."""
        self._server.handle_exit(number, None)

    def do(self, work):
        """Has a coroutine run in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    @property
    def is_ending(self) -> bool:
        return self._server.should_exit

    def ended(self, seconds=PATIENCE) -> bool:
        """Whether it ends."""
        self._thread.join(seconds)
        return not self._thread.is_alive()


@contextlib.contextmanager
def ending_server(llm, **options):
    """Yields an `EndingServer`, which is ended in the end."""
    server = EndingServer(create_app(llm), **options)
    try:
        yield server
    finally:
        server.signal()
        server.signal()
        assert server.ended()


@contextlib.contextmanager
def running(app):
    """Serves an application and closes its models in the end; yields the base URL."""
    server = EndingServer(app)
    try:
        yield server.url
    finally:
        server.signal()
        assert server.ended()
