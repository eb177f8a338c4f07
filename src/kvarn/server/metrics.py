"""The engine's statistics in Prometheus' text format, under vLLM's names with `kvarn:` before them."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvarn.engine import EngineStats


class EngineCollector(Collector):
    """One snapshot of an engine as metrics."""

    def __init__(self, stats: EngineStats, model: str) -> None:
        self._stats = stats
        self._model = model

    def collect(self) -> Iterator[Metric]:
        """The metrics, each with the model's name as a label. Nothing tells tenants apart."""
        stats = self._stats
        used = 1 - stats.free_blocks / stats.num_blocks if stats.num_blocks else 0.0
        gauges = (
            ("num_requests_running", "Sequences that take part in the steps.", stats.running),
            ("num_requests_waiting", "Sequences that wait: new or preempted.", stats.waiting),
            ("num_tokens_queued", "Prompt tokens of the requests that have not begun.", stats.queued_tokens),
            ("kv_cache_usage_perc", "Share of the KV cache's blocks that sequences hold, 0 to 1.", used),
            ("prefix_cache_blocks", "Blocks that only the prefix cache holds.", stats.cached_blocks),
        )
        counters = (
            ("prompt_tokens", "Prompt tokens computed, or found in the prefix cache.", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated.", stats.generated_tokens),
            ("num_preemptions", "Preemptions.", stats.preemptions),
            ("prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.prefix_queries),
            ("prefix_cache_hits", "Tokens found in the prefix cache.", stats.prefix_hits),
            ("prefix_cache_evicted_tokens", "Tokens that the prefix cache let go of.", stats.evicted_tokens),
            ("kv_offload_saved_tokens", "Tokens saved to the second tier of the KV cache.", stats.saved_tokens),
            ("kv_offload_loaded_tokens", "Tokens loaded from it.", stats.loaded_tokens),
            ("spec_decode_num_drafts", "Drafts that were verified.", stats.drafts),
            ("spec_decode_num_draft_tokens", "Tokens of those drafts.", stats.draft_tokens),
            ("spec_decode_num_accepted_tokens", "Tokens of drafts that became output.", stats.accepted_tokens),
            ("spec_decode_draft_seconds", "Time spent on proposing drafts.", stats.draft_seconds),
            ("grammar_compilations", "Grammars compiled.", stats.grammars_compiled),
            ("grammar_cache_hits", "Requests whose grammar was compiled already.", stats.grammar_cache_hits),
            ("grammar_refusals", "Grammars that could not be compiled within limits.", stats.grammars_refused),
            ("grammar_compile_seconds", "Time spent on compiling them.", stats.grammar_compile_seconds),
            ("grammar_mask_seconds", "Time spent on masks, beside the model.", stats.grammar_mask_seconds),
            ("grammar_wait_seconds", "Time for which steps waited for masks.", stats.grammar_wait_seconds),
            ("engine_steps", "Steps of the engine.", stats.steps),
            ("engine_failed_steps", "Steps that failed.", stats.failed_steps),
            ("engine_restarts", "Times that the engine began anew after a failure.", stats.restarts),
        )
        kinds = ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters))
        for kind, metrics in kinds:
            for name, text, value in metrics:
                family = kind(f"kvarn:{name}", text, labels=["model_name"])
                family.add_metric([self._model], value)
                yield family
        by_position = CounterMetricFamily(
            "kvarn:spec_decode_num_accepted_tokens_per_pos",
            "Tokens of drafts that became output, by how far ahead they were guessed.",
            labels=["model_name", "position"],
        )
        for position, count in enumerate(stats.accepted_by_position):
            by_position.add_metric([self._model, str(position)], count)
        yield by_position
        refused = CounterMetricFamily(
            "kvarn:request_rejections", "Requests refused with 429.", labels=["model_name", "reason"]
        )
        for reason, count in stats.rejections.items():
            refused.add_metric([self._model, reason], count)
        yield refused


def exposition(stats: EngineStats, model: str, *more: Collector) -> bytes:
    """The body of an answer to a scrape. more: what else is told."""
    registry = CollectorRegistry(auto_describe=False)
    for collector in (EngineCollector(stats, model), *more):
        registry.register(collector)
    return generate_latest(registry)
