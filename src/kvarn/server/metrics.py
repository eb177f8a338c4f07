"""What `GET /metrics` says, in Prometheus' text format: engines under vLLM's names with `kvarn:` before them, and more.

Nothing is counted here: engines and others keep plain numbers, of which a scrape takes a snapshot. A number of an
engine is a field of `EngineStats` and a line in one of the tables below; a histogram is a line in
`kvarn.engine.meter.BOUNDS`, too. What is counted outside of engines is a `Collector` in routes/metrics.py. Imported
with the first scrape.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self, TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from kvarn import __version__
from kvarn.engine import AsyncLLM, EngineStats
from kvarn.engine.histogram import HistogramSnapshot


@dataclass(frozen=True, slots=True)
class EngineNumbers:
    """What is told of one engine."""

    model: str
    """The label `model_name`."""
    stats: EngineStats
    running: bool = True
    """Whether it takes requests."""
    cache: Mapping[str, str] | None = None
    """Labels of `kvarn:cache_config_info`."""

    @classmethod
    def of(cls, model: str, llm: AsyncLLM) -> Self:
        """As it is now."""
        stats, cache = llm.stats(), llm.config.cache
        settings = {
            "block_size": cache.block_size,
            "num_blocks": stats.num_blocks,
            "cache_dtype": cache.dtype,
            "enable_prefix_caching": cache.enable_prefix_caching,
            "max_model_len": llm.max_model_len,
            "kv_offload_bytes": cache.kv_offload_bytes,
        }
        return cls(model, stats, llm.is_running, {name: str(value) for name, value in settings.items()})


_Labels = TypeVar("_Labels", bound=tuple[str, ...])
_Read = Callable[[EngineStats], float]
_ByLabel = Callable[[EngineStats], Mapping[str, float]]


def _usage(stats: EngineStats) -> float:
    return 1 - stats.free_blocks / stats.num_blocks if stats.num_blocks else 0.0


def _by_position(stats: EngineStats) -> Mapping[str, float]:
    return {str(position): count for position, count in enumerate(stats.accepted_by_position)}


def _draft_sources(stats: EngineStats) -> Mapping[str, float]:
    return {"copied": stats.copied_tokens, "computed": stats.draft_tokens - stats.copied_tokens}


def _accepted_sources(stats: EngineStats) -> Mapping[str, float]:
    return {"copied": stats.accepted_copies, "computed": stats.accepted_tokens - stats.accepted_copies}


GAUGES: tuple[tuple[str, str, _Read], ...] = (
    ("num_requests_running", "Sequences that take part in the steps.", lambda s: s.running),
    ("num_requests_waiting", "Sequences that wait: new or preempted.", lambda s: s.waiting),
    ("num_tokens_queued", "Prompt tokens of the requests that have not begun.", lambda s: s.queued_tokens),
    ("kv_cache_usage_perc", "Share of the KV cache's blocks that sequences hold, 0 to 1.", _usage),
    ("prefix_cache_blocks", "Blocks that only the prefix cache holds.", lambda s: s.cached_blocks),
    ("engine_busy_seconds", "Since the engine began its step; 0 while it has none.", lambda s: s.busy_seconds),
)
COUNTERS: tuple[tuple[str, str, _Read], ...] = (
    ("prompt_tokens", "Prompt tokens computed, or found in the prefix cache.", lambda s: s.prompt_tokens),
    ("generation_tokens", "Tokens generated.", lambda s: s.generated_tokens),
    ("num_preemptions", "Preemptions.", lambda s: s.preemptions),
    ("prefix_cache_queries", "Tokens looked up in the prefix cache.", lambda s: s.prefix_queries),
    ("prefix_cache_hits", "Tokens found in the prefix cache.", lambda s: s.prefix_hits),
    ("prefix_cache_evicted_tokens", "Tokens that the prefix cache let go of.", lambda s: s.evicted_tokens),
    ("kv_offload_saved_tokens", "Tokens saved to the second tier of the KV cache.", lambda s: s.saved_tokens),
    ("kv_offload_loaded_tokens", "Tokens loaded from it.", lambda s: s.loaded_tokens),
    ("spec_decode_num_drafts", "Drafts that were verified.", lambda s: s.drafts),
    ("spec_decode_num_draft_tokens", "Tokens of those drafts.", lambda s: s.draft_tokens),
    ("spec_decode_num_accepted_tokens", "Tokens of drafts that became output.", lambda s: s.accepted_tokens),
    ("spec_decode_draft_seconds", "Time spent on proposing drafts.", lambda s: s.draft_seconds),
    ("grammar_compilations", "Grammars compiled.", lambda s: s.grammars_compiled),
    ("grammar_cache_hits", "Requests whose grammar was compiled already.", lambda s: s.grammar_cache_hits),
    ("grammar_refusals", "Grammars that could not be compiled within limits.", lambda s: s.grammars_refused),
    ("grammar_compile_seconds", "Time spent on compiling them.", lambda s: s.grammar_compile_seconds),
    ("grammar_mask_seconds", "Time spent on masks, beside the model.", lambda s: s.grammar_mask_seconds),
    ("grammar_wait_seconds", "Time for which steps waited for masks.", lambda s: s.grammar_wait_seconds),
    ("engine_steps", "Steps of the engine.", lambda s: s.steps),
    ("engine_failed_steps", "Steps that failed.", lambda s: s.failed_steps),
    ("engine_restarts", "Times that the engine began anew after a failure.", lambda s: s.restarts),
)
LABELLED: tuple[tuple[str, str, str, _ByLabel], ...] = (
    (
        "spec_decode_num_accepted_tokens_per_pos",
        "Tokens of drafts that became output, by how far ahead they were guessed.",
        "position",
        _by_position,
    ),
    (
        "spec_decode_num_draft_tokens_per_source",
        "Tokens of drafts, by whether they were copied from what was known, or computed.",
        "source",
        _draft_sources,
    ),
    (
        "spec_decode_num_accepted_tokens_per_source",
        "Those of them that became output.",
        "source",
        _accepted_sources,
    ),
    ("request_rejections", "Requests refused with 429.", "reason", lambda s: s.rejections),
    ("request_success", "Answers that ended, n of a request.", "finished_reason", lambda s: s.ended),
)
"""Counters with a label of their own: name, help, label, value of each."""
HISTOGRAMS: tuple[tuple[str, str], ...] = (
    ("time_to_first_token_seconds", "From a request's arrival to its first token."),
    ("inter_token_latency_seconds", "Between the outputs of an answer: a token, or several that were guessed."),
    ("request_time_per_output_token_seconds", "Of an answer, its first token left out."),
    ("e2e_request_latency_seconds", "From a request's arrival to its end."),
    ("request_queue_time_seconds", "From a request's arrival to its first step."),
    ("request_inference_time_seconds", "From a request's first step to its end."),
    ("request_prefill_time_seconds", "From a request's first step to its first token."),
    ("request_decode_time_seconds", "From a request's first token to its end."),
    ("request_prompt_tokens", "Tokens of a request's prompt."),
    ("request_prefill_kv_computed_tokens", "Those of them that the prefix cache did not have."),
    ("request_generation_tokens", "Tokens of an answer."),
    ("request_params_max_tokens", "max_tokens of the requests that had it."),
    ("request_params_n", "Answers asked for in a request."),
    ("iteration_tokens_total", "Tokens computed in a step."),
    ("engine_step_seconds", "Of a step, from deciding to its texts."),
    ("output_delivery_seconds", "From the end of a step to where the event loop takes its outputs."),
)


class EngineCollector(Collector):
    """Snapshots of engines as metrics."""

    def __init__(self, engines: Sequence[EngineNumbers]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        """The metrics, each with the model's name as a label. Nothing tells tenants apart."""
        yield self._infos()
        up = GaugeMetricFamily("kvarn:engine_up", "1 while the engine takes requests.", labels=["model_name"])
        for engine in self._engines:
            up.add_metric([engine.model], engine.running)
        yield up
        for kind, metrics in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for name, text, read in metrics:
                family = kind(f"kvarn:{name}", text, labels=["model_name"])
                for engine in self._engines:
                    family.add_metric([engine.model], read(engine.stats))
                yield family
        for name, text, label, values in LABELLED:
            counter = CounterMetricFamily(f"kvarn:{name}", text, labels=["model_name", label])
            for engine in self._engines:
                for value, count in values(engine.stats).items():
                    counter.add_metric([engine.model, value], count)
            yield counter
        for name, text in HISTOGRAMS:
            yield histogram_family(
                f"kvarn:{name}", text, ["model_name"],
                {(engine.model,): engine.stats.histograms[name] for engine in self._engines},
            )  # fmt: skip

    def _infos(self) -> Metric:
        labels: dict[str, None] = {}
        for engine in self._engines:
            labels |= dict.fromkeys(engine.cache or {})
        info = GaugeMetricFamily("kvarn:cache_config_info", "How the KV cache is set.", labels=["model_name", *labels])
        for engine in self._engines:
            if engine.cache is not None:
                info.add_metric([engine.model, *(engine.cache[label] for label in labels)], 1)
        return info


class BuildCollector(Collector):
    """Which kvarn this is."""

    def collect(self) -> Iterator[Metric]:
        """One gauge that is always 1."""
        build = GaugeMetricFamily("kvarn:build_info", "The server's version.", labels=["version", "python"])
        build.add_metric([__version__, platform.python_version()], 1)
        yield build


def histogram_family(
    name: str, text: str, labels: Sequence[str], snapshots: Mapping[_Labels, HistogramSnapshot]
) -> HistogramMetricFamily:
    """Histograms as Prometheus has them: cumulative, by the values of their labels."""
    family = HistogramMetricFamily(name, text, labels=labels)
    for values, snapshot in snapshots.items():
        bounds = (*map(floatToGoString, snapshot.bounds), "+Inf")
        buckets = list(zip(bounds, map(float, accumulate(snapshot.counts)), strict=True))
        family.add_metric(values, buckets, snapshot.total)
    return family


def exposition(engines: Sequence[EngineNumbers], more: Iterable[Collector] = ()) -> bytes:
    """The body of an answer to a scrape. more: what is counted outside the engines."""
    registry = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=registry)  # registers itself
    for collector in (BuildCollector(), EngineCollector(engines), *more):
        registry.register(collector)
    return generate_latest(registry)
