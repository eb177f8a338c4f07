"""Recorded steps as a JSON file in Chrome's trace event format, for ui.perfetto.dev and chrome://tracing.

One track has the steps and their phases, and one each sequence: what it computed when, and when it waited. Times are
microseconds since the first step that was kept. `args` hold all that is known, so that the file can be read back.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kvarn.errors import ConfigError
from kvarn.tracing.recorder import Happened, Part, StepRecord, TraceRecorder

ENGINE, REQUESTS = 1, 2
"""Process ids of the two groups of tracks."""
FORMAT = "kvarn trace 1"


def write_trace(path: Path, recorder: TraceRecorder) -> None:
    """Writes what the recorder has kept. Raises ConfigError where the file cannot be written."""
    events = list(trace_events(recorder.steps))
    content = {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"format": FORMAT, "dropped_steps": recorder.num_dropped},
    }
    try:
        path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--trace-file: {path} cannot be written: {error.strerror}") from error


def trace_events(steps: Iterable[StepRecord]) -> Iterator[dict[str, Any]]:
    """The events of the file, those of one step after those of the step before."""
    yield _name("process_name", ENGINE, 0, "engine")
    yield _name("thread_name", ENGINE, 1, "steps")
    yield _name("process_name", REQUESTS, 0, "requests")
    named: set[int] = set()
    zero: float | None = None
    for step in steps:
        if zero is None:
            zero = min([step.times.began, *(event.time for event in step.happened)])
        for sequence_id, request_id in _sequences(step):
            if sequence_id not in named:
                named.add(sequence_id)
                yield _name("thread_name", REQUESTS, sequence_id, request_id)
        yield from (_instant(event, zero, step.number) for event in step.happened)
        yield from _step_events(step, zero)
        yield from (_part(part, step, zero) for part in step.parts)


def _step_events(step: StepRecord, zero: float) -> Iterator[dict[str, Any]]:
    times = step.times
    held = None if step.held is None else {"request": step.held[0], "reason": step.held[1]}
    args = {
        "step": step.number, "shape": dataclasses.asdict(step.shape), "budget": step.budget, "held": held,
        "waiting": step.waiting, "evicted_blocks": step.evicted_blocks,
    }  # fmt: skip
    yield _span(f"step {step.number}", ENGINE, 1, (times.began, times.ended), zero, args)
    phases = (("schedule", times.began, times.decided), ("execute", times.decided, times.executed),
              ("book", times.executed, times.ended))  # fmt: skip
    for name, begin, end in phases:
        yield _span(name, ENGINE, 1, (begin, end), zero, {})
    counts = {"running": len(step.parts), "waiting": step.waiting}
    yield {"ph": "C", "name": "sequences", "pid": ENGINE, "tid": 1, "ts": _us(times.began, zero), "args": counts}


def _part(part: Part, step: StepRecord, zero: float) -> dict[str, Any]:
    name = "token" if part.count == 1 and part.sampled else f"tokens {part.start} to {part.start + part.count - 1}"
    args = {"step": step.number, "request": part.request_id, "start": part.start, "count": part.count,
            "sampled": part.sampled}  # fmt: skip
    if part.drafted:
        args |= {"drafted": part.drafted, "accepted": part.accepted}
    return _span(name, REQUESTS, part.sequence_id, (step.times.began, step.times.ended), zero, args)


def _instant(event: Happened, zero: float, step: int) -> dict[str, Any]:
    args = {"step": step, "request": event.request_id, "index": event.index, "tokens": event.tokens,
            "reason": event.reason}  # fmt: skip
    return {"ph": "i", "s": "t", "name": event.kind, "pid": REQUESTS, "tid": event.sequence_id,
            "ts": _us(event.time, zero), "args": args}  # fmt: skip


def _span(
    name: str, pid: int, tid: int, span: tuple[float, float], zero: float, args: dict[str, Any]
) -> dict[str, Any]:
    begin, end = span
    return {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": _us(begin, zero), "dur": _us(end, begin),
            "args": args}  # fmt: skip


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _sequences(step: StepRecord) -> Iterator[tuple[int, str]]:
    yield from ((event.sequence_id, event.request_id) for event in step.happened)
    yield from ((part.sequence_id, part.request_id) for part in step.parts)


def _us(time: float, zero: float) -> float:
    return round(1e6 * (time - zero), 3)
