"""What the CUDA back-end does on this card: one command on a bare machine, a few minutes.

    PYTHONPATH=src python bench/gpu.py [--only attention,decode,...] [--out DIR] [--json]

Needs torch >= 2.11, Triton >= 3.6 and kvarn's source tree; nothing is downloaded, since all weights are random. What
the card can do at most (bytes copied, bf16 products) is measured first; everything else is told as a share of that.

    attention   the kernels by themselves: a prompt's against naive attention and torch's flash, time and memory over
                its length; a decode step's over 8k tokens of context
    linears     a layer's matrices by form of weights and number of rows, against torch's bf16
    decode      one token for 1 … 256 sequences: 8B and 1.5B, bf16, int8, fp8 and int4 weights, with graphs and without
    prefill     prompts of 512 … 8192 tokens, the same models and forms
    memory      what is planned before the load against what the card then holds
    streams     64 requests at once against transformers: its static cache, compiled, and its continuous batching

Weights have the shapes of Llama-3-8B and Qwen2.5-1.5B. Bounds that must hold stand in the table beside what came. Each
part runs in a process of its own: one that fails, crashes or hangs is a row that says so, and the others go on. `--out`
has results.json after every row, and plots in the end. The status is 0 where nothing failed and all that is wanted
held. `--tiny --device cpu` with TRITON_INTERPRET=1 tries all of it without a card, in seconds; those figures mean
nothing, and none is judged.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu_parts.apart import run_apart
from gpu_parts.bench import Bench
from gpu_parts.limits import Limits, measure_limits
from gpu_parts.results import Results, Row, table
from gpu_parts.shapes import FULL, SMALL, Sizes

from kvarn.backends.cuda.clock import Clock

ROOT = Path(__file__).resolve().parents[1]
LIMIT = "bandwidth"
PARTS = (LIMIT, "attention", "linears", "decode", "prefill", "memory", "streams")
TOGETHER = (("attention",), ("linears",), ("decode", "prefill", "memory"), ("streams",))
"""What runs in one process: those that need the same models loaded."""
SECONDS = 540
"""Of everything: the parts that have not begun by then are left out."""


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    import triton

    found: dict[str, Any] = {
        "device": device,
        "name": f"{platform.machine()} CPU, Triton's interpreter",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "started": time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime()),
    }
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {
            "name": card.name,
            "memory_gib": round(card.total_memory / (1 << 30), 1),
            "multiprocessors": card.multi_processor_count,
            "l2_mib": card.L2_cache_size >> 20,
            "cuda": torch.version.cuda,
        }
    return found


def measure(bench: Bench, group: tuple[str, ...]) -> None:
    """The parts of a group. Only what they need is imported: a kernel that cannot be imported fails its part alone."""
    match group[0]:
        case "attention":
            from gpu_parts.attention import measure_attention

            measure_attention(bench)
        case "linears":
            from gpu_parts.linears import measure_linears

            measure_linears(bench)
        case "streams":
            from gpu_parts.streams import measure_streams

            measure_streams(bench)
        case _:
            from gpu_parts.steps import measure_steps

            measure_steps(bench, frozenset(group))


def groups(only: frozenset[str]) -> list[tuple[str, ...]]:
    """The chosen parts, in order, those of one process together."""
    chosen = (tuple(name for name in group if name in only) for group in TOGETHER)
    return [group for group in chosen if group]


def run_here(results: Results, clock: Clock, sizes: Sizes, only: frozenset[str], limits: Limits | None) -> None:
    """The parts in this process. Where the limits cannot be measured there is nothing to compare with: that is all."""
    if limits is None:
        with results.part(LIMIT):
            limits = measure_limits(results, clock, sizes.copy_mib, sizes.matmul)
    if limits is None:
        return
    bench = Bench(results, clock, sizes, limits)
    for group in groups(only):
        with results.part(",".join(group)):
            measure(bench, group)


def run_all_apart(results: Results, only: frozenset[str], passed: list[str], seconds: float) -> None:
    """Each group in a process of its own, as long as there is time."""
    script, until = Path(__file__).resolve(), time.monotonic() + seconds
    say(LIMIT)
    run_apart(results, script, LIMIT, passed, seconds)
    limits = results.machine.get("limits")
    if limits is None:
        return
    for group in groups(only):
        left = until - time.monotonic()
        if left < 1:
            results.add(Row(",".join(group), "the whole part", skipped=f"no time was left (--seconds {seconds:g})"))
            continue
        say(", ".join(group))
        told = ["--limits", f"{limits['copy_bytes']},{limits['bf16_flops']}"]
        run_apart(results, script, ",".join(group), [*passed, *told], left)


def say(part: str) -> None:
    """What is being measured, for whoever waits."""
    print(f"[{time.strftime('%H:%M:%S')}] {part}", file=sys.stderr, flush=True)


def options_of(arguments: list[str]) -> argparse.Namespace:
    """Checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between (default: all)")
    parser.add_argument("--out", type=Path, help="folder for results.json and plots; made where it is not there")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, not as a table")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything (default: {SECONDS})")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see that all of it runs")
    parser.add_argument("--here", action="store_true", help="all parts in this process, without limits of time")
    parser.add_argument("--no-plots", action="store_true", help="draw nothing")
    parser.add_argument("--limits", type=limits_of, help="bytes copied and bf16 operations a second, if known: B,F")
    options = parser.parse_args(arguments)
    options.only = frozenset(options.only.split(","))
    if unknown := sorted(options.only - set(PARTS)):
        parser.error(f"--only: there is no part {unknown[0]!r} ({', '.join(PARTS)} are)")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --tiny --device cpu tries the script without one")
    if options.device == "cpu" and not (options.tiny and os.environ.get("TRITON_INTERPRET") == "1"):
        parser.error("--device cpu runs kernels in Triton's interpreter: it needs --tiny, and TRITON_INTERPRET=1 set")
    return options


def _repair_interpreter() -> None:
    """As the tests of kernels do before they run any on the CPU."""
    sys.path.append(str(ROOT / "tests" / "gpu"))
    from interpreter import repair

    repair()


def limits_of(text: str) -> Limits:
    """The value of --limits."""
    copy, flops = text.split(",")
    return Limits(float(copy), float(flops))


def main(arguments: list[str]) -> int:
    """Everything. Returns the status."""
    options = options_of(arguments)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    if options.device == "cpu":
        _repair_interpreter()
    torch.manual_seed(0)
    results = Results(machine(options.device), options.out, judging=not options.tiny)
    if options.here:
        clock = Clock(options.device, quick=options.tiny)
        run_here(results, clock, SMALL if options.tiny else FULL, options.only, options.limits)
    else:
        passed = ["--device", options.device, *(["--tiny"] if options.tiny else [])]
        run_all_apart(results, options.only, passed, options.seconds)
    if options.out and not options.no_plots:
        from gpu_parts.plots import draw

        with results.attempt("plots", "drawing"):
            draw(results.curves, options.out, results.machine["name"])
    results.write()
    print(json.dumps(results.as_json()) if options.json else table(results.rows))
    return 0 if results.held else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
