"""/metrics is what Prometheus reads, and it counts what happens."""

import asyncio
import re
import threading
from pathlib import Path

import httpx
import pytest
from gated_engine import PATIENCE, gated_llm
from live_server import posted, serving, wait_until
from prometheus_client.parser import text_string_to_metric_families

from kvarn.engine import EngineStats
from kvarn.server.http_numbers import HttpNumbers
from kvarn.server.metrics import BuildCollector, EngineCollector, EngineNumbers, exposition
from kvarn.server.watching import Watched

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
OF_THE_SERVER = {"kvarn:build_info", "kvarn:limit_refusals"}
"""Those that have no model."""
COMPLETIONS = "/v1/completions"
LONG = {"prompt": "four", "n": 2, "max_tokens": 400, "ignore_eos": True}


def families(url):
    """What a scrape brings: the families by their names."""
    response = httpx.get(f"{url}/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert all(family.documentation for family in found.values())
    return found


def values(url):
    """The engine's samples by name and labels, but for model_name."""
    found = {}
    for name, family in families(url).items():
        for sample in family.samples if name.startswith("kvarn:") and name not in OF_THE_SERVER else ():
            assert sample.labels.pop("model_name") == "served"
            found[".".join([sample.name, *sample.labels.values()])] = sample.value
    return found


def count(found, name):
    """Observations of a histogram."""
    return found[f"kvarn:{name}_count"]


@pytest.mark.parametrize("kind", ["Gauges", "Counters", "Histograms"])
def test_the_page_tells_every_metric(kind):
    section = PAGE.split(f"## {kind}\n")[1].split("\n## ")[0]
    names = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")]
    told = set(re.findall(r"`(kvarn:[a-z0-9_]+)`", "".join(names)))
    collectors = (EngineCollector([EngineNumbers("any", EngineStats())]), BuildCollector())
    real = {m.name for collector in collectors for m in collector.collect() if m.type == kind.lower()[:-1]}
    assert told == real


def test_the_page_tells_what_process_and_server_say():
    with serving(None) as url:
        httpx.get(f"{url}/health")
        named = set(families(url)) - OF_THE_SERVER
    told = set(re.findall(r"`((?:http|process)_[a-z_]+?)(?:_total)?`", PAGE))
    assert told == {name for name in named if not name.startswith("kvarn:")}


def test_nothing_has_happened_at_first():
    with gated_llm() as (llm, _), serving(llm, served_model_names=("served",)) as url:
        found = values(url)
    assert found.pop("kvarn:engine_up") == 1
    assert {value for name, value in found.items() if not name.startswith("kvarn:cache_config_info")} == {0}


def test_metrics_are_there_while_the_model_loads():
    with serving(None) as url:
        assert httpx.get(f"{url}/health").status_code == 503
        requests = families(url)["http_requests"].samples
    assert [(s.labels, s.value) for s in requests] == [({"handler": "/health", "method": "GET", "status": "503"}, 1)]


def test_paths_that_have_no_route_are_one(url):
    def others():
        samples = families(url)["http_requests"].samples
        return sum(s.value for s in samples if s.labels == {"handler": "other", "method": "GET", "status": "404"})

    before, known = others(), len(families(url)["http_requests"].samples)
    for path in ("/a", "/b", "/v2/c"):
        assert httpx.get(url + path).status_code == 404
    assert others() == before + 3
    assert len(families(url)["http_requests"].samples) <= known + 1


def test_several_models_are_told_apart():
    engines = [EngineNumbers(name, EngineStats(running=running)) for name, running in (("a", 1), ("b", 2))]
    found = {f.name: f for f in text_string_to_metric_families(exposition(engines).decode())}
    running = {s.labels["model_name"]: s.value for s in found["kvarn:num_requests_running"].samples}
    assert running == {"a": 1, "b": 2}
    buckets = found["kvarn:inter_token_latency_seconds"].samples
    assert {s.labels["model_name"] for s in buckets} == {"a", "b"}


def test_settings_of_the_cache_are_labels(url):
    (info,) = families(url)["kvarn:cache_config_info"].samples
    assert info.value == 1
    expected = {"model_name": "served", "block_size": "16", "num_blocks": "256", "cache_dtype": "float16"}
    assert expected.items() <= info.labels.items()


def test_gauges_show_what_runs_and_what_waits():
    with (
        gated_llm(max_num_seqs=1) as (llm, gate),
        serving(llm, served_model_names=("served",)) as url,
        posted(url, COMPLETIONS, LONG),
    ):
        gate.stand_in_step(3)
        found = values(url)
        assert found["kvarn:num_requests_running"] == 1
        assert found["kvarn:num_requests_waiting"] == 1
        assert 0 < found["kvarn:kv_cache_usage_perc"] < 1


def test_counters_go_up_with_each_step():
    with (
        gated_llm() as (llm, gate),
        serving(llm, served_model_names=("served",)) as url,
        posted(url, COMPLETIONS, {**LONG, "n": 1}),
    ):
        counts = []
        for step in (2, 3, 4):
            gate.stand_in_step(step)
            found = values(url)
            counts.append([found[f"kvarn:{name}_total"] for name in ("engine_steps", "generation_tokens")])
        assert counts == [[1, 1], [2, 2], [3, 3]]
        assert found["kvarn:prompt_tokens_total"] == 4


def test_counters_never_go_down_when_a_request_ends():
    with gated_llm() as (llm, gate), serving(llm, served_model_names=("served",)) as url:
        gate.open()
        for requests in (1, 2):
            assert httpx.post(url + COMPLETIONS, json={**LONG, "max_tokens": 7}).status_code == 200
            found = values(url)
            assert found["kvarn:generation_tokens_total"] == requests * 2 * 7
            assert found["kvarn:prompt_tokens_total"] == requests * 4


def test_requests_and_answers_are_in_the_histograms():
    with gated_llm() as (llm, gate), serving(llm, served_model_names=("served",)) as url:
        gate.open()
        assert httpx.post(url + COMPLETIONS, json={**LONG, "max_tokens": 7}).status_code == 200
        found = values(url)
    of_requests = (
        "time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
        "request_prefill_time_seconds", "request_decode_time_seconds", "request_inference_time_seconds",
        "request_prompt_tokens", "request_prefill_kv_computed_tokens", "request_params_n", "request_params_max_tokens",
    )  # fmt: skip
    assert {count(found, name) for name in of_requests} == {1}
    of_answers = ("request_generation_tokens", "request_time_per_output_token_seconds")
    assert {count(found, name) for name in of_answers} == {2}
    assert count(found, "inter_token_latency_seconds") == 2 * 6
    assert found["kvarn:request_generation_tokens_sum"] == 2 * 7
    assert found["kvarn:request_generation_tokens_bucket.5.0"] == 0
    assert found["kvarn:request_generation_tokens_bucket.10.0"] == 2
    assert found["kvarn:request_success_total.length"] == 2
    steps = ("engine_step_seconds", "iteration_tokens_total", "output_delivery_seconds")
    assert [count(found, name) for name in steps] == [8, 8, 8]  # the second answer begins a step later
    parts = [found[f"kvarn:request_{part}_time_seconds_sum"] for part in ("queue", "prefill", "decode")]
    assert sum(parts) == pytest.approx(found["kvarn:e2e_request_latency_seconds_sum"])


def test_a_client_that_leaves_is_counted_as_that():
    ended = threading.Semaphore(0)
    with gated_llm() as (llm, gate), serving(llm, ended, served_model_names=("served",)) as url:
        with posted(url, COMPLETIONS, LONG):
            gate.stand_in_step(3)
        assert ended.acquire(timeout=PATIENCE)
        gate.open()
        wait_until(lambda: values(url)["kvarn:request_success_total.abort"] == 2)
        found = values(url)
        assert count(found, "time_to_first_token_seconds") == 1
        assert count(found, "e2e_request_latency_seconds") == 0
        wait_until(lambda: ("/v1/completions", "499") in {
            (s.labels["handler"], s.labels["status"]) for s in families(url)["http_requests"].samples
        })  # fmt: skip


def test_a_route_that_breaks_is_a_500():
    async def broken(scope, receive, send):
        raise RuntimeError("it is broken")

    numbers = HttpNumbers()
    scope = {"type": "http", "method": "BREW", "path": "/"}
    with pytest.raises(RuntimeError):
        asyncio.run(Watched(broken, [numbers])(scope, None, None))
    assert numbers.responses == {("other", "other", "500"): 1}
    assert numbers.seconds["other", "5xx"].count == 1
