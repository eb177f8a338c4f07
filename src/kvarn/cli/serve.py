"""`kvarn serve`: the OpenAI-compatible server."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvarn.cli.groups import options_from
from kvarn.cli.options import (
    DEFAULT_MODEL,
    CommitMemory,
    ComputeType,
    Device,
    KvCacheBytes,
    KvOffloadBytes,
    MaxModelLen,
    MemoryUtilization,
    PackedCacheBytes,
    Threads,
    WeightForm,
    chosen_device,
    optional_size,
    read_text,
    size_option,
)
from kvarn.cli.speculative import Speculative, speculative_config
from kvarn.server.limits import ServerLimits

if TYPE_CHECKING:
    from kvarn.engine import AsyncLLM
    from kvarn.planning import MemoryPlan
    from kvarn.request import Pooling
    from kvarn.server import ServeOptions
    from kvarn.server.models.budget import Budget
    from kvarn.tracing import TraceRecorder

ACCESS = "Who may ask"
"""A group of options in the help."""
EPILOG = """\b
Examples:
  kvarn serve
  kvarn serve qwen2.5-coder-0.5b-instruct --port 9000 --max-num-seqs 16
  kvarn serve model.gguf --max-model-len 4096 --kv-cache-bytes 2GiB
  kvarn serve --speculative 'method=ngram,k=auto'
  kvarn serve model.gguf --device cuda --max-num-seqs 256 --max-num-batched-tokens 8192
  kvarn serve smollm2-135m-instruct coder=qwen2.5-coder-0.5b-instruct,max-model-len=8192 --idle-unload 10m
  kvarn serve --host 0.0.0.0 --policy fair --api-key KEY-OF-ANN --api-key KEY-OF-BOB --itl-target-ms 50
\b
Ask it:
  curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
    -d '{"messages": [{"role": "user", "content": "Hello!"}]}'
Or open http://127.0.0.1:8000 in a browser.
"""


@options_from(ServerLimits, "limits", "Limits of requests and connections")
def command(
    *,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]MODEL[,SETTING=VALUE]",
            help="A name from `kvarn models`, a .gguf file, or a folder with config.json and safetensors; the first is "
            "meant where a request names none. Settings of one model: max-model-len, max-num-seqs, kv-cache-bytes, "
            f"idle-unload. Default: {DEFAULT_MODEL}.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 opens it to the network: see --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: a free one.")] = 8000,
    served_model_name: Annotated[
        str | None,
        typer.Option(help="Name in the API, of one model (of several: NAME=MODEL); its own goes on to be good."),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="A key that clients must send; may be given several times, once for each tenant. KVARN_API_KEYS, a "
            "list with commas, adds to them and shows in no process list.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    keys_file: Annotated[
        Path | None,
        typer.Option(
            help="Keys with names, priorities and limits, a file that `kvarn keys` makes; read again when it changes.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    admin_port: Annotated[
        int | None,
        typer.Option(help="Port of the admin routes (see docs/server.md); 0: a free one. Unset: there are none.",
                     rich_help_panel=ACCESS),
    ] = None,
    admin_host: Annotated[
        str, typer.Option(help="Their address; other than this machine's own it needs a key.", rich_help_panel=ACCESS)
    ] = "127.0.0.1",
    admin_key: Annotated[
        str,
        typer.Option(help="The key they want. KVARN_ADMIN_KEY shows in no process list.", envvar="KVARN_ADMIN_KEY",
                     rich_help_panel=ACCESS),
    ] = "",
    tls_cert: Annotated[
        Path | None, typer.Option(help="Certificate chain in PEM: the server speaks https.", rich_help_panel=ACCESS)
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key in PEM.", rich_help_panel=ACCESS)] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Pages of this origin may ask, such as https://example.org, or * for all. May be repeated; unset: "
            "none but the server's own.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    metrics_open: Annotated[
        bool, typer.Option("--metrics-open", help="/metrics needs no key.", rich_help_panel=ACCESS)
    ] = False,
    max_model_len: MaxModelLen = None,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences computed at the same time.")] = 64,
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="Tokens computed in one step: the budget that prompts and running answers share.")
    ] = 512,
    max_num_queued_requests: Annotated[int, typer.Option(help="Requests waiting; one more gets 429.")] = 1024,
    max_num_queued_tokens: Annotated[
        int | None, typer.Option(help="Prompt tokens of waiting requests; what exceeds it gets 429.")
    ] = None,
    policy: Annotated[
        str,
        typer.Option(
            help="Who is served first. fcfs: who came first. priority: the smallest `priority` of the body. fair: the "
            "API key that got the fewest tokens of late."
        ),
    ] = "fcfs",
    itl_target_ms: Annotated[
        float | None,
        typer.Option(
            help="Milliseconds between the tokens of running answers, kept while long prompts are computed, in chunks "
            "as large as that allows."
        ),
    ] = None,
    ttft_slo_ms: Annotated[
        float | None,
        typer.Option(
            help="Answer 429 and Retry-After at once where the first token is not to be expected within so many "
            "milliseconds; a request's header x-slo-ttft-ms goes before it."
        ),
    ] = None,
    kv_cache_bytes: KvCacheBytes = None,
    commit_memory: CommitMemory = True,
    kv_cache_dtype: Annotated[
        str,
        typer.Option(help="Type of cached keys and values: float16, float32, int8 (half the bytes) or int4 (a "
            "third); on a GPU float16, bfloat16, float32, int8 or fp8_e4m3."),
    ] = "float16",
    prefix_cache: Annotated[
        bool, typer.Option(help="Keep what was computed for requests that begin with the same tokens.")
    ] = True,
    shared_system_prompt: Annotated[
        list[Path] | None,
        typer.Option(help="Text file with a system prompt whose cached tokens all cache_salts share. May be repeated."),
    ] = None,
    kv_offload_bytes: KvOffloadBytes = "0",
    kv_offload_dir: Annotated[
        Path | None, typer.Option(help="Folder of that file; default: beside the pulled models.")
    ] = None,
    memory_utilization: MemoryUtilization = 0.8,
    threads: Threads = 0,
    device: Device = "cpu",
    dtype: ComputeType = None,
    weights: WeightForm = None,
    packed_cache_bytes: PackedCacheBytes = None,
    speculative: Speculative = None,
    max_grammar_bytes: Annotated[int, typer.Option(help="Largest schema, regex or grammar.")] = 256 << 10,
    max_grammar_depth: Annotated[int, typer.Option(help="Deepest JSON schema.")] = 64,
    max_grammar_seconds: Annotated[float, typer.Option(help="To compile a grammar; then it is refused.")] = 5.0,
    max_grammar_mb: Annotated[int, typer.Option(help="Mebibytes that compiling a grammar may take.")] = 1024,
    max_mask_ms: Annotated[
        float, typer.Option(help="For the tokens a grammar allows at one place, when it is tried.")
    ] = 250.0,
    max_queued_grammars: Annotated[int, typer.Option(help="Grammars waiting to be compiled; one more gets 429.")] = 64,
    grammar_cache_entries: Annotated[int, typer.Option(help="Compiled grammars that are kept.")] = 64,
    pooling: Annotated[
        str,
        typer.Option(
            help="How /v1/embeddings makes one vector of a text, unless the request says: the mean of its tokens' "
            "hidden states, or the last one's."
        ),
    ] = "mean",
    trace_file: Annotated[
        Path | None,
        typer.Option(help="Record what the engine does, and write the last steps here at the end (see `kvarn trace`)."),
    ] = None,
    log_format: Annotated[
        str, typer.Option(help="Logs, on stderr: text or json. Prompts and answers are never logged.")
    ] = "text",
    access_log: Annotated[bool, typer.Option(help="Log a line for each finished request.")] = True,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            help="Send OpenTelemetry spans of each request (queue, prefill, decode) to this collector over OTLP/HTTP, "
            "such as http://127.0.0.1:4318; needs kvarn[otel]."
        ),
    ] = None,
    drain_seconds: Annotated[
        float,
        typer.Option(help="After SIGTERM or Ctrl-C, for requests in flight to finish; a second signal ends at once."),
    ] = 30.0,
    watchdog_seconds: Annotated[
        float,
        typer.Option(
            help="An engine that is in one step for longer hangs: /health/live answers 503, so that what runs the "
            "server starts it again. 0: never. Longer than any step: 30 or more."
        ),
    ] = 0.0,
    lazy: Annotated[bool, typer.Option("--lazy", help="Load the first model, too, only when it is asked for.")] = False,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            help="What all models may take together, as 8GiB; default: --memory-utilization of what is there. Those "
            "used least lately are unloaded for others."
        ),
    ] = None,
    idle_unload: Annotated[
        str | None,
        typer.Option(
            help="Unload a model so long after its last request, as 300 or 10m; default: never. A request's keep_alive "
            "goes before it."
        ),
    ] = None,
    load_timeout: Annotated[
        float, typer.Option(help="Seconds that a request waits for its model to be loaded; then it gets 503.")
    ] = 120.0,
    max_waiting_for_load: Annotated[
        int, typer.Option(help="Requests that wait for models to be loaded; one more gets 429.")
    ] = 256,
    limits: ServerLimits,
) -> None:
    """Serve models over an OpenAI-compatible HTTP API, with a chat page at / and a dashboard."""
    from kvarn.cli.serve_models import duration_option, parse_models
    from kvarn.config import CacheConfig, EngineConfig, GrammarConfig, SchedulerConfig
    from kvarn.server import ServeOptions, Told, serve
    from kvarn.server.access import AccessOptions
    from kvarn.server.admin import AdminOptions
    from kvarn.server.listening import Tls
    from kvarn.server.models import PoolLimits
    from kvarn.server.otlp import exported_spans

    system_prompts = tuple(read_text(path, "--shared-system-prompt") for path in shared_system_prompt or ())
    backend, cuda = chosen_device(device, dtype, weights)
    config = EngineConfig(
        max_model_len=max_model_len,
        backend=backend,
        threads=threads,
        cuda=cuda,
        packed_cache_bytes=packed_cache_bytes,
        speculative=speculative_config(speculative),
        grammar=GrammarConfig(
            max_grammar_bytes, max_grammar_depth, max_grammar_seconds, max_grammar_mb, max_mask_ms,
            max_queued_grammars, grammar_cache_entries,
        ),
        cache=CacheConfig(
            dtype=kv_cache_dtype,
            kv_cache_bytes=optional_size("kv-cache-bytes", kv_cache_bytes),
            memory_utilization=memory_utilization,
            commit_memory=commit_memory,
            enable_prefix_caching=prefix_cache,
            shared_system_prompts=system_prompts,
            kv_offload_bytes=size_option("kv-offload-bytes", kv_offload_bytes),
            kv_offload_dir=None if kv_offload_dir is None else str(kv_offload_dir),
        ),
        scheduler=SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_queued_requests=max_num_queued_requests,
            max_num_queued_tokens=max_num_queued_tokens,
            policy=policy,
            itl_target_ms=itl_target_ms,
            ttft_slo_ms=ttft_slo_ms,
        ),
    )
    keys = (*(api_key or ()), *_keys_of(os.environ.get("KVARN_API_KEYS", "")))
    specs = parse_models(models or [DEFAULT_MODEL], config, served_model_name)
    keep = math.inf if idle_unload is None else duration_option("idle_unload", idle_unload)
    options = ServeOptions(
        specs,
        host,
        port,
        limits,
        AccessOptions(keys, keys_file, metrics_open, tuple(cors_origin or ()), Tls(tls_cert, tls_key)),
        AdminOptions(admin_host, admin_port, admin_key),
        log_format,
        access_log,
        drain_seconds,
        lazy,
        optional_size("memory-budget", memory_budget),
        PoolLimits(max_waiting_for_load, load_timeout, keep),
        _pooling(pooling),
        watchdog_seconds,
    )
    start = _Start(options)
    told = Told(start.listening, start.budget, start.plan, start.ready)
    with _recording(trace_file, max_num_batched_tokens) as observer, exported_spans(otlp_endpoint) as watchers:
        serve(options, told, observer=observer, watchers=watchers)


class _Start:
    """What people are told while the server starts."""

    def __init__(self, options: ServeOptions) -> None:
        self._first, *self._others = [spec.name for spec in options.models]
        self._lazy = options.lazy
        self._url = ""

    def listening(self, url: str) -> None:
        self._url = url
        if not self._lazy:
            typer.echo(f"loading {self._first} …")

    def budget(self, budget: Budget) -> None:
        from kvarn.cli.memory_table import budget_table

        if self._others:
            typer.echo(budget_table(budget.num_bytes or 0, budget.plans))

    def plan(self, _name: str, plan: MemoryPlan) -> None:
        from kvarn.cli.memory_table import memory_table

        if not self._others:
            typer.echo(memory_table(plan))

    def ready(self, engines: Sequence[tuple[str, AsyncLLM]], seconds: float) -> None:
        for name, llm in engines:
            config = llm.model_config
            loaded = f"{name}: " if self._others else ""
            typer.echo(f"{loaded}{config.family}, {config.num_layers} layers · ready in {seconds:.2f} s")
        others = self._others if engines else [self._first, *self._others]
        if others:
            typer.echo(f"when asked for: {', '.join(others)}")
        typer.secho(f"{self._url}  (chat page; API under {self._url}/v1)", bold=True)


def _pooling(way: str) -> Pooling:
    from kvarn.errors import ConfigError
    from kvarn.request import Pooling

    try:
        return Pooling(way)
    except ValueError:
        raise ConfigError(f"pooling must be mean or last, not {way!r}") from None


def _keys_of(listed: str) -> list[str]:
    """The keys of a list with commas."""
    return [key.strip() for key in listed.split(",")] if listed.strip() else []


@contextmanager
def _recording(path: Path | None, budget: int) -> Iterator[TraceRecorder | None]:
    """An observer whose records are written to the path in the end; None where there is no path."""
    if path is None:
        yield None
        return
    from kvarn.tracing import TraceRecorder, write_trace

    recorder = TraceRecorder(budget)
    write_trace(path, recorder)  # a path that cannot be written is told now, not after the work
    try:
        yield recorder
    finally:
        write_trace(path, recorder)
