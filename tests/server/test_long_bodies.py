"""A body that takes long to read holds up nobody else."""

import asyncio
import gc
import json
import threading

import httpx
import pytest
from gated_engine import PATIENCE
from live_server import posted, serving
from tiny_engine import handmade_engine

from kvarn.engine import AsyncLLM
from kvarn.server import answering
from kvarn.server.body import parse

LIMIT = 8 << 20
COMPLETIONS = "/v1/completions"
JSON = {"content-type": "application/json"}
BIG = 1 << 20
"""Bodies longer than this stand for those that take long."""


@pytest.fixture
def held(monkeypatch):
    """(begun, go on): long bodies are read only when `go on` is set."""
    begun, go_on = threading.Semaphore(0), threading.Event()

    def slow_parse(model, body):
        if len(body) > BIG:
            begun.release()
            assert go_on.wait(PATIENCE)
        return parse(model, body)

    monkeypatch.setattr(answering, "parse", slow_parse)
    yield begun, go_on
    go_on.set()


@pytest.fixture(scope="module")
def url():
    llm = AsyncLLM(handmade_engine())
    with serving(llm) as base:
        yield base
    asyncio.run(llm.close())


def of_length(length):
    """A body of this many bytes that is refused only after all of it is read."""
    body = {"prompt": "", "stop": 5}
    return {**body, "prompt": "x" * (length - len(json.dumps(body)))}


def test_others_are_answered_while_one_is_read(url, held):
    begun, go_on = held
    with posted(url, COMPLETIONS, of_length(LIMIT)) as hostile:
        assert begun.acquire(timeout=PATIENCE)
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/v1/models").status_code == 200
        assert httpx.post(url + COMPLETIONS, json={"prompt": "a"}).status_code == 200
        go_on.set()
        assert hostile.getresponse().status == 400


def test_the_server_is_healthy_while_as_many_are_read_as_can_be(url, held):
    begun, go_on = held
    with posted(url, COMPLETIONS, of_length(LIMIT)) as one, posted(url, COMPLETIONS, of_length(LIMIT)) as two:
        assert begun.acquire(timeout=PATIENCE)
        assert begun.acquire(timeout=PATIENCE)
        with posted(url, COMPLETIONS, {"prompt": "a"}) as patient:
            assert httpx.get(f"{url}/health").status_code == 200
            go_on.set()
            assert patient.getresponse().status == 200
        assert [one.getresponse().status, two.getresponse().status] == [400, 400]


def test_the_limit_is_the_last_length_that_is_read(url):
    assert httpx.post(url + COMPLETIONS, json=of_length(LIMIT - 100)).json()["error"]["param"] == "stop"
    exact = json.dumps(of_length(LIMIT)).encode()
    assert len(exact) == LIMIT
    assert httpx.post(url + COMPLETIONS, content=exact, headers=JSON).status_code == 400
    larger = httpx.post(url + COMPLETIONS, content=exact + b" ", headers=JSON)
    assert larger.status_code == 413
    assert str(LIMIT) in larger.json()["error"]["message"]


def test_reading_leaves_the_garbage_collector_as_it_was(url):
    assert gc.isenabled()
    for content in (b"{}", b"[" * 100_000, b"{"):
        assert httpx.post(url + COMPLETIONS, content=content, headers=JSON).status_code == 400
        assert gc.isenabled()
    gc.disable()
    try:
        assert httpx.post(url + COMPLETIONS, content=b"{}", headers=JSON).status_code == 400
        assert not gc.isenabled()
    finally:
        gc.enable()
