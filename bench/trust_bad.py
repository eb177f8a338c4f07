"""Bad requests of many kinds, as the bytes that a client would send: what no server may be hurt by."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]
BIG = 9 << 20
"""Bytes beyond the largest body."""
REFUSED = frozenset(range(400, 500)) | {501, 505}
"""What a bad request may be answered with; 501 and 505 are for methods and versions that nobody knows."""


@dataclass(frozen=True, slots=True)
class Bad:
    """One kind. parts: the bytes to send, each after a pause where it `drips`. prompt: it is refused without waiting
    for anything, so its answer counts among those that must come at once. silent: no answer is one, too: the connection
    is closed."""

    name: str
    parts: Callable[[random.Random], list[bytes]]
    prompt: bool = True
    silent: bool = False
    drips: bool = False
    cut: bool = False
    """The client ends its side after the last byte."""


def _post(path: str, body: bytes, key: str, headers: str = "", kind: str = "application/json") -> bytes:
    content = f"Content-Type: {kind}\r\n" if kind else ""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{_auth(key)}{content}{headers}Content-Length: {len(body)}\r\n\r\n"
    return head.encode("latin-1") + body


def _auth(key: str) -> str:
    return f"Authorization: Bearer {key}\r\n" if key else ""


def kinds(key: str) -> list[Bad]:
    """All kinds. key: a good one, so that it is the rest that is refused."""
    return [*_http(key), *_bodies(key), *_fields(key), *_slow(key)]


def _http(key: str) -> Iterator[Bad]:
    """What is no proper HTTP, or asks for what is not there."""
    auth = _auth(key)
    hello = json.dumps({"messages": HELLO}).encode()
    post = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{auth}Content-Type: application/json\r\n"

    def raw(name: str, text: str | bytes, **more: Any) -> Bad:
        data = text if isinstance(text, bytes) else text.encode("latin-1")
        return Bad(name, lambda _random: [data], **more)

    yield Bad("random bytes", lambda numbers: [numbers.randbytes(400) + b"\r\n\r\n"], silent=True)
    yield raw("TLS to a plain port", bytes.fromhex("1603010200010001fc0303") + bytes(508), silent=True, cut=True)
    yield raw("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", silent=True)
    yield raw("no version", "GET /v1/models\r\n\r\n", silent=True, cut=True)
    yield raw("unknown version", f"GET /v1/models HTTP/9.9\r\nHost: x\r\n{auth}\r\n", silent=True)
    yield raw("space in the method", f"PO ST {CHAT} HTTP/1.1\r\nHost: x\r\n\r\n", silent=True)
    yield raw("header without colon", f"GET /v1/models HTTP/1.1\r\nHost x\r\n{auth}\r\n", silent=True)
    yield raw("NUL in a header", f"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-A: a\0b\r\n{auth}\r\n", silent=True)
    yield raw("header of 200 kB", f"POST {CHAT} HTTP/1.1\r\nX-A: {'a' * 200_000}\r\n\r\n", silent=True)
    yield raw("5,000 headers", f"POST {CHAT} HTTP/1.1\r\n" + "X-A: a\r\n" * 5000 + "\r\n", silent=True)
    yield raw("URL of 100 kB", f"GET /{'a' * 100_000} HTTP/1.1\r\nHost: x\r\n{auth}\r\n", silent=True)
    for name, length in (("negative", "-5"), ("no number as", "many"), ("huge", "9" * 30)):
        yield raw(f"{name} Content-Length", f"{post}Content-Length: {length}\r\n\r\n", silent=True)
    yield raw("two Content-Lengths", f"{post}Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", silent=True)
    chunked = f"{post}Transfer-Encoding: chunked\r\n"
    smuggled = f"{chunked}Content-Length: 4\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n"
    yield raw("length and chunks (smuggling)", smuggled, silent=True)
    yield raw("chunk size that is none", f"{chunked}\r\nzz\r\nhello\r\n0\r\n\r\n", silent=True)
    yield raw("chunk of 2^60 bytes", f"{chunked}\r\n{1 << 60:x}\r\nhello", silent=True, cut=True)
    yield raw("body cut short", _post(CHAT, hello, key)[:-5], silent=True, cut=True)
    yield raw("GET of a POST route", f"GET {CHAT} HTTP/1.1\r\nHost: x\r\n{auth}\r\n")
    yield raw("DELETE of a model", f"DELETE /v1/models/x HTTP/1.1\r\nHost: x\r\n{auth}\r\n")
    yield raw("TRACE", f"TRACE /v1/models HTTP/1.1\r\nHost: x\r\n{auth}\r\n")
    yield raw("CONNECT", f"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n{auth}\r\n", silent=True)
    yield raw("invented method", f"BREW {CHAT} HTTP/1.1\r\nHost: x\r\n{auth}\r\n", silent=True)
    for name, path in (
        ("../ in the path", "/v1/../../../etc/passwd"), ("%2e%2e%2f in the path", "/%2e%2e%2f%2e%2e%2fetc/passwd"),
        ("NUL in the path", "/v1/models/%00"), ("unknown route", "/v1/nothing"),
        ("unknown model's card", "/v1/models/gpt"),
        ("invalid UTF-8 in the path", "/v1/models/%ff%fe"), ("file of the server", "/static/../app.py"),
        ("another host's URL", "http://example.org/v1/nothing"),
    ):  # fmt: skip
        yield raw(name, f"GET {path} HTTP/1.1\r\nHost: x\r\n{auth}\r\n", silent=name == "another host's URL")
    yield raw("form instead of JSON", _post(CHAT, b"messages=hi", key, kind="application/x-www-form-urlencoded"))
    yield raw("no content type", _post(CHAT, b"\0\1\2", key, kind=""))
    packed = gzip.compress(bytes(BIG))
    yield raw("gzip bomb", _post(CHAT, packed, key, "Content-Encoding: gzip\r\n"))
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA\r\n"
    yield raw("WebSocket", f"GET {CHAT} HTTP/1.1\r\nHost: x\r\n{auth}{upgrade}\r\n", silent=True)
    yield raw("a terabyte promised", f"{post}Content-Length: {1 << 40}\r\n\r\n", silent=True)
    yield raw("body too large", _post(CHAT, b" " * BIG, key), prompt=False, silent=True)
    yield raw("no key", _post(CHAT, hello, ""))
    yield raw("wrong key", _post(CHAT, hello, "kvarn-wrong"))
    yield raw("key of 10 kB", _post(CHAT, hello, "k" * 10_000))
    yield raw("other scheme", _post(CHAT, hello, "", "Authorization: Basic eDp5\r\n"))
    yield raw("key that is not ASCII", _post(CHAT, hello, "", "Authorization: Bearer \xe5\xe4\xf6\r\n"))
    yield raw("bad SLO header", _post(CHAT, hello, key, "x-slo-ttft-ms: soon\r\n"))


def _bodies(key: str) -> Iterator[Bad]:
    """Bodies that are not the JSON of a request."""
    bodies: dict[str, bytes] = {
        "empty body": b"", "broken JSON": b'{"messages": [', "not UTF-8": b'{"messages": "\xff\xfe"}',
        "list as body": b"[]", "null as body": b"null", "100,000 brackets": b"[" * 100_000,
        "100,000 nested objects": b'{"a":' * 100_000, "NaN": b'{"messages": NaN}',
        "number of 5,000 digits": b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 5000 + b"}",
        "1e999": b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
        "two roots": b"{}{}", "comment in JSON": b'{"messages": [] /* x */}',
    }  # fmt: skip
    for name, body in bodies.items():
        yield Bad(name, lambda _random, body=body: [_post(CHAT, body, key)])  # type: ignore[misc]
    letters = b'{}[]",:0a\\u'
    yield Bad("random JSON letters", lambda numbers: [_post(CHAT, bytes(numbers.choices(letters, k=300)), key)])


def _fields(key: str) -> Iterator[Bad]:
    """JSON whose fields are wrong, too many, too large, or hostile."""
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(300):
        deep = {"type": "object", "properties": {"a": deep}}
    chats: dict[str, dict[str, Any]] = {
        "messages a number": {"messages": 5}, "no message": {"messages": []},
        "20,000 messages": {"messages": [{}] * 20_000},
        "role a number": {"messages": [{"role": 5, "content": "a"}]},
        "role of control tokens": {"messages": [{"role": "<|im_start|>", "content": "a"}]},
        "content a list of numbers": {"messages": [{"role": "user", "content": [5]}]},
        "image to be fetched": {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/secret"}}]}]},
        "lone surrogates as a model": {"model": "\ud800"}, "wrong model": {"model": "gpt-9"},
        "model a path": {"model": "../../etc/passwd"}, "temperature a word": {"temperature": "hot"},
        "top_p of 5": {"top_p": 5}, "n of a million": {"n": 10**6}, "n below 0": {"n": -1},
        "max_tokens of a billion": {"max_tokens": 10**9}, "seed of 2^70": {"seed": 2**70},
        "100,000 biases": {"logit_bias": {str(i): 1 for i in range(100_000)}},
        "bias of no token": {"logit_bias": {"-7": 1}},
        "10,000 stop strings": {"stop": ["x"] * 10_000}, "empty stop string": {"stop": ""},
        "50 top_logprobs": {"logprobs": True, "top_logprobs": 50}, "salt of 10 kB": {"cache_salt": "x" * 10_000},
        "misspelt field": {"tempature": 1}, "stream a word": {"stream": "yes"},
        "template of the client": {"chat_template": "{{ 1 }}"},
        "tools that are none": {"tools": [{"type": "function"}]},
        "schema that is none": {
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}},
        "unknown schema keyword": {"structured_outputs": {"json": {"type": "object", "unevaluatedItems": False}}},
        "schema 300 deep": {"structured_outputs": {"json": deep}},
        "schema of 300 kB": {"structured_outputs": {"json": {"type": "string", "description": "x" * 300_000}}},
        "broken regex": {"structured_outputs": {"regex": "(a"}},
        "regex with look-around": {"structured_outputs": {"regex": "(?=a)b"}},
        "broken grammar": {"structured_outputs": {"grammar": "start: ("}},
        "5,000 choices": {"structured_outputs": {"choice": [f"c{i}" for i in range(5000)]}},
        "no choice": {"structured_outputs": {"choice": []}},
    }  # fmt: skip
    yield Bad("no messages", lambda _random: [_post(CHAT, b"{}", key)])
    for name, fields in chats.items():
        data = json.dumps({"messages": HELLO, **fields}).encode()
        yield Bad(name, lambda _random, data=data: [_post(CHAT, data, key)])  # type: ignore[misc]
    texts: dict[str, dict[str, Any]] = {
        "no prompt": {}, "empty prompt": {"prompt": ""}, "prompt an object": {"prompt": {"a": 1}},
        "unknown token": {"prompt": [10**9]}, "token below 0": {"prompt": [-1]},
        "1,000 prompts": {"prompt": ["a"] * 1000},
        "mixed prompts": {"prompt": [1, "a"]}, "suffix": {"prompt": "a", "suffix": "b"},
    }  # fmt: skip
    for name, body in texts.items():
        data = json.dumps(body).encode()
        yield Bad(name, lambda _random, data=data: [_post(COMPLETIONS, data, key)])  # type: ignore[misc]
    prompt = json.dumps({"prompt": "word " * 500_000}).encode()
    yield Bad("prompt of 2.5 MB", lambda _random: [_post(COMPLETIONS, prompt, key)], prompt=False)
    regex = json.dumps({"messages": HELLO, "structured_outputs": {"regex": "((((a{1,99}){1,99}){1,99}){1,99}){1,99}"}})
    yield Bad("regex that explodes", lambda _random: [_post(CHAT, regex.encode(), key)], prompt=False)


def _slow(key: str) -> Iterator[Bad]:
    """Requests that never get on."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{_auth(key)}Content-Type: application/json\r\n"
    head += "Content-Length: 1000\r\n\r\n"
    drips = [bytes([byte]) for byte in head.encode()[:60]]
    yield Bad("headers that drip (slowloris)", lambda _random: drips, prompt=False, silent=True, drips=True)
    body = [head.encode(), *(b" " for _ in range(60))]
    yield Bad("body that drips", lambda _random: body, prompt=False, silent=True, drips=True)
    yield Bad("connection without a word", lambda _random: [b""], prompt=False, silent=True, drips=True)
