"""/metrics is what Prometheus reads, and it counts what happens."""

import httpx
from gated_engine import gated_llm
from live_server import posted, serving
from prometheus_client.parser import text_string_to_metric_families

COMPLETIONS = "/v1/completions"
LONG = {"prompt": "four", "n": 2, "max_tokens": 400, "ignore_eos": True}


def scraped(url):
    """(kind of each metric family, value of each sample)."""
    response = httpx.get(f"{url}/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    kinds, values = {}, {}
    for family in text_string_to_metric_families(response.text):
        assert family.documentation
        kinds[family.name] = family.type
        for sample in family.samples:
            of_a_model = family.name != "kvarn:limit_refusals"  # that is of the server
            assert sample.labels.pop("model_name", None) == ("served" if of_a_model else None)
            values[".".join([sample.name, *sample.labels.values()])] = sample.value
    return kinds, values


def test_every_metric_has_a_kind():
    with gated_llm() as (llm, _), serving(llm, served_model_names=("served",)) as url:
        kinds, values = scraped(url)
    assert kinds == {
        "kvarn:num_requests_running": "gauge",
        "kvarn:num_requests_waiting": "gauge",
        "kvarn:num_tokens_queued": "gauge",
        "kvarn:kv_cache_usage_perc": "gauge",
        "kvarn:prefix_cache_blocks": "gauge",
        "kvarn:prompt_tokens": "counter",
        "kvarn:generation_tokens": "counter",
        "kvarn:num_preemptions": "counter",
        "kvarn:prefix_cache_queries": "counter",
        "kvarn:prefix_cache_hits": "counter",
        "kvarn:prefix_cache_evicted_tokens": "counter",
        "kvarn:kv_offload_saved_tokens": "counter",
        "kvarn:kv_offload_loaded_tokens": "counter",
        "kvarn:spec_decode_num_drafts": "counter",
        "kvarn:spec_decode_num_draft_tokens": "counter",
        "kvarn:spec_decode_num_accepted_tokens": "counter",
        "kvarn:spec_decode_num_accepted_tokens_per_pos": "counter",
        "kvarn:spec_decode_draft_seconds": "counter",
        "kvarn:grammar_compilations": "counter",
        "kvarn:grammar_cache_hits": "counter",
        "kvarn:grammar_refusals": "counter",
        "kvarn:grammar_compile_seconds": "counter",
        "kvarn:grammar_mask_seconds": "counter",
        "kvarn:grammar_wait_seconds": "counter",
        "kvarn:engine_steps": "counter",
        "kvarn:engine_failed_steps": "counter",
        "kvarn:engine_restarts": "counter",
        "kvarn:request_rejections": "counter",
        "kvarn:limit_refusals": "counter",
    }
    assert set(values.values()) == {0.0}


def test_gauges_show_what_runs_and_what_waits():
    with (
        gated_llm(max_num_seqs=1) as (llm, gate),
        serving(llm, served_model_names=("served",)) as url,
        posted(url, COMPLETIONS, LONG),
    ):
        gate.stand_in_step(3)
        values = scraped(url)[1]
        assert values["kvarn:num_requests_running"] == 1
        assert values["kvarn:num_requests_waiting"] == 1
        assert 0 < values["kvarn:kv_cache_usage_perc"] < 1


def test_counters_go_up_with_each_step():
    with (
        gated_llm() as (llm, gate),
        serving(llm, served_model_names=("served",)) as url,
        posted(url, COMPLETIONS, {**LONG, "n": 1}),
    ):
        counts = []
        for step in (2, 3, 4):
            gate.stand_in_step(step)
            values = scraped(url)[1]
            counts.append([values[f"kvarn:{name}_total"] for name in ("engine_steps", "generation_tokens")])
        assert counts == [[1, 1], [2, 2], [3, 3]]
        assert values["kvarn:prompt_tokens_total"] == 4


def test_counters_never_go_down_when_a_request_ends():
    with gated_llm() as (llm, gate), serving(llm, served_model_names=("served",)) as url:
        gate.open()
        for requests in (1, 2):
            assert httpx.post(url + COMPLETIONS, json={**LONG, "max_tokens": 7}).status_code == 200
            values = scraped(url)[1]
            assert values["kvarn:generation_tokens_total"] == requests * 2 * 7
            assert values["kvarn:prompt_tokens_total"] == requests * 4
