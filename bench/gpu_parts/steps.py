"""Whole models in every form of weights: decode by batch and prefill by length, against the card's limits; and what was
planned for them against what the card then held."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from gpu_parts.bench import Bench
from gpu_parts.limits import GB, TERA
from gpu_parts.loaded import Loaded, load, plan
from gpu_parts.random_models import random_model
from gpu_parts.results import Row, Wanted, release
from kvarn.backends import MemoryUse
from kvarn.backends.cuda.clock import Peak, Timing
from kvarn.backends.cuda.libraries import allocated_bytes
from kvarn.models.in_memory import InMemoryModel
from kvarn.program.counts import Counts, StepShape

DECODE_BANDWIDTH = Wanted(least=0.75)
INT4_SPEED = Wanted(least=2.2)
WITHIN = Wanted(least=0.95, most=1.05)
"""Measured memory / planned."""
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Setting:
    """Which model in which form."""

    model: str
    weights: str
    kv_type: str

    def __str__(self) -> str:
        return f"{self.model} {self.weights}"


def measure_steps(bench: Bench, only: frozenset[str]) -> None:
    """only: of "decode", "prefill" and "memory", from one load of each form of each model."""
    for name, settings in bench.sizes.models.items():
        model = random_model(settings, bench.device)
        alone: dict[str, float] = {}
        for weights in bench.sizes.weights:
            setting = Setting(name, weights, bench.sizes.kv_type)
            with bench.results.attempt(",".join(sorted(only)), f"{setting}: load"):
                seconds = _measure_one(bench, model, setting, only)
                if seconds is not None:
                    alone[weights] = seconds
            release()
        if "decode" in only and "int4" in bench.sizes.weights:
            bench.add(_int4_row(name, alone, judged=bench.is_first(name)))
    if "decode" in only:
        _kv_types(bench)


def _measure_one(bench: Bench, model: InMemoryModel, setting: Setting, only: frozenset[str]) -> float | None:
    """Returns what a step of one sequence took, if it was measured."""
    sizes, alone = bench.sizes, None
    planned = plan(model, bench.clock.device, sizes, weights=setting.weights, kv_type=setting.kv_type)
    with (
        Peak(bench.clock) as peak,
        load(model, bench.clock.device, sizes, weights=setting.weights, kv_type=setting.kv_type) as loaded,
    ):
        if "decode" in only:
            alone = _decodes(bench, loaded, setting)
        if "prefill" in only:
            for length in sizes.prefill_lengths:
                with bench.results.attempt("prefill", f"{setting}, {length} tokens"):
                    bench.add(_prefill(bench, loaded, setting, length))
        if "memory" in only and "prefill" not in only:
            loaded.prefill(max(sizes.prefill_lengths))(0)
        if "memory" in only and "decode" not in only:
            loaded.decode(max(sizes.decode_batches), sizes.decode_context, graphs=True)(0)
    if "memory" in only:
        bench.add(_memory_row(setting, planned, peak.num_bytes))
    return alone


def _decodes(bench: Bench, loaded: Loaded, setting: Setting) -> float | None:
    """All batches, with graphs and without. Returns what one alone took, with graphs."""
    alone = None
    for batch in bench.sizes.decode_batches:
        for graphs in (True, False):
            with bench.results.attempt("decode", _what(setting, batch, graphs)):
                timing = _decode(bench, loaded, setting, batch, graphs)
                if batch == 1 and graphs:
                    alone = timing.median
    return alone


def _what(setting: Setting, batch: int, graphs: bool) -> str:
    return f"{setting}, {batch} at once" + ("" if graphs else ", no graphs")


def _memory_row(setting: Setting, planned: MemoryUse, measured: int | None) -> Row:
    """The most that was held while it was loaded and its largest steps ran."""
    allocated = allocated_bytes(planned)
    skipped = "" if measured else f"{allocated:,} bytes planned; a CPU's allocator does not say what it held"
    return Row(
        "memory", str(setting), (measured or 0) / GIB, "GiB at most", judged="measured / planned",
        figure=measured / allocated if measured else None, wanted=WITHIN, skipped=skipped,
        detail={"planned": asdict(planned), "planned_total": allocated, "measured": measured},
    )  # fmt: skip


def _decode(bench: Bench, loaded: Loaded, setting: Setting, batch: int, graphs: bool) -> Timing:
    """A step of one token for each of `batch` sequences of decode_context tokens."""
    context = bench.sizes.decode_context
    timing = bench.clock.time(loaded.decode(batch, context, graphs=graphs))
    cost = loaded.cost(StepShape.decode(batch, context))
    floor, of = bench.limits.floor(cost.bytes, cost.flops)
    bench.results.point("decode", model=setting.model, weights=setting.weights, batch=batch, graphs=graphs,
                        seconds=timing.median, floor_seconds=floor)  # fmt: skip
    judged = setting.weights == "bf16" and batch == 1 and graphs and bench.is_first(setting.model)
    bench.add(
        Row(
            "decode", _what(setting, batch, graphs), 1e3 * timing.median, "ms", floor / timing.median, of,
            judged="of copy bandwidth", figure=cost.bytes / timing.median / bench.limits.copy_bytes,
            wanted=DECODE_BANDWIDTH if judged else None,
            detail=_detail(timing, cost) | {"tokens_per_s": batch / timing.median},
        )
    )  # fmt: skip
    return timing


def _prefill(bench: Bench, loaded: Loaded, setting: Setting, length: int) -> Row:
    """A step that computes a prompt, with logits of its last token."""
    timing = bench.clock.time(loaded.prefill(length))
    cost = loaded.cost(StepShape.prefill(length))
    floor, of = bench.limits.floor(cost.bytes, cost.flops)
    bench.results.point("prefill", model=setting.model, weights=setting.weights, tokens=length, seconds=timing.median)
    return Row(
        "prefill", f"{setting}, {length} tokens", 1e3 * timing.median, "ms", floor / timing.median, of,
        detail=_detail(timing, cost) | {"tokens_per_s": length / timing.median},
    )  # fmt: skip


def _detail(timing: Timing, cost: Counts) -> dict[str, object]:
    return {
        "step": timing.as_json(),
        "bytes": cost.bytes,
        "flops": cost.flops,
        "gb_per_s": cost.bytes / timing.median / GB,
        "tflop_per_s": cost.flops / timing.median / TERA,
    }


def _int4_row(name: str, alone: dict[str, float], *, judged: bool) -> Row:
    """alone: what a step of one sequence took, by form of weights."""
    what = f"{name}: int4 against bf16, alone"
    if "int4" not in alone or "bf16" not in alone:
        return Row("decode", what, failed="one of the two was not measured")
    ratio = alone["bf16"] / alone["int4"]
    wanted = INT4_SPEED if judged else None
    return Row("decode", what, ratio, "times", judged="times as fast", figure=ratio, wanted=wanted)


def _kv_types(bench: Bench) -> None:
    """Decode over quantized keys and values: the first model, bf16 weights, the second largest batch."""
    name, settings = next(iter(bench.sizes.models.items()))
    batch, context = sorted(bench.sizes.decode_batches)[-2:][0], bench.sizes.decode_context
    model = random_model(settings, bench.device)
    for kv_type in bench.sizes.kv_types:
        what = f"{name} bf16, {batch} at once, {kv_type} KV"
        with bench.results.attempt("decode", what):
            with load(model, bench.clock.device, bench.sizes, weights="bf16", kv_type=kv_type) as loaded:
                timing = bench.clock.time(loaded.decode(batch, context, graphs=True))
                cost = loaded.cost(StepShape.decode(batch, context))
            floor, of = bench.limits.floor(cost.bytes, cost.flops)
            bench.add(Row("decode", what, 1e3 * timing.median, "ms", floor / timing.median, of,
                          detail=_detail(timing, cost)))  # fmt: skip
        release()
