"""What the dashboard is told: the engine's numbers, and the load of each tenant by its name, never by its key."""

import json

import httpx
import pytest
from gated_engine import gated_llm
from live_server import posted, serving, wait_until

from kvarn.server.load import WINDOW_SECONDS, TenantLoad, TenantLoads

COMPLETIONS = "/v1/completions"
LONG = {"prompt": "four", "max_tokens": 400, "ignore_eos": True}


def state_of(url, key=None):
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    response = httpx.get(f"{url}/dashboard/state", headers=headers)
    assert response.status_code == 200
    return response.json()


def test_it_shows_what_runs_what_waits_and_the_cache():
    with (
        gated_llm(max_num_seqs=1) as (llm, gate),
        serving(llm, served_model_names=("served",)) as url,
        posted(url, COMPLETIONS, {**LONG, "n": 2}),
    ):
        gate.stand_in_step(3)
        (model,) = state_of(url)["models"]
        assert model["name"] == "served"
        assert model["state"] == "loaded"
        assert (model["running"], model["waiting"], model["max_running"]) == (1, 1, 1)
        assert model["counters"]["generated_tokens"] == 2
        assert model["counters"]["prompt_tokens"] == 4
        blocks = model["blocks"]
        assert blocks["used"] > 0
        assert sum(blocks.values()) == llm.stats().num_blocks
        assert sum(model["histograms"]["ttft"]["counts"]) == 1
        for histogram in model["histograms"].values():
            assert len(histogram["counts"]) == len(histogram["bounds"]) + 1
        assert set(model["rejections"]) == set(llm.stats().rejections)


def test_it_is_there_while_the_model_loads():
    with serving(None) as url:
        state = state_of(url)
    (model,) = state["models"]
    assert (model["state"], model["running"], model["max_running"]) == ("unloaded", 0, 0)
    assert set(model["blocks"].values()) == {0}
    assert state["tenants"] == []


def test_tenants_are_told_by_name_and_keys_by_nobody():
    keys = ("secret-of-ann", "secret-of-bob")
    with gated_llm() as (llm, gate), serving(llm, api_keys=keys) as url:
        with posted(url, COMPLETIONS, LONG, key=keys[0]):
            gate.stand_in_step(4)
            wait_until(lambda: [t["tokens"] for t in state_of(url, keys[0])["tenants"]] == [4 + 3])
            with posted(url, COMPLETIONS, LONG, key=keys[1]):
                wait_until(lambda: len(state_of(url, keys[0])["tenants"]) == 2)
                text = json.dumps(state_of(url, keys[0]))
                ann, bob = state_of(url, keys[0])["tenants"]
        wait_until(lambda: not any(t["answering"] or t["waiting"] for t in state_of(url, keys[0])["tenants"]))
    assert ann == {"name": ann["name"], "answering": 1, "waiting": 0, "tokens": 4 + 3}
    assert bob == {"name": bob["name"], "answering": 0, "waiting": 1, "tokens": 0}
    assert not any(key in text for key in keys)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_a_minute_of_tokens_is_counted_and_then_forgotten():
    clock = Clock()
    loads = TenantLoads(clock)
    with loads.request("ann", 10) as request:
        assert loads.snapshot() == (TenantLoad("ann", 0, 1, 0),)
        request.gained(0)
        assert loads.snapshot() == (TenantLoad("ann", 0, 1, 0),)
        request.gained(1)
        clock.now += 0.5
        request.gained(2)
        assert loads.snapshot() == (TenantLoad("ann", 1, 0, 13),)
        clock.now += WINDOW_SECONDS - 1
        request.gained(5)
        assert loads.snapshot() == (TenantLoad("ann", 1, 0, 18),)
        clock.now += 1
        assert loads.snapshot() == (TenantLoad("ann", 1, 0, 5),)
    assert loads.snapshot() == (TenantLoad("ann", 0, 0, 5),)
    clock.now += WINDOW_SECONDS
    assert loads.snapshot() == ()


def test_a_request_that_fails_is_not_in_flight_any_more():
    loads = TenantLoads(Clock())
    with loads.request("bob", 1), pytest.raises(ValueError), loads.request("ann", 10):
        raise ValueError
    assert loads.snapshot() == ()


def test_who_got_most_comes_first():
    loads = TenantLoads(Clock())
    for name, tokens in (("ann", 5), ("bob", 50), ("cleo", 5)):
        with loads.request(name, 0) as request:
            request.gained(tokens)
    assert [load.name for load in loads.snapshot()] == ["bob", "ann", "cleo"]
