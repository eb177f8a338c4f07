"""What a client asks of speculation and is told of it."""

import asyncio

import httpx
import pytest
from live_server import serving
from prometheus_client.parser import text_string_to_metric_families
from tiny_engine import tiny_engine

from kvarn.config import SpeculativeConfig
from kvarn.engine import AsyncLLM

TEXT = "round and round the mill wheel goes, round and round the mill wheel goes, round and"
ROUTES = [("completions", {"prompt": TEXT}), ("chat/completions", {"messages": [{"role": "user", "content": TEXT}]})]


@pytest.fixture(scope="module")
def guessing():
    """A server that guesses up to four tokens ahead."""
    engine = AsyncLLM(tiny_engine(backend="cpu", dtype="float16", num_blocks=256, speculative=SpeculativeConfig(k=4)))
    with serving(engine, served_model_names=("served",)) as base:
        yield base
    asyncio.run(engine.close())


def answer(url, route, body, **fields):
    sent = {**body, "max_tokens": 60, "temperature": 0, "ignore_eos": True, **fields}
    response = httpx.post(f"{url}/v1/{route}", json=sent, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def counters(url):
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return {
        (
            sample.name.removeprefix("kvarn:spec_decode_"),
            sample.labels.get("position", sample.labels.get("source", "")),
        ): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("kvarn:spec_decode_")
    }


@pytest.mark.parametrize(("route", "body"), ROUTES)
def test_usage_and_metrics_say_what_was_guessed(url, guessing, route, body):
    before = counters(guessing)
    plain, guessed = answer(url, route, body, n=2), answer(guessing, route, body, n=2)
    assert guessed["choices"] == plain["choices"]
    assert "completion_tokens_details" not in plain["usage"]
    details = guessed["usage"].pop("completion_tokens_details")
    accepted, rejected = details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]
    assert 0 < accepted < guessed["usage"]["completion_tokens"] == 120
    gained = {name: value - before.get(name, 0) for name, value in counters(guessing).items()}
    assert gained[("num_accepted_tokens_total", "")] == accepted
    assert gained[("num_draft_tokens_total", "")] == accepted + rejected
    assert gained[("num_accepted_tokens_per_source_total", "copied")] == accepted
    assert gained[("num_draft_tokens_per_source_total", "copied")] == accepted + rejected
    assert gained[("num_draft_tokens_per_source_total", "computed")] == 0
    by_position = [gained.get(("num_accepted_tokens_per_pos_total", str(place)), 0) for place in range(5)]
    assert sum(by_position) == accepted
    assert by_position == sorted(by_position, reverse=True)
    assert by_position[0] <= gained[("num_drafts_total", "")]
    assert by_position[4] == 0


def test_a_stream_says_it_at_its_end(guessing):
    body = {"prompt": TEXT, "max_tokens": 40, "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    with httpx.stream("POST", f"{guessing}/v1/completions", json=body, timeout=60) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: {")]
    assert '"accepted_prediction_tokens"' in lines[-1]
    assert len(lines) - 1 < 40, "several tokens in one event"


def test_an_answer_may_do_without(url, guessing):
    assert "completion_tokens_details" not in answer(guessing, *ROUTES[0], num_speculative_tokens=0)["usage"]
    assert answer(url, *ROUTES[0], num_speculative_tokens=0)["usage"]["completion_tokens"] == 60


@pytest.mark.parametrize(("server", "value", "words"), [
    ("url", 1, "without speculative decoding"), ("guessing", 5, "must be 0 to 4"), ("guessing", -1, "at least 0"),
    ("guessing", "many", "an integer"),
])  # fmt: skip
def test_more_than_the_server_does_is_refused_by_name(request, server, value, words):
    base = request.getfixturevalue(server)
    for route, body in ROUTES:
        response = httpx.post(f"{base}/v1/{route}", json={**body, "num_speculative_tokens": value}, timeout=60)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "num_speculative_tokens")
        assert words in error["message"]
