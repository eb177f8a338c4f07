"""A server on a free port of the loopback interface, in a thread, for as long as a test needs it."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time

import uvicorn

from kvarn.server import create_app
from kvarn.server.admin import create_admin_app
from kvarn.server.connection import bounded_protocol


@contextlib.contextmanager
def serving(llm, ended=None, admin=None, tls=None, **options):
    """Serves `llm` (an AsyncLLM, or None for a model that never comes); yields the base URL.

    ended: a semaphore, released whenever the application is done with a request, answered or left. admin: what the
    admin routes are to be like, which are then served in place of the others. tls: what it speaks.
    """
    app = create_app(llm, **options)

    if admin is not None:
        app = create_admin_app(app.state.server, admin)

    async def counted(scope, receive, send):
        try:
            await app(scope, receive, send)
        finally:
            if ended is not None:
                ended.release()

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    state = app.state.server
    protocol = bounded_protocol(state.limits, state.refusals)
    config = uvicorn.Config(
        counted, log_level="critical", lifespan="off", timeout_graceful_shutdown=2, http=protocol, ws="none",
        ssl_certfile=tls.cert if tls else None, ssl_keyfile=tls.key if tls else None,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()


@contextlib.contextmanager
def posted(url, path, body, *, key=None, headers=None):
    """A POST whose answer nobody reads yet; yields the connection. Closing it is a client that leaves."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    with contextlib.closing(connection):
        authorization = {"Authorization": f"Bearer {key}"} if key else {}
        headers = {"Content-Type": "application/json", **authorization, **(headers or {})}
        connection.request("POST", path, json.dumps(body), headers)
        yield connection


def wait_until(condition, seconds=30.0):
    """Polls until the condition holds; fails after a time no healthy machine needs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)
