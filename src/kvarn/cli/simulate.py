"""`kvarn simulate`: how a server would do under some traffic, without running it."""

from __future__ import annotations

import dataclasses
import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvarn.cli.options import optional_size, size_option
from kvarn.errors import ConfigError

if TYPE_CHECKING:
    from kvarn.simulate import Arrival

EPILOG = """\b
Examples:
  kvarn bench steps smollm2-135m-instruct --json > steps.json            what steps cost on this machine
  kvarn simulate --cost steps.json --trace AzureLLMInferenceTrace_conv.csv --speed 0.2
  kvarn simulate --cost steps.json --traffic long-tail --rate 2 --batching static,dynamic,continuous --plot modes.png
  kvarn simulate --cost steps.json --trace chat.jsonl --policy fcfs,fair --cache-blocks 1000,4000 --json
  kvarn simulate --cost steps.json --trace chat.jsonl --cache-blocks 1000 --kv-offload-bytes 0,4GiB --ttft-slo-ms 2000
  kvarn simulate --cost steps.json --trace chat.jsonl --config runs.json
\b
A line of a .jsonl trace:
  {"arrival": 0.5, "prompt_tokens": 900, "output_tokens": 120, "tenant": "a", "prefix_group": "g", "prefix_tokens": 800}
A --config file, an object or a list of them; a list of values makes a run of each:
  {"batching": "continuous", "policy": ["fcfs", "fair"], "num_blocks": [1000, 4000], "max_num_batched_tokens": 512}
"""


def command(
    cost: Annotated[Path, typer.Option(help="Measured steps, as `kvarn bench steps MODEL --json` prints them.")],
    trace: Annotated[Path | None, typer.Option(help="Who arrives when: .csv as Azure's traces, or .jsonl.")] = None,
    traffic: Annotated[str | None, typer.Option(help="Made-up traffic instead: poisson, burst or long-tail.")] = None,
    requests: Annotated[
        int | None, typer.Option(help="Number of requests; a trace is repeated or cut. Made-up traffic: 1000.")
    ] = None,
    rate: Annotated[float, typer.Option(help="Made-up: requests a second.")] = 1.0,
    prompt_tokens: Annotated[int, typer.Option(help="Made-up: mean length of prompts.")] = 512,
    output_tokens: Annotated[int, typer.Option(help="Made-up: mean length of answers.")] = 128,
    tenants: Annotated[int, typer.Option(help="Made-up: tenants, in turn.")] = 1,
    prefix_groups: Annotated[int, typer.Option(help="Made-up: groups that share a prefix, in turn.")] = 0,
    prefix_tokens: Annotated[int, typer.Option(help="Made-up: length of that prefix, before the prompt.")] = 0,
    seed: Annotated[int, typer.Option(help="Made-up: other numbers, same averages.")] = 0,
    start: Annotated[float, typer.Option(help="Begin so many seconds into the traffic.")] = 0.0,
    duration: Annotated[float | None, typer.Option(help="Take so many seconds of it.")] = None,
    speed: Annotated[float, typer.Option(help="So many times as many requests a second.")] = 1.0,
    token_scale: Annotated[float, typer.Option(help="Prompts and answers so many times as long.")] = 1.0,
    policy: Annotated[str, typer.Option(help="Who is served first; several, with commas between, make runs.")] = "fcfs",
    batching: Annotated[str, typer.Option(help="continuous, dynamic or static; several as above.")] = "continuous",
    cache_blocks: Annotated[str, typer.Option(help="Blocks of the KV cache; several as above.")] = "4096",
    chunk: Annotated[str, typer.Option(help="Tokens of a step (max_num_batched_tokens); several as above.")] = "512",
    max_num_seqs: Annotated[str, typer.Option(help="Sequences at the same time; several as above.")] = "64",
    block_size: Annotated[int, typer.Option(help="Tokens in a block.")] = 16,
    max_model_len: Annotated[int, typer.Option(help="Longest prompt and answer together.")] = 8192,
    prefix_cache: Annotated[bool, typer.Option(help="Find again what requests of a prefix group share.")] = True,
    itl_target_ms: Annotated[
        float, typer.Option(help="Milliseconds between tokens that long prompts are chunked for; 0: no target.")
    ] = 0.0,
    ttft_slo_ms: Annotated[
        float, typer.Option(help="Refuse requests whose first token is not to be expected within so many ms; 0: none.")
    ] = 0.0,
    kv_offload_bytes: Annotated[
        str, typer.Option(help="Size of a second tier for evicted blocks, as 2GiB; several as above; 0: none.")
    ] = "0",
    kv_bytes_per_token: Annotated[
        int | None, typer.Option(help="Of the KV cache, for that tier; default: what the --cost file says.")
    ] = None,
    kv_move_bandwidth: Annotated[
        str | None,
        typer.Option(help="Bytes a second to that tier and back, as 1GB; default: what the --cost file says."),
    ] = None,
    window: Annotated[float, typer.Option(help="Seconds that dynamic batching waits for a batch to fill.")] = 1.0,
    config: Annotated[
        Path | None, typer.Option(help="Runs from a JSON file instead of these options.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the runs into this PNG file (needs kvarn[plots]).")] = None,
) -> None:
    """Serve traffic with the real scheduler and cache, a cost model for a model, and a clock that jumps.

    Says what throughput, waiting times, hits, preemptions and fairness would be, for each combination of settings.
    """
    from kvarn import figures
    from kvarn.cli.progress import work_bar
    from kvarn.simulate import Synthetic, make_traffic, read_traffic, report, simulate
    from kvarn.simulate.fit import fit, read_kv, read_steps
    from kvarn.simulate.settings import Settings, combinations, read_settings, with_kv

    if (trace is None) == (traffic is None):
        raise ConfigError("give either --trace FILE or --traffic KIND")
    if plot is not None:
        figures.check(plot)
    model = fit(read_steps(cost))
    if config is not None:
        runs = read_settings(config)
    else:
        values: dict[str, list[object]] = {
            "batching": [*_words("batching", batching)],
            "policy": [*_words("policy", policy)],
            "num_blocks": [*_integers("cache-blocks", cache_blocks)],
            "max_num_batched_tokens": [*_integers("chunk", chunk)],
            "max_num_seqs": [*_integers("max-num-seqs", max_num_seqs)],
            "kv_offload_bytes": [*_sizes("kv-offload-bytes", kv_offload_bytes)],
        }
        base = Settings(
            block_size=block_size, max_model_len=max_model_len, prefix_cache=prefix_cache, itl_target_ms=itl_target_ms,
            ttft_slo_ms=ttft_slo_ms, window=window,
            kv_bytes_per_token=kv_bytes_per_token or 0,
            kv_move_bandwidth=float(optional_size("kv-move-bandwidth", kv_move_bandwidth) or 0),
        )  # fmt: skip
        runs = combinations(values, base)
    kv = read_kv(cost)
    runs = [with_kv(run, kv.bytes_per_token, kv.move_bandwidth) for run in runs]
    if trace is not None:
        arrivals = read_traffic(trace)
    else:
        assert traffic is not None
        arrivals = make_traffic(
            Synthetic(traffic, rate, requests or 1000, prompt_tokens, output_tokens, tenants, prefix_groups,
                      prefix_tokens, seed)
        )  # fmt: skip
    arrivals = _shaped(arrivals, requests, start, duration, speed, token_scale)
    results = []
    gc.freeze()  # the traffic lives to the end: collections need not look at it again and again
    try:
        with work_bar("runs") as progress:
            for done, run in enumerate(runs):
                progress(done, len(runs))
                results.append(simulate(arrivals, run, model.cost))
    finally:
        gc.unfreeze()
    source = trace.name if trace is not None else f"{traffic} traffic"
    title = f"{source}: {len(arrivals):,} requests in {arrivals[-1].time:,.0f} s, steps of {cost.name}"
    if plot is not None:
        report.plot(plot, title, results)
    if as_json:
        about = {"traffic": source, "requests": len(arrivals), "seconds": arrivals[-1].time}
        fitted = {"steps": model.steps, "median_error": model.median_error, "p95_error": model.p95_error}
        print(report.to_json(results, {**about, "fit": {**dataclasses.asdict(model.cost), **fitted}}))
        return
    from rich.console import Console

    off = 100 * model.median_error
    print(f"{title}; the cost model is off by {off:.0f} % (median) of {model.steps} measured steps")
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(report.results_table(results))


def _shaped(
    arrivals: list[Arrival], requests: int | None, start: float, duration: float | None, speed: float, tokens: float
) -> list[Arrival]:
    """The part of the traffic that is asked for. Raises ConfigError naming the option."""
    from kvarn.traffic import MAX_REQUESTS, cut, repeat, scale

    for name, value, least in (("start", start, 0.0), ("duration", duration or 1.0, 0.0)):
        if not value >= least:
            raise ConfigError(f"--{name} must be at least {least:g}, not {value}")
    for name, value in (("speed", speed), ("token-scale", tokens)):
        if not 1e-6 <= value <= 1e6:
            raise ConfigError(f"--{name} must be between 1e-6 and 1e6, not {value}")
    arrivals = cut(arrivals, start, duration)
    if not arrivals:
        raise ConfigError("--start and --duration leave no requests")
    if requests is not None:
        if not 1 <= requests <= MAX_REQUESTS:
            raise ConfigError(f"--requests must be between 1 and {MAX_REQUESTS}, not {requests}")
        arrivals = repeat(arrivals, requests)
    return scale(arrivals, speed=speed, tokens=tokens)


def _words(option: str, text: str) -> list[str]:
    words = list(dict.fromkeys(word.strip() for word in text.split(",")))
    if not all(words):
        raise ConfigError(f"--{option} must be names with commas between, not {text!r}")
    return words


def _sizes(option: str, text: str) -> list[int]:
    return [size_option(option, word) for word in _words(option, text)]


def _integers(option: str, text: str) -> list[int]:
    words = _words(option, text)
    if not all(word.isascii() and word.isdigit() and len(word) < 19 for word in words):
        raise ConfigError(f"--{option} must be whole numbers with commas between, not {text!r}")
    return [int(word) for word in words]
