"""A server on a free port of the loopback interface, in a thread, for as long as a test needs it."""

import asyncio
import contextlib
import socket
import threading
import time

import uvicorn

from kvarn.server import create_app


@contextlib.contextmanager
def serving(llm, **options):
    """Serves `llm` (an AsyncLLM, or None for a model that never comes); yields the base URL."""
    app = create_app(llm, **options)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()


def wait_until(condition, seconds=10.0):
    """Polls until the condition holds; fails after a time no healthy machine needs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)
