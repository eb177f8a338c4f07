"""A trace as a few lines: how long, how full, where the time went, who waited longest."""

from __future__ import annotations

from kvarn.tracing.history import History, Life

SHOWN = 5


def summary(history: History) -> str:
    """The text of `kvarn trace show`."""
    steps = list(history.steps.values())
    if not steps:
        return "the trace has no steps"
    span = steps[-1].end - steps[0].begin
    busy = sum(step.end - step.begin for step in steps)
    tokens = sum(step.num_tokens for step in steps)
    shares = [share for life in history.lives.values() for share in life.shares]
    sampled = sum(share.sampled + share.accepted for share in shares)
    full = sum(step.num_tokens >= step.budget for step in steps)
    moments = [moment for life in history.lives.values() for moment in life.moments]
    hits = sum(moment.tokens for moment in moments if moment.kind in ("admitted", "found"))
    requests = {life.request_id for life in history.lives.values()}
    lines = [
        f"{len(steps):,} steps in {span:.3f} s, the engine at work {_percent(busy, span)} of it"
        + (f"; {history.dropped_steps:,} older steps were not kept" if history.dropped_steps else ""),
        f"{tokens:,} tokens computed, {sampled:,} sampled, for {len(requests):,} requests; {hits:,} found in the cache",
        f"a step has {tokens / len(steps):.1f} tokens of {sum(s.num_sequences for s in steps) / len(steps):.1f} "
        f"sequences; {_percent(full, len(steps))} of them use the whole budget",
        f"{sum(moment.kind == 'preempted' for moment in moments):,} preemptions, "
        f"{sum(step.evicted_blocks for step in steps):,} cached blocks evicted",
        "time: " + ", ".join(f"{name} {_percent(seconds, busy)}" for name, seconds in history.phases.items()),
        "longest steps: "
        + ", ".join(
            f"{step.number} ({1e3 * (step.end - step.begin):.1f} ms, {step.num_tokens} tokens)"
            for step in sorted(steps, key=lambda step: step.begin - step.end)[:SHOWN]
        ),
    ]
    drafted = sum(share.drafted for share in shares)
    if drafted:
        accepted = sum(share.accepted for share in shares)
        lines.append(f"{drafted:,} tokens guessed ahead, {_percent(accepted, drafted)} of them right")
    waits = sorted(((_first_token(life), life) for life in history.lives.values()), key=lambda item: -item[0])
    late = [f"{life.request_id} ({seconds:.3f} s)" for seconds, life in waits[:SHOWN] if seconds > 0]
    if late:
        lines.append(f"longest to a first token: {', '.join(late)}")
    return "\n".join(lines)


def _first_token(life: Life) -> float:
    """Seconds from coming in to the first token; 0 where one of both is not in the trace."""
    queued = next((moment.time for moment in life.moments if moment.kind == "queued"), None)
    sampled = next((share.end for share in life.shares if share.sampled), None)
    return 0.0 if queued is None or sampled is None else sampled - queued


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole > 0 else "–"
