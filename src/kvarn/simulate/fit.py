"""From measured steps to a cost model: non-negative least squares of the relative error."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvarn.errors import ConfigError
from kvarn.scheduler import StepShape
from kvarn.scheduler.fitted_cost import FittedStepCost

Floats = NDArray[np.float64]
MOST_STEPS = 1_000_000
LEAST_STEPS = 8
COUNTS = tuple(field.name for field in dataclasses.fields(StepShape))


@dataclass(frozen=True, slots=True)
class Fit:
    """A cost model and how far it is from what it was fitted to, as shares of the measured times."""

    cost: FittedStepCost
    steps: int
    median_error: float
    p95_error: float


def fit(steps: Sequence[tuple[StepShape, float]]) -> Fit:
    """The cost model nearest to the measured (shape, seconds). Raises ConfigError for too few, or of one size only."""
    if len(steps) < LEAST_STEPS:
        raise ConfigError(f"{len(steps)} steps are too few for a cost model; it takes {LEAST_STEPS}")
    seconds = np.array([taken for _, taken in steps])
    knots = _knots([shape.num_tokens for shape, _ in steps])
    tokens = np.array([shape.num_tokens for shape, _ in steps], np.float64)
    columns = [
        *_hats(tokens, np.array(knots, np.float64)),
        np.array([shape.num_sampled for shape, _ in steps], np.float64),
        np.array([shape.num_attended for shape, _ in steps], np.float64),
        np.array([shape.num_context for shape, _ in steps], np.float64),
    ]
    solution = _non_negative(np.stack(columns, axis=1) / seconds[:, None], np.ones(len(steps)))
    at_knots = np.maximum.accumulate(np.maximum(solution[: len(knots)], 1e-6))
    cost = FittedStepCost(knots, tuple(map(float, at_knots)), *(float(value) for value in solution[len(knots) :]))
    predicted = np.array([cost.seconds(shape) for shape, _ in steps])
    errors = np.abs(predicted - seconds) / seconds
    return Fit(cost, len(steps), float(np.median(errors)), float(np.percentile(errors, 95)))


def read_steps(path: Path) -> list[tuple[StepShape, float]]:
    """The steps of a file that `kvarn bench steps MODEL --json` printed. Raises ConfigError naming step and field."""
    steps = _content(path).get("steps")
    if not isinstance(steps, list) or len(steps) > MOST_STEPS:
        raise ConfigError(f"--cost: {path.name} has no steps; `kvarn bench steps MODEL --json` makes such a file")
    return [_step(f"--cost: {path.name}, step {number}", item) for number, item in enumerate(steps, 1)]


@dataclass(frozen=True, slots=True)
class MeasuredKv:
    """What a model's KV takes; 0: not measured."""

    bytes_per_token: int = 0
    move_bandwidth: float = 0.0
    """Bytes a second between the cache and the second tier."""


def read_kv(path: Path) -> MeasuredKv:
    """What such a file says of KV; older ones say nothing. Raises ConfigError naming the field."""
    kv = _content(path).get("kv", {})
    where = f"--cost: {path.name}, kv"
    if not isinstance(kv, dict):
        raise ConfigError(f"{where} is not an object")
    values = {name: kv.get(name, 0) for name in ("bytes_per_token", "move_bandwidth")}
    for name, value in values.items():
        whole = name == "bytes_per_token"
        if type(value) not in ((int,) if whole else (int, float)) or not 0 <= value < 1 << 53:
            must = "a whole number" if whole else "a number"
            raise ConfigError(f"{where}: {name} must be {must} of at least 0, not {value!r:.40}")
    return MeasuredKv(values["bytes_per_token"], float(values["move_bandwidth"]))


def _content(path: Path) -> dict[str, Any]:
    try:
        content: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"--cost: {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"--cost: {path.name} is not a JSON file") from None
    return content if isinstance(content, dict) else {}


def _step(where: str, item: Any) -> tuple[StepShape, float]:
    shape = item.get("shape") if isinstance(item, dict) else None
    if not isinstance(shape, dict):
        raise ConfigError(f"{where} has no shape")
    counts: list[Any] = [shape.get(name) for name in COUNTS]
    for name, count in zip(COUNTS, counts, strict=True):
        if type(count) is not int or not 0 <= count < 1 << 53:
            raise ConfigError(f"{where}: {name} must be a whole number of at least 0, not {count!r:.40}")
    seconds = item.get("seconds")
    if type(seconds) not in (int, float) or not (math.isfinite(seconds) and seconds > 0):
        raise ConfigError(f"{where}: seconds must be a number above 0, not {seconds!r:.40}")
    return StepShape(*counts), float(seconds)


def _knots(tokens: Sequence[int]) -> tuple[int, ...]:
    """The least and the greatest number of tokens, and powers of two between where there are steps nearby."""
    least, most = min(tokens), max(tokens)
    if least == most:
        raise ConfigError(f"all steps have {least} tokens; a cost model takes steps of several sizes")
    powers = (1 << power for power in range(most.bit_length()))
    seen = sorted(set(tokens))
    near = (p for p in powers if least < p < most and any(abs(math.log2(count / p)) < 0.25 for count in seen if count))
    return (least, *near, most)


def _hats(x: Floats, knots: Floats) -> list[Floats]:
    """The basis of piecewise linear functions: for each knot one that is 1 there and 0 at all others."""
    return [np.interp(x, knots, np.eye(len(knots))[index]) for index in range(len(knots))]


def _non_negative(a: Floats, b: Floats) -> Floats:
    """The x >= 0 that minimizes |a x - b| (active sets: Lawson and Hanson 1974, chapter 23)."""
    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0] = 1.0
    a = a / scale
    x = np.zeros(a.shape[1])
    active: set[int] = set()
    for _ in range(3 * a.shape[1]):
        gradient = a.T @ (b - a @ x)
        best = max((i for i in range(a.shape[1]) if i not in active), key=gradient.__getitem__, default=None)
        if best is None or gradient[best] <= 1e-10:
            break
        active.add(best)
        while True:
            order = sorted(active)
            trial = np.zeros_like(x)
            trial[order] = np.linalg.lstsq(a[:, order], b, rcond=None)[0]
            negative = [i for i in order if trial[i] <= 0]
            if not negative:
                x = trial
                break
            step = min(x[i] / (x[i] - trial[i]) for i in negative)
            x = x + step * (trial - x)
            active -= {i for i in order if x[i] <= 1e-12}
            if not active:
                break
    result: Floats = x / scale
    return result
