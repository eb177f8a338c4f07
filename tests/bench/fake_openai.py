"""A server that speaks as much of OpenAI's API as a load needs, on the loopback interface, by a script."""

import asyncio
import contextlib
import json
import threading
import time


class Fake:
    """`script` says what a request gets, by its number: an async function of (writer, body)."""

    def __init__(self, script):
        self.script = script
        self.bodies, self.came, self.headers = [], [], []

    async def connection(self, reader, writer):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while line := await reader.readline():
                headers = {}
                while (header := await reader.readline()).strip():
                    name, _, value = header.decode().partition(":")
                    headers[name.lower()] = value.strip()
                data = await reader.readexactly(int(headers.get("content-length", 0)))
                if line.startswith(b"GET"):
                    await whole(writer, 200, {"data": [{"id": "fake-model"}]})
                    continue
                self.came.append(time.perf_counter())
                self.bodies.append(json.loads(data))
                self.headers.append(headers)
                await self.script(writer, self.bodies[-1])
        writer.close()


@contextlib.contextmanager
def fake_server(script):
    """Yields (base URL, the Fake), which notes the requests' bodies and when they came."""
    fake, loop = Fake(script), asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(fake.connection, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", fake
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


async def whole(writer, status, body):
    data = json.dumps(body).encode()
    writer.write(b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(data)))
    writer.write(data)
    await writer.drain()


async def head(writer):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    await writer.drain()


async def piece(writer, data):
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))
    await writer.drain()


def event(item):
    return b"data: " + (item if isinstance(item, bytes) else json.dumps(item).encode()) + b"\n\n"


def token(text, finish=None):
    return event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]})


async def stream(writer, body, *, tokens=None, first=0.0, between=0.0, usage=True):
    """An answer of as many tokens as asked for: `first` seconds before it, `between` each."""
    count = body["max_tokens"] if tokens is None else tokens
    await head(writer)
    await asyncio.sleep(first)
    await piece(writer, token(""))  # the role, as OpenAI's servers begin: no token yet
    for number in range(count):
        await asyncio.sleep(between if number else 0)
        await piece(writer, token(f" t{number}", "length" if number == count - 1 else None))
    if usage:
        words = sum(len(message["content"].split()) for message in body["messages"])
        counts = {"prompt_tokens": 5 + 2 * words, "completion_tokens": count}
        await piece(writer, event({"choices": [], "usage": counts}))
    await end(writer)


async def end(writer):
    await piece(writer, event(b"[DONE]"))
    writer.write(b"0\r\n\r\n")
    await writer.drain()
