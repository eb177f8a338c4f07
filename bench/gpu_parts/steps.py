"""Whole models in every form of weights: decode by batch and prefill by length, against the card's limits; and what was
planned for them against what the card then held."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from gpu_parts.limits import GB, TERA, Limits
from gpu_parts.loaded import Loaded, load, plan
from gpu_parts.random_models import random_model
from gpu_parts.results import Results, Row, Wanted, release
from gpu_parts.shapes import Sizes
from gpu_parts.timing import Clock, Peak, Timing
from kvarn.backends import MemoryUse
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


def measure_steps(results: Results, clock: Clock, sizes: Sizes, limits: Limits, only: frozenset[str]) -> None:
    """only: of "decode", "prefill" and "memory", from one load of each form of each model."""
    for name, settings in sizes.models.items():
        model = random_model(settings, str(clock.device))
        singles: dict[str, float] = {}
        for weights in sizes.weights:
            setting = Setting(name, weights, sizes.kv_type)
            with results.attempt("+".join(sorted(only)), f"{setting}: load"):
                _measure_one(results, clock, sizes, limits, model, setting, singles, only)
            release()
        if "decode" in only:
            _int4_row(results, name, singles, judged=name == next(iter(sizes.models)))
    if "decode" in only:
        _kv_types(results, clock, sizes, limits)


def _measure_one(
    results: Results,
    clock: Clock,
    sizes: Sizes,
    limits: Limits,
    model: InMemoryModel,
    setting: Setting,
    singles: dict[str, float],
    only: frozenset[str],
) -> None:
    planned = plan(model, clock.device, sizes, weights=setting.weights, kv_type=setting.kv_type)
    with Peak(clock) as peak, load(model, clock.device, sizes, weights=setting.weights, kv_type=setting.kv_type) as it:
        if "decode" in only:
            for batch in sizes.decode_batches:
                for graphs in (True, False):
                    with results.attempt("decode", _what(setting, batch, graphs)):
                        row, timing = _decode(results, clock, sizes, limits, it, setting, batch, graphs)
                        results.add(row)
                        if batch == 1 and graphs:
                            singles[setting.weights] = timing.median
        if "prefill" in only:
            for length in sizes.prefill_lengths:
                with results.attempt("prefill", f"{setting}, {length} tokens"):
                    results.add(_prefill(results, clock, limits, it, setting, length))
        if "memory" in only:
            it.prefill(max(sizes.prefill_lengths))(0)
            it.decode(max(sizes.decode_batches), sizes.decode_context, graphs=True)(0)
    if "memory" in only:
        results.add(_memory_row(setting, planned, peak.num_bytes))


def _what(setting: Setting, batch: int, graphs: bool) -> str:
    return f"{setting}, {batch} at once" + ("" if graphs else ", no graphs")


def _memory_row(setting: Setting, planned: MemoryUse, measured: int | None) -> Row:
    """The most that was held while it was loaded and its largest steps ran."""
    skipped = "" if measured else f"{planned.total:,} bytes planned; a CPU's allocator does not say what it held"
    return Row(
        "memory", str(setting), (measured or 0) / GIB, "GiB at most", judged="measured / planned",
        figure=measured / planned.total if measured else None, wanted=WITHIN, skipped=skipped,
        detail={"planned": asdict(planned), "planned_total": planned.total, "measured": measured},
    )  # fmt: skip


def _decode(
    results: Results,
    clock: Clock,
    sizes: Sizes,
    limits: Limits,
    loaded: Loaded,
    setting: Setting,
    batch: int,
    graphs: bool,
) -> tuple[Row, Timing]:
    """A step of one token for each of `batch` sequences of decode_context tokens."""
    step = loaded.decode(batch, sizes.decode_context, graphs=graphs)
    timing = clock.time(step)
    cost = loaded.cost(StepShape.decode(batch, sizes.decode_context))
    floor, of = limits.floor(cost.bytes, cost.flops)
    results.point("decode", model=setting.model, weights=setting.weights, batch=batch, graphs=graphs,
                  seconds=timing.median, floor_seconds=floor)  # fmt: skip
    judged = setting.weights == "bf16" and batch == 1 and graphs and setting.model == next(iter(sizes.models))
    row = Row(
        "decode", _what(setting, batch, graphs), 1e3 * timing.median, "ms", floor / timing.median, of,
        judged="of copy bandwidth", figure=cost.bytes / timing.median / limits.copy_bytes,
        wanted=DECODE_BANDWIDTH if judged else None,
        detail=_detail(timing, cost) | {"tokens_per_s": batch / timing.median},
    )  # fmt: skip
    return row, timing


def _prefill(results: Results, clock: Clock, limits: Limits, loaded: Loaded, setting: Setting, length: int) -> Row:
    """A step that computes a prompt, with logits of its last token."""
    timing = clock.time(loaded.prefill(length))
    cost = loaded.cost(StepShape.prefill(length))
    floor, of = limits.floor(cost.bytes, cost.flops)
    results.point("prefill", model=setting.model, weights=setting.weights, tokens=length, seconds=timing.median)
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


def _int4_row(results: Results, name: str, singles: dict[str, float], *, judged: bool) -> None:
    what = f"{name}: int4 against bf16, alone"
    if "int4" not in singles or "bf16" not in singles:
        results.add(Row("decode", what, failed="one of the two was not measured"))
        return
    ratio = singles["bf16"] / singles["int4"]
    results.add(
        Row("decode", what, ratio, "times", judged="times as fast", figure=ratio, wanted=INT4_SPEED if judged else None)
    )


def _kv_types(results: Results, clock: Clock, sizes: Sizes, limits: Limits) -> None:
    """Decode over quantized keys and values: the first model, bf16 weights, the second largest batch."""
    name, settings = next(iter(sizes.models.items()))
    batch = sorted(sizes.decode_batches)[-2]
    model = random_model(settings, str(clock.device))
    for kv_type in sizes.kv_types:
        setting = Setting(name, "bf16", kv_type)
        with results.attempt("decode", f"{setting}, {kv_type} KV"):
            with load(model, clock.device, sizes, weights="bf16", kv_type=kv_type) as loaded:
                timing = clock.time(loaded.decode(batch, sizes.decode_context, graphs=True))
                cost = loaded.cost(StepShape.decode(batch, sizes.decode_context))
            floor, of = limits.floor(cost.bytes, cost.flops)
            what = f"{setting}, {batch} at once, {kv_type} KV"
            results.add(Row("decode", what, 1e3 * timing.median, "ms", floor / timing.median, of,
                            detail=_detail(timing, cost)))  # fmt: skip
        release()
