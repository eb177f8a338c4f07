"""Attention by itself: a prompt's against naive attention and torch's flash, over N; a decode step's by its bytes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_parts.bench import Bench
from gpu_parts.checks import relative_error
from gpu_parts.limits import GB, TERA
from gpu_parts.paged import PagedStep, make_step
from gpu_parts.results import Row, Wanted
from gpu_parts.shapes import Heads
from kvarn.backends.cuda.clock import Peak, Timing

OURS, FLASH, NAIVE = "kvarn", "torch SDPA (flash)", "naive"
LEAST_JUDGED = 2048
"""Tokens below which launches, not arithmetic, take the time."""
LEAST_SEQUENCES = 16
"""Sequences below which decode attention is told, not judged: one layer of one sequence is read in microseconds."""
SPEED = Wanted(least=0.6)
BANDWIDTH = Wanted(least=0.8)
LINEAR, SQUARE = Wanted(most=1.2), Wanted(least=1.8)
"""Exponents of memory over N."""
MOST_ERROR = {"float16": 2e-2, "int8": 2e-2, "fp8_e4m3": 5e-2}
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Measured:
    """One way over one length."""

    timing: Timing
    peak: int | None


def measure_attention(bench: Bench) -> None:
    """Both tables and the points of the plot."""
    _prefill(bench)
    for kv_type in (bench.sizes.kv_type, *bench.sizes.kv_types):
        for sequences, context in bench.sizes.decode_attention:
            what = f"decode, {sequences} x {context} tokens, {kv_type} KV"
            with bench.results.attempt("attention", what):
                bench.add(_decode(bench, kv_type, sequences, context, what))


def _prefill(bench: Bench) -> None:
    peaks: dict[str, dict[int, int]] = {OURS: {}, FLASH: {}, NAIVE: {}}
    for length in bench.sizes.attention_lengths:
        with bench.results.attempt("attention", f"prefill {length}"):
            measured = _one_length(bench, length)
            for way, one in measured.items():
                if one.peak is not None:
                    peaks[way][length] = one.peak
            bench.add(_prefill_row(bench, length, measured))
    if not bench.clock.cuda:
        bench.add(Row("attention", "memory over N", skipped="a CPU's allocator does not say its peak"))
        return
    for way, wanted in ((OURS, LINEAR), (NAIVE, SQUARE)):
        with bench.results.attempt("attention", f"memory over N, {way}"):
            bench.add(_growth_row(way, peaks[way], wanted))


def _one_length(bench: Bench, length: int) -> dict[str, Measured]:
    sizes, clock = bench.sizes, bench.clock
    step = make_step(sizes.heads, sizes.dtype, sizes.kv_type, ((length, length),), clock.device)
    q, k, v = step.dense()
    expected = flash(q, k, v)
    error = relative_error(step.run(), expected.transpose(1, 2)[0])
    if not error <= MOST_ERROR[sizes.kv_type]:
        raise ValueError(f"kvarn's output is off by {error:.1e} of torch's")
    ways: dict[str, Callable[[], object]] = {OURS: step.run, FLASH: lambda: flash(q, k, v)}
    if length <= sizes.naive_most:
        ways[NAIVE] = lambda: naive(q, k, v)
    measured = {}
    for way, run in ways.items():
        with Peak(clock) as peak:
            step.run_allocating() if way == OURS else run()
        timing = clock.time(lambda _i, run=run: run())
        measured[way] = Measured(timing, peak.num_bytes)
        bench.results.point(
            "attention_prefill", way=way, tokens=length, seconds=timing.median, peak_bytes=peak.num_bytes
        )
    return measured


def _prefill_row(bench: Bench, length: int, measured: dict[str, Measured]) -> Row:
    ours, torchs = measured[OURS].timing, measured[FLASH].timing
    rate = prefill_flops(bench.sizes.heads, length) / ours.median
    naive_s = measured[NAIVE].timing.median if NAIVE in measured else None
    return Row(
        "attention", f"prefill {length} tokens", rate / TERA, "TFLOP/s", rate / bench.limits.bf16_flops, "bf16 peak",
        judged="of flash SDPA's speed", figure=torchs.median / ours.median,
        wanted=SPEED if length >= LEAST_JUDGED else None,
        detail={"kvarn": ours.as_json(), "flash_s": torchs.median, "naive_s": naive_s},
    )  # fmt: skip


def _growth_row(way: str, peaks: dict[int, int], wanted: Wanted) -> Row:
    """The exponent of the last doubling."""
    longest = max(length for length in peaks if length // 2 in peaks)
    exponent = math.log2(peaks[longest] / peaks[longest // 2])
    return Row(
        "attention", f"memory of {way} at {longest}", peaks[longest] / MIB, "MiB",
        judged="grows with N to the power", figure=exponent, wanted=wanted, detail={"peak_bytes": peaks},
    )  # fmt: skip


def _decode(bench: Bench, kv_type: str, sequences: int, context: int, what: str) -> Row:
    sizes, clock = bench.sizes, bench.clock

    def new() -> PagedStep:
        return make_step(sizes.heads, sizes.dtype, kv_type, ((1, context),) * sequences, clock.device)

    first = new()
    error = relative_error(first.run(), first.expected())
    if not error <= MOST_ERROR[kv_type]:
        raise ValueError(f"kvarn's output is off by {error:.1e} of plain attention over the same values")
    steps = [first, *(new() for _ in range(clock.sets(first.cache_bytes) - 1))]
    timing = clock.time_kernel(lambda i: steps[i % len(steps)].run(), len(steps))
    rate = first.cache_bytes / timing.median
    share = rate / bench.limits.copy_bytes
    judged = kv_type == sizes.kv_type and sequences >= LEAST_SEQUENCES
    return Row(
        "attention", what, rate / GB, "GB/s", share, "copy bandwidth",
        judged="of copy bandwidth", figure=share, wanted=BANDWIDTH if judged else None,
        detail={"kvarn": timing.as_json(), "bytes": first.cache_bytes, "error": error},
    )  # fmt: skip


def prefill_flops(heads: Heads, length: int) -> int:
    """Of causal attention: scores and sums, for each pair of a query and a key that it sees."""
    return 4 * heads.query * heads.dim * (length * (length + 1) // 2)


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's own, (1, heads, N, dim), on a card its flash kernel and no other."""
    only = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if q.is_cuda else contextlib.nullcontext()
    with only:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention as it is written down: all scores in memory, then their softmax, then the sums."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return torch.matmul(torch.softmax(scores.masked_fill_(hidden, -math.inf), -1), v)
