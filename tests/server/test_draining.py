"""A server that is told to end finishes what it has, refuses what comes, and goes; probes say so at every moment."""

import json
import signal

import httpx
import pytest
from ending_server import ending_server
from gated_engine import Broken, gated_llm
from live_server import posted, serving, wait_until

COMPLETIONS = "/v1/completions"
BODY = {"prompt": "four", "max_tokens": 20, "ignore_eos": True, "temperature": 0}


def probe(url, path):
    response = httpx.get(f"{url}{path}")
    return response.status_code, response.json().get("error", {}).get("code")


def answer_of(connection):
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def events_of(connection):
    response = connection.getresponse()
    assert response.status == 200
    lines = response.read().decode().split("\n\n")
    return [line.removeprefix("data: ") for line in lines if line]


def test_probes_while_the_model_loads():
    with serving(None) as url:
        assert probe(url, "/health/live") == (200, None)
        for path in ("/health/ready", "/health"):
            assert probe(url, path) == (503, "loading")


def test_probes_of_a_server_that_answers(url):
    for path in ("/health/live", "/health/ready", "/health"):
        assert probe(url, path) == (200, None)


def test_draining_loses_nothing_and_takes_nothing():
    with gated_llm(max_num_seqs=1) as (llm, gate), ending_server(llm) as server:
        url = server.url
        gate.open()
        quiet = httpx.post(url + COMPLETIONS, json=BODY).json()["choices"]
        gate.hold()
        begun = gate.begun
        with posted(url, COMPLETIONS, {**BODY, "stream": True}) as stream, posted(url, COMPLETIONS, BODY) as whole:
            gate.stand_in_step(begun + 3)
            wait_until(lambda: server.state.door.inside == 2)
            wait_until(lambda: llm.stats().queued == 1)
            server.signal()
            refused = httpx.post(url + COMPLETIONS, json=BODY)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "draining"
            assert {"retry-after", "connection"} <= set(refused.headers)
            assert probe(url, "/health/live") == (200, None)
            assert probe(url, "/health/ready") == probe(url, "/health") == (503, "draining")
            assert httpx.get(f"{url}/v1/models").status_code == 200
            assert not server.is_ending
            gate.open()
            *chunks, done = events_of(stream)
            assert done == "[DONE]"
            assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks) == quiet[0]["text"]
            assert answer_of(whole)[1]["choices"] == quiet
        assert server.ended()
    assert not llm.is_running or llm.stats().running == 0


def test_what_is_not_done_in_time_is_told_so():
    with gated_llm() as (llm, gate), ending_server(llm, drain_seconds=0.1) as server:
        with (
            posted(server.url, COMPLETIONS, {**BODY, "stream": True}) as stream,
            posted(server.url, COMPLETIONS, BODY) as whole,
        ):
            wait_until(lambda: llm.stats().queued + llm.stats().running >= 2)
            gate.stand_in_step(5)
            server.signal()
            wait_until(lambda: server.is_ending)
            server.do(llm.close())
            wait_until(lambda: llm._loop._closing)
            gate.open()
            *chunks, error, done = events_of(stream)
            assert done == "[DONE]"
            assert 1 <= len(chunks) < 20
            assert json.loads(error)["error"]["code"] == "engine_error"
            assert answer_of(whole)[0] == 500
        assert server.ended()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(second):
    body = {**BODY, "max_tokens": 400, "stream": True}
    with (
        gated_llm() as (llm, gate),
        ending_server(llm, drain_seconds=3600) as server,
        posted(server.url, COMPLETIONS, body),
    ):
        gate.stand_in_step(5)
        server.signal()
        assert probe(server.url, "/health/live") == (200, None)
        assert not server.is_ending
        server.signal(second)
        assert server.ended(), "the engine still stands in its step"


def test_with_nothing_to_do_it_ends_at_once():
    with gated_llm() as (llm, _), ending_server(llm, drain_seconds=3600) as server:
        server.signal()
        assert server.ended()


def test_an_administrator_may_have_it_drain_and_go_on():
    with gated_llm() as (llm, gate), ending_server(llm) as server:
        with posted(server.url, COMPLETIONS, BODY) as whole:
            gate.stand_in_step(3)
            drained = server.do(server.state.drain())
            wait_until(lambda: server.state.door.is_closed)
            assert httpx.post(server.url + COMPLETIONS, json=BODY).status_code == 503
            assert not drained.done()
            gate.open()
            assert answer_of(whole)[0] == 200
            drained.result(10)
        assert probe(server.url, "/health/ready") == (503, "draining")
        assert not server.is_ending
        server.state.resume()
        assert httpx.post(server.url + COMPLETIONS, json=BODY).status_code == 200
        assert probe(server.url, "/health/ready") == (200, None)


def test_a_client_that_leaves_while_it_drains_is_not_waited_for():
    with gated_llm() as (llm, gate), ending_server(llm, drain_seconds=3600) as server:
        with posted(server.url, COMPLETIONS, {**BODY, "max_tokens": 400}):
            gate.stand_in_step(3)
            server.signal()
        wait_until(lambda: server.state.door.inside == 0)
        gate.open()
        assert server.ended()


def test_an_engine_that_fails_is_back_at_once():
    with gated_llm(wrap=Broken) as (llm, gate), serving(llm) as url:
        gate.open()
        expected = httpx.post(url + COMPLETIONS, json=BODY).json()["choices"]
        gate.hold()
        begun = gate.begun
        with posted(url, COMPLETIONS, {**BODY, "stream": True}) as stream, posted(url, COMPLETIONS, BODY) as whole:
            wait_until(lambda: llm.stats().queued + llm.stats().running >= 2)
            gate.stand_in_step(begun + 4)
            gate.inner.failures = 1
            gate.finish_step()
            *_, error, done = events_of(stream)
            assert done == "[DONE]"
            status, body = answer_of(whole)
            assert status == 500
            for said in (json.loads(error)["error"], body["error"]):
                assert said["code"] == "engine_error"
                assert "error id" in said["message"]
        assert probe(url, "/health/ready") == (503, "restarting")
        assert probe(url, "/health/live") == (200, None)
        gate.open()
        assert httpx.post(url + COMPLETIONS, json=BODY).json()["choices"] == expected
        assert probe(url, "/health/ready") == (200, None)
        assert "kvarn:engine_restarts_total{" in httpx.get(f"{url}/metrics").text
        assert llm.stats().restarts == 1


def test_an_engine_that_hangs_is_told_by_liveness_where_that_is_wanted():
    body = {**BODY, "stream": True}
    with (
        gated_llm() as (llm, gate),
        serving(llm, watchdog_seconds=0.2) as watched,
        serving(llm) as url,
        posted(url, COMPLETIONS, body) as connection,
    ):
        gate.stand_in_step(3)
        wait_until(lambda: probe(watched, "/health/live") == (503, "engine_stuck"))
        assert probe(watched, "/health/ready") == (503, "engine_stuck")
        assert "in one step for" in httpx.get(f"{watched}/health/live").json()["error"]["message"]
        assert probe(url, "/health/live") == (200, None)
        name, busy = next(line.split() for line in httpx.get(f"{url}/metrics").text.splitlines()
                          if line.startswith("kvarn:engine_busy_seconds{"))  # fmt: skip
        assert float(busy) > 0.2, name
        gate.open()
        assert list(events_of(connection))[-1] == "[DONE]"
        wait_until(lambda: probe(watched, "/health/live") == (200, None))
        wait_until(lambda: llm.busy_seconds == 0)


def test_an_engine_that_does_not_come_back_is_told_by_readiness():
    with gated_llm(wrap=Broken) as (llm, gate), serving(llm) as url:
        gate.inner.failures = 10
        gate.open()
        assert httpx.post(url + COMPLETIONS, json=BODY).status_code == 500
        wait_until(lambda: not llm.is_running)
        assert probe(url, "/health/live") == (200, None)
        assert probe(url, "/health/ready") == (503, "engine_stopped")
        refused = httpx.post(url + COMPLETIONS, json=BODY)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "engine_stopped"
        (card,) = httpx.get(f"{url}/v1/models").json()["data"]
        assert card["state"] == "failed"
