"""`kvarn bench serve`: load on any server that speaks OpenAI's API, and what its clients feel."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvarn import __version__
from kvarn.errors import ConfigError

if TYPE_CHECKING:
    from kvarn.bench.serve.arrivals import Arrivals
    from kvarn.bench.serve.client import Target
    from kvarn.bench.serve.datasets import Dataset
    from kvarn.bench.serve.lengths import Lengths
    from kvarn.bench.serve.load import Extent
    from kvarn.bench.serve.offer import Offer
    from kvarn.bench.serve.page import Report
    from kvarn.bench.serve.point import Bench
    from kvarn.bench.serve.sweep import Search
    from kvarn.traffic import Arrival

EPILOG = """\b
Examples:
  kvarn bench serve http://127.0.0.1:8000                                  100 requests, 8 at a time
  kvarn bench serve URL --rate 4 --seconds 60 --slo ttft:500,itl:30        4 a second, whatever is answered
  kvarn bench serve URL --sweep rate --slo ttft:500,itl:30 --seconds 60    the highest rate at which that holds
  kvarn bench serve URL --dataset sharegpt --data ShareGPT.json --concurrency 16 --repeats 5
  kvarn bench serve URL --trace AzureLLMInferenceTrace_conv.csv --duration 600 --speed 0.5
  kvarn bench serve URL --compare URL2 --repeats 5 --html report.html --plot report.png
"""
DATASETS = ("random", "sonnet", "prefix", "sharegpt", "jsonl")
DEFAULT_CONCURRENCY, DEFAULT_RATE = 8, 1.0
DEFAULT_REQUESTS, SWEEP_SECONDS, SWEEP_WARMUP = 100, 30.0, 5.0
PREFIXES, PREFIX_TOKENS = 8, 256
MOST_REPEATS = 1000


def serve_command(
    url: Annotated[str, typer.Argument(help="The server's base, as http://127.0.0.1:8000; /v1 is added.")],
    rate: Annotated[
        float | None, typer.Option(help="Open loop: requests a second, sent whether or not earlier ones are answered.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help=f"Closed loop: requests at a time; {DEFAULT_CONCURRENCY} where nothing is given.")
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="rate or concurrency: find the highest at which --slo holds, from --rate or --concurrency."),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(help=f"Requests that are measured; {DEFAULT_REQUESTS} unless --seconds is given.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help=f"Or: for how long; each point of a sweep {SWEEP_SECONDS:g} unless given.")
    ] = None,
    warmup: Annotated[
        float | None,
        typer.Option(help=f"Seconds of the same load before; {SWEEP_WARMUP:g} for a point of a sweep, else none."),
    ] = None,
    slo: Annotated[
        str, typer.Option(help="Limits in ms of ttft, tpot, itl and e2e, as ttft:500,itl:30: for goodput and --sweep.")
    ] = "",
    slo_percentile: Annotated[int, typer.Option(help="Percentile of a load that they are for: 50, 95 or 99.")] = 99,
    arrivals: Annotated[
        str, typer.Option(help="Of an open loop: poisson, gamma (see --burstiness), burst (see --burst) or constant.")
    ] = "poisson",
    burstiness: Annotated[float, typer.Option(help="Of gamma: 1 is poisson, below 1 burstier, above more even.")] = 1.0,
    burst: Annotated[int, typer.Option(help="Of burst: requests that come at the same time.")] = 16,
    dataset: Annotated[str, typer.Option(help=f"{', '.join(DATASETS)}: see docs/bench.md.")] = "random",
    data: Annotated[Path | None, typer.Option(help="File of sharegpt (.json), jsonl, or lines for sonnet.")] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Moments and lengths from a trace (.csv of Azure, or .jsonl); with --rate its lengths only."),
    ] = None,
    start: Annotated[float, typer.Option(help="Seconds of the trace that are left out.")] = 0.0,
    duration: Annotated[float | None, typer.Option(help="Seconds of the trace after that; unless given all.")] = None,
    speed: Annotated[float, typer.Option(help="Times as many requests a second as the trace has.")] = 1.0,
    prompt_tokens: Annotated[
        str, typer.Option(help="Lengths of prompts: 256, 64-512, or lognormal:MEAN,SPREAD.")
    ] = "256",
    output_tokens: Annotated[str, typer.Option(help="Lengths of answers, likewise.")] = "64",
    prefixes: Annotated[
        int | None, typer.Option(help=f"Texts that prompts of `prefix` begin with, in turn; {PREFIXES}.")
    ] = None,
    prefix_tokens: Annotated[int | None, typer.Option(help=f"Tokens of each of them; {PREFIX_TOKENS}.")] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Longer prompts of a file are left out, of a trace cut.")
    ] = None,
    max_output_tokens: Annotated[int | None, typer.Option(help="Longer answers of a file or a trace are cut.")] = None,
    repeats: Annotated[int, typer.Option(help="Turns of the same load, for confidence intervals.")] = 1,
    compare: Annotated[
        str | None, typer.Option(help="Another server: both in turns (A B A B …), and the ratios of their figures.")
    ] = None,
    compare_model: Annotated[str | None, typer.Option(help="Its model; default: as --model.")] = None,
    compare_api_key: Annotated[str | None, typer.Option(help="Its key; default: as --api-key.")] = None,
    endpoint: Annotated[str, typer.Option(help="chat or completions.")] = "chat",
    model: Annotated[str | None, typer.Option(help="Name of the model; default: the first of /v1/models.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True, help="Sent as a bearer token.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for a whole answer.")] = 600.0,
    ignore_eos: Annotated[
        bool, typer.Option(help="Ask for answers of exactly their length; some servers know no such field.")
    ] = True,
    body: Annotated[str, typer.Option(help='More fields of each request, as \'{"temperature": 0.7}\'.')] = "{}",
    seed: Annotated[int, typer.Option(help="The same seed, the same requests at the same moments.")] = 0,
    precision: Annotated[float, typer.Option(help="A sweep ends when it is this close, as a share.")] = 0.1,
    points: Annotated[int, typer.Option(help="Most points of a sweep.")] = 16,
    late_limit_ms: Annotated[
        float, typer.Option(help="Warn where this client itself was later than that (P99).")
    ] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the report as one page (needs kvarn[plots]).")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw its picture into this PNG file (needs kvarn[plots]).")] = None,
) -> None:
    """Send requests to a server that speaks OpenAI's API, and say what its clients feel: TTFT, TPOT, ITL, end to end.

    The status is 1 where nothing was answered, or where a sweep finds no load that holds. Percentiles are of requests
    that were answered whole; failed ones are counted by kind.
    """
    from kvarn.bench.serve.arrivals import Arrivals
    from kvarn.bench.serve.client import Target, check_installed
    from kvarn.bench.serve.datasets import OfTrace
    from kvarn.bench.serve.lengths import Lengths
    from kvarn.bench.serve.point import Bench
    from kvarn.bench.serve.slo import Slo

    check_installed()
    outputs = _Outputs(as_json, html, plot, late_limit_ms / 1e3)
    outputs.check()
    if not 1 <= repeats <= MOST_REPEATS:
        raise ConfigError(f"--repeats must be between 1 and {MOST_REPEATS}, not {repeats}")
    traced = _traced(trace, start, duration, speed)
    lengths = _Lengths(
        Lengths.parse("prompt-tokens", prompt_tokens), Lengths.parse("output-tokens", output_tokens),
        max_prompt_tokens, max_output_tokens,
    )  # fmt: skip
    if trace is not None:
        chosen: Dataset = OfTrace(traced, f"lengths of {trace.name}", max_prompt_tokens, max_output_tokens)
    else:
        chosen = _dataset(dataset, data, lengths, prefixes, prefix_tokens)
    as_traced = bool(traced) and rate is None and concurrency is None
    extent = _extent(requests, seconds, warmup, sweeping=sweep is not None, traced=len(traced) if as_traced else 0)
    bench = Bench(chosen, extent, Slo.parse(slo, slo_percentile), seed)
    target = Target(url, endpoint, model, api_key, timeout, ignore_eos, _fields(body))
    kinds = Arrivals(arrivals, burstiness, burst)
    if sweep is not None:
        if compare is not None or repeats > 1:
            raise ConfigError("--sweep goes with neither --compare nor --repeats")
        _sweep(target, bench, sweep, _search(sweep, rate, concurrency, precision, points), kinds, outputs)
        return
    offer = _offer(rate, concurrency, kinds, [arrival.time for arrival in traced] if as_traced else [])
    targets = [target]
    if compare is not None:
        key, name = compare_api_key or api_key, compare_model or model
        targets.append(Target(compare, endpoint, name, key, timeout, ignore_eos, target.extra))
    _turns(targets, bench, offer, repeats, outputs)


@dataclass(frozen=True, slots=True)
class _Lengths:
    """The options about lengths."""

    prompt: Lengths
    output: Lengths
    max_prompt_tokens: int | None
    max_output_tokens: int | None

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_output_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}")


@dataclass(frozen=True, slots=True)
class _Outputs:
    """Where results go."""

    as_json: bool
    html: Path | None
    plot: Path | None
    late_limit: float

    def check(self) -> None:
        """Raises ConfigError where something could not be written: before the work, not after it."""
        from kvarn import figures
        from kvarn.bench.serve import page

        if self.plot is not None:
            figures.check(self.plot)
        if self.html is not None:
            page.check(self.html)
            figures.pyplot()

    def write(self, report: Report, draw: Callable[[Sequence[str]], Any], data: Mapping[str, Any]) -> None:
        """Writes files and says the rest."""
        from kvarn import figures
        from kvarn.bench.serve import page, tables

        if self.html is not None:
            page.write(self.html, report, [figures.svg(draw([]))])
        if self.plot is not None:
            figures.save(draw([*report.about, report.lead]), self.plot)
        if self.as_json:
            about = {"about": report.about, "result": report.lead, "doubts": report.doubts}
            print(tables.to_json({"version": __version__, **about, **data}))
            return
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
        for line in report.about:
            console.print(line, soft_wrap=True)
        for heading, grid in report.grids:
            console.print(f"\n{heading}")
            console.print(grid.rich())
        console.print(report.lead, style="bold", soft_wrap=True)
        for line in (*report.notes, *(f"doubtful: {doubt}" for doubt in report.doubts)):
            console.print(line, soft_wrap=True)


def _turns(targets: Sequence[Target], bench: Bench, offer: Offer, repeats: int, outputs: _Outputs) -> None:
    from kvarn.bench.serve import plots, report
    from kvarn.bench.serve.compare import ratios
    from kvarn.bench.serve.session import run_turns
    from kvarn.cli.progress import share_bar

    with share_bar() as progress:
        done = run_turns(targets, bench, offer, repeats, progress)
    names = [lane.url for lane in done.lanes]
    data: dict[str, Any] = {"servers": [{"url": lane.url, "model": lane.model} for lane in done.lanes]}
    if len(done.lanes) == 1:
        text = report.one_load(bench, done.lanes[0], done.points[0], outputs.late_limit)
        data["turns"] = done.points[0]
    else:
        text = report.two_servers(bench, done.lanes, done.points, outputs.late_limit)
        data |= {"turns": done.points, "ratios": ratios(*done.points)}
    by_name = {f"{'first' if place == 0 else 'second'}: {name}": points
               for place, (name, points) in enumerate(zip(names, done.points, strict=True))}  # fmt: skip
    outputs.write(text, lambda title: plots.times(title, by_name, bench.slo), data)
    if not all(any(point.summary.completed for point in points) for points in done.points):
        raise typer.Exit(1)


def _sweep(target: Target, bench: Bench, kind: str, search: Search, kinds: Arrivals, outputs: _Outputs) -> None:
    from kvarn.bench.serve import plots, report
    from kvarn.bench.serve.offer import AtOnce, AtRate
    from kvarn.bench.serve.session import run_sweep
    from kvarn.cli.progress import share_bar

    def at(size: float) -> Offer:
        return AtOnce(int(size)) if kind == "concurrency" else AtRate(size, kinds)

    if not bench.slo.limits:
        raise ConfigError("--sweep needs --slo, as ttft:500,itl:30")
    with share_bar() as progress:
        lane, found = run_sweep(target, bench, at, search, progress)
    text = report.saturation(bench, lane, found, outputs.late_limit)
    unit = "requests at a time" if kind == "concurrency" else "requests/s sent"
    data = {"servers": [{"url": lane.url, "model": lane.model}], "slo": str(bench.slo), "sweep": found}
    outputs.write(text, lambda title: plots.sweep(title, found, bench.slo, unit), data)
    if found.best is None:
        raise typer.Exit(1)


def _search(kind: str, rate: float | None, concurrency: int | None, precision: float, points: int) -> Search:
    from kvarn.bench.serve.sweep import Search

    if kind not in ("rate", "concurrency"):
        raise ConfigError(f"--sweep must be rate or concurrency, not {kind!r}")
    whole = kind == "concurrency"
    if (rate if whole else concurrency) is not None:
        raise ConfigError(f"--sweep {kind} begins at --{kind}; leave the other one out")
    start = float(concurrency or 1) if whole else (DEFAULT_RATE if rate is None else rate)
    return Search(start, precision, whole, points)


def _offer(rate: float | None, concurrency: int | None, kinds: Arrivals, times: Sequence[float]) -> Offer:
    from kvarn.bench.serve.offer import AtOnce, AtRate, AtTimes

    if rate is not None and concurrency is not None:
        raise ConfigError("give either --rate or --concurrency")
    if rate is not None:
        return AtRate(rate, kinds)
    if times:
        return AtTimes(times)
    return AtOnce(DEFAULT_CONCURRENCY if concurrency is None else concurrency)


def _extent(
    requests: int | None, seconds: float | None, warmup: float | None, *, sweeping: bool, traced: int
) -> Extent:
    from kvarn.bench.serve.load import Extent

    if requests is None and seconds is None:
        if sweeping:
            seconds = SWEEP_SECONDS
        else:
            requests = traced or DEFAULT_REQUESTS
    return Extent(requests, seconds, (SWEEP_WARMUP if sweeping else 0.0) if warmup is None else warmup)


def _dataset(
    name: str, data: Path | None, lengths: _Lengths, prefixes: int | None, prefix_tokens: int | None
) -> Dataset:
    from kvarn.bench.serve import datasets

    if name not in DATASETS:
        raise ConfigError(f"--dataset must be one of {', '.join(DATASETS)}, not {name!r}")
    readers = {"sharegpt": datasets.read_sharegpt, "jsonl": datasets.read_jsonl}
    if data is None and name in readers:
        raise ConfigError(f"--dataset {name} needs --data FILE")
    if data is not None and name not in (*readers, "sonnet"):
        raise ConfigError(f"--data goes with {', '.join((*readers, 'sonnet'))}, not with --dataset {name}")
    if name != "prefix" and (prefixes is not None or prefix_tokens is not None):
        raise ConfigError("--prefixes and --prefix-tokens go with --dataset prefix")
    if name == "sonnet":
        return datasets.Sonnet(lengths.prompt, lengths.output, data)
    if data is not None:
        most = (lengths.max_prompt_tokens, lengths.max_output_tokens)
        return datasets.FromFile(data, readers[name](data), lengths.output, *most)
    if name == "prefix":
        several = PREFIXES if prefixes is None else prefixes
        return datasets.RandomWords(lengths.prompt, lengths.output, several, prefix_tokens or PREFIX_TOKENS)
    return datasets.RandomWords(lengths.prompt, lengths.output)


def _traced(path: Path | None, start: float, duration: float | None, speed: float) -> list[Arrival]:
    """The part of a trace that is asked for; none where there is no trace."""
    from kvarn.traffic import cut, read_traffic, scale

    if path is None:
        return []
    if not 1e-6 <= speed <= 1e6:
        raise ConfigError(f"--speed must be between 1e-6 and 1e6, not {speed}")
    for name, value in (("start", start), ("duration", 0.0 if duration is None else duration)):
        if not value >= 0:
            raise ConfigError(f"--{name} must be at least 0, not {value}")
    arrivals = cut(read_traffic(path), start, duration)
    if not arrivals:
        raise ConfigError("--start and --duration leave no requests")
    return scale(arrivals, speed=speed)


def _fields(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ConfigError(f"--body must be a JSON object as '{{\"temperature\": 0.7}}', not {text[:60]!r}")
    return fields
