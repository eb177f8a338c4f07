"""Every limit refuses by name, is counted under that name, and leaves everything else going on."""

import contextlib
import dataclasses
import http.client
import json
import socket
import threading
import time

import httpx
import pytest
from gated_engine import PATIENCE, gated_llm
from live_server import posted, serving, wait_until
from test_bad_requests import check_shape

from kvarn.errors import ConfigError
from kvarn.server.limits import ServerLimits
from kvarn.server.refusals import limit_names, named_limit

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"role": "user", "content": "hi"}
LONG = {"prompt": "x", "max_tokens": 400, "ignore_eos": True}
JSON = {"content-type": "application/json"}
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n"
)


def counts(url):
    """`kvarn:limit_refusals` by limit."""
    lines = (line for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith("kvarn:limit_refusals_"))
    return {line.split('limit="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in lines if "total" in line}


SMALL = ServerLimits(
    max_header_bytes=4096, max_url_bytes=200, max_body_bytes=3000, max_messages=2, max_tools=1, max_prompts=2,
    max_prompt_tokens=50, max_output_tokens=20, max_n=2, max_stop_strings=2, max_logit_bias=2, max_values=200,
)  # fmt: skip

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
ASKS = [
    # limit, path, body, param
    ("max_messages", CHAT, {"messages": [HELLO] * 3}, "messages"),
    ("max_tools", CHAT, {"messages": [HELLO], "tools": [TOOL] * 2}, "tools"),
    ("max_n", CHAT, {"messages": [HELLO], "n": 3}, "n"),
    ("max_stop_strings", CHAT, {"messages": [HELLO], "stop": ["a", "b", "c"]}, "stop"),
    ("max_logit_bias", CHAT, {"messages": [HELLO], "logit_bias": {"1": 1, "2": 1, "3": 1}}, "logit_bias"),
    ("max_output_tokens", CHAT, {"messages": [HELLO], "max_tokens": 21}, "max_tokens"),
    ("max_output_tokens", COMPLETIONS, {"prompt": "a", "max_tokens": 21}, "max_tokens"),
    ("max_values", CHAT, {"messages": [HELLO], "chat_template_kwargs": {"a": {"b": [[0] * 60] * 4}}},
     "chat_template_kwargs"),
    ("max_values", CHAT, {"messages": [HELLO], "tools": [{**TOOL, "more": [0] * 200}]}, "tools"),
    ("max_values", "/v1/responses", {"input": [{"role": "user", "content": [{}] * 200}]}, "input"),
    ("max_prompt_tokens", COMPLETIONS, {"prompt": "x" * 51}, "prompt"),
    ("max_prompt_tokens", COMPLETIONS, {"prompt": [5] * 51}, "prompt"),
    ("max_prompts", COMPLETIONS, {"prompt": ["a", "b", "c"]}, "prompt"),
    ("max_prompts", COMPLETIONS, {"prompt": [[1], [2], [3]]}, "prompt"),
]


@pytest.fixture(scope="module")
def small(llm):
    with serving(llm, limits=SMALL) as url:
        yield url


@pytest.mark.parametrize("ask", range(len(ASKS)))
def test_what_asks_for_too_much_is_told_which_limit(small, ask):
    limit, path, body, param = ASKS[ask]
    before = counts(small)
    response = httpx.post(small + path, json=body)
    check_shape(response, 400)
    error = response.json()["error"]
    assert error["param"] == param
    assert f"({limit})" in error["message"]
    assert str(getattr(SMALL, limit)) in error["message"]
    after = counts(small)
    assert {name: after[name] - before[name] for name in after if after[name] != before[name]} == {limit: 1}


def test_what_stays_within_limits_is_answered(small):
    body = {"prompt": [[5] * 50, [7] * 50], "n": 2, "stop": ["a", "b"], "logit_bias": {"1": 1, "2": 1}}
    assert httpx.post(small + COMPLETIONS, json={**body, "max_tokens": 20}, timeout=60).status_code == 200
    assert httpx.post(small + COMPLETIONS, json={"prompt": [5] * 50}).status_code == 200


def test_without_max_tokens_the_limit_is_it(small):
    body = {"messages": [HELLO], "ignore_eos": True}
    response = httpx.post(small + CHAT, json=body)
    assert response.json()["usage"]["completion_tokens"] == 20
    assert response.json()["choices"][0]["finish_reason"] == "length"


def test_what_stands_before_the_body_is_bounded(small):
    before = counts(small)
    check_shape(httpx.get(f"{small}/v1/models/{'x' * 300}"), 414)
    check_shape(httpx.get(f"{small}/v1/models?{'x' * 300}"), 414)
    check_shape(httpx.get(f"{small}/v1/models", headers={"x-much": "y" * 5000}), 431)
    check_shape(httpx.post(small + COMPLETIONS, content=b" " * 4000, headers=JSON), 413)
    after = counts(small)
    changed = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert changed == {"max_url_bytes": 2, "max_header_bytes": 1, "max_body_bytes": 1}


@contextlib.contextmanager
def connected(url):
    host, port = url.removeprefix("http://").split(":")
    with contextlib.closing(socket.create_connection((host, int(port)), timeout=PATIENCE)) as connection:
        yield connection


def received(connection):
    """All until the server closes; b"" also where it resets the connection."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            data += piece
    return data


def answer(data):
    """(status, error) of an HTTP answer."""
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def test_a_head_that_never_ends_is_cut_off_while_it_comes(small):
    before = counts(small)["max_header_bytes"]
    with connected(small) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Endless: ")
        for _ in range(100):
            connection.sendall(b"a" * 1000)
            time.sleep(0.001)
    wait_until(lambda: counts(small)["max_header_bytes"] == before + 1)


def test_what_is_no_http_is_answered_as_all_errors_are(small):
    for garbage in (b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n"):
        with connected(small) as connection:
            connection.sendall(garbage)
            status, error = answer(received(connection))
            assert (status, error["code"]) == (400, "invalid_http")


def test_a_head_must_come_in_time_and_an_idle_connection_is_closed(llm):
    with serving(llm, limits=ServerLimits(header_timeout=1.0)) as url:
        with connected(url) as slow:
            slow.sendall(b"GET /health HTTP/1.1\r\nHost:")
            status, error = answer(received(slow))
            assert (status, error["code"]) == (408, "header_timeout")
        with connected(url) as idle:
            assert received(idle) == b""
        wait_until(lambda: counts(url)["header_timeout"] == 1)


def test_a_body_must_come_in_time(llm):
    with serving(llm, limits=ServerLimits(body_timeout=0.1)) as url:
        with connected(url) as connection:
            connection.sendall(HEAD % 100 + b"{")
            status, error = answer(received(connection))
            assert (status, error["code"]) == (408, "body_timeout")
        assert counts(url)["body_timeout"] == 1


def test_one_connection_too_many_is_told_so(llm):
    with serving(llm, limits=ServerLimits(max_connections=2)) as url:
        with connected(url) as one, connected(url) as two:
            for connection in (one, two):  # an answer shows that the server has taken the connection
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            with connected(url) as three:
                status, error = answer(received(three))
                assert status == 503
                assert "(--max-connections)" in error["message"]

        def again():
            try:
                return httpx.get(f"{url}/health").status_code == 200
            except httpx.HTTPError:
                return False

        wait_until(again)
        assert counts(url)["max_connections"] >= 1


def test_bodies_that_are_read_are_bounded_together(llm):
    limits = ServerLimits(max_body_bytes=100_000, max_unparsed_bytes=150_000)
    blanks = b"{" + b" " * 79_999
    with serving(llm, limits=limits) as url:
        with connected(url) as one:
            one.sendall(HEAD % 90_000 + blanks)
            # Until the server has read that, others still get through.
            wait_until(lambda: httpx.post(url + COMPLETIONS, content=blanks, headers=JSON).status_code == 429)
        response = None

        def gone():
            nonlocal response
            response = httpx.post(url + COMPLETIONS, content=b" " * 80_000, headers=JSON)
            return response.status_code == 400

        wait_until(gone)
        assert counts(url)["max_unparsed_bytes"] >= 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_ended(stream):
    limits = ServerLimits(request_timeout=0.3)
    body = {**LONG, "stream": stream}
    with gated_llm() as (llm, gate), serving(llm, limits=limits) as url, posted(url, COMPLETIONS, body) as connection:
        wait_until(lambda: counts(url)["request_timeout"] == 1)  # though the engine stands in its first step
        response = connection.getresponse()
        assert response.status == 504
        assert json.loads(response.read())["error"]["code"] == "request_timeout"
        gate.open()
        wait_until(lambda: llm.stats().free_blocks == llm.stats().num_blocks)


def test_embeddings_that_take_too_long_are_ended():
    limits, body = ServerLimits(request_timeout=0.3), {"input": ["a", "b"]}
    with (
        gated_llm(embeddings=True) as (llm, gate),
        serving(llm, limits=limits) as url,
        posted(url, "/v1/embeddings", body) as connection,
    ):
        wait_until(lambda: counts(url)["request_timeout"] == 1)  # though the engine stands in its first step
        response = connection.getresponse()
        assert response.status == 504
        assert json.loads(response.read())["error"]["code"] == "request_timeout"
        gate.open()
        wait_until(lambda: llm.stats().free_blocks == llm.stats().num_blocks)


def test_a_stream_that_takes_too_long_ends_with_an_error():
    limits = ServerLimits(request_timeout=4.0)
    # Of other tokens the first may be a part of a character, of which nothing is sent yet.
    body = {**LONG, "stream": True, "allowed_token_ids": [97]}
    with gated_llm() as (llm, gate), serving(llm, limits=limits) as url, posted(url, COMPLETIONS, body) as connection:
        gate.stand_in_step(2)
        lines = [line for line in connection.getresponse().read().decode().splitlines() if line]
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2][6:])["error"]["code"] == "request_timeout"
        assert json.loads(lines[0][6:])["choices"]
        gate.open()
        wait_until(lambda: llm.stats().free_blocks == llm.stats().num_blocks)


@contextlib.contextmanager
def not_reading(url, body):
    """A client that asks for a stream, takes its first bytes, and then reads no more."""
    host, port = url.removeprefix("http://").split(":")
    with contextlib.closing(socket.socket()) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.settimeout(PATIENCE)
        connection.connect((host, int(port)))
        content = json.dumps({**body, "stream": True}).encode()
        connection.sendall(HEAD % len(content) + content)
        assert connection.recv(12) == b"HTTP/1.1 200"
        yield connection


MANY = {"prompt": ["x"] * 16, "n": 4, "max_tokens": 400, "ignore_eos": True, "logprobs": 20}
"""More than a connection's buffers hold: some 25,000 events of 2 KB."""


def test_a_client_that_does_not_read_is_dropped_and_its_work_ended(llm):
    ended = threading.Semaphore(0)
    # The system itself ends such a connection after twice the time, uncounted: a slow machine must not come after it.
    with serving(llm, ended, limits=ServerLimits(read_timeout=2.0)) as url, not_reading(url, MANY):
        assert ended.acquire(timeout=PATIENCE)
        wait_until(lambda: llm.stats().free_blocks == llm.stats().num_blocks)
        assert counts(url)["read_timeout"] == 1
        assert httpx.post(url + COMPLETIONS, json={"prompt": "a"}).status_code == 200


def test_what_is_generated_for_a_client_that_does_not_read_is_bounded(llm):
    with serving(llm, limits=ServerLimits(max_unread_tokens=50, max_unsent_bytes=1000)) as url:
        before = llm.stats().generated_tokens
        with not_reading(url, MANY) as connection:
            # The answer is not read, and yet the engine is free again, long before all of it was made.
            wait_until(lambda: llm.stats().running == 0 and llm.stats().waiting == 0, PATIENCE)
            assert llm.stats().generated_tokens - before < 16 * 4 * 400
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            said = b""
            while b"[DONE]" not in said:
                said = said[-100:] + connection.recv(1 << 20)
        wait_until(lambda: counts(url)["max_unread_tokens"] == 1)


def test_a_client_that_reads_is_not_cut_off(llm):
    limits = ServerLimits(max_unread_tokens=200, max_unsent_bytes=1000, read_timeout=5.0)
    body = {**LONG, "n": 4, "stream": True}
    with serving(llm, limits=limits) as url, httpx.stream("POST", url + COMPLETIONS, json=body, timeout=60) as stream:
        said = stream.read()
    assert b"error" not in said
    assert said.count(b'"finish_reason":"length"') == 4


def test_pipelined_requests_are_answered_in_order(small):
    with connected(small) as connection:
        one = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-Id: one\r\n\r\n"
        connection.sendall(one + one.replace(b"one", b"two") + one.replace(b"one", b"three\r\nConnection: close"))
        said = received(connection)
    assert [said.index(b"x-request-id: " + name) for name in (b"one", b"two", b"three")] == sorted(
        said.index(b"x-request-id: " + name) for name in (b"one", b"two", b"three")
    )
    assert said.count(b"200 OK") == 3


def test_no_limit_is_nought_endless_or_beyond_what_the_engine_takes():
    for field in dataclasses.fields(ServerLimits):
        for value in (0, -1, float("inf"), float("nan")):
            with pytest.raises(ConfigError, match=field.name):
                ServerLimits(**{field.name: value})
        most = field.metadata["most"]
        if most is not None:
            with pytest.raises(ConfigError, match=f"{field.name} must be at most {most}"):
                ServerLimits(**{field.name: most + 1})


def test_only_limits_become_labels():
    known = limit_names()
    assert len(set(known)) == len(known)
    assert named_limit("there are more than 5 (max_n)", known) == "max_n"
    assert named_limit("too large (--max-body-bytes); try again", known) == "max_body_bytes"
    assert named_limit("the model '(anything)' is not served here", known) is None
    assert named_limit("(max_n) was said, but it is (max_tools)", known) == "max_tools"


def test_a_server_of_its_own_is_not_needed_for_limits():
    import subprocess
    import sys

    code = "import sys, kvarn.server.limits; assert not {'fastapi', 'uvicorn', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_connection_is_used_again(small):
    connection = http.client.HTTPConnection(small.removeprefix("http://"), timeout=PATIENCE)
    with contextlib.closing(connection):
        for _ in range(3):
            connection.request("GET", "/health")
            assert connection.getresponse().read() == b'{"status":"ok"}'
