"""One request's life in plain words: why it waited, what it hit, when it was preempted, what made its tokens late."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from kvarn.tracing.history import History, Life, Moment, Share

REASONS = {
    "seats": "as many sequences ran as may run at once (max_num_seqs)",
    "budget": "the tokens of the step were given out (max_num_batched_tokens)",
    "blocks": "too few blocks of the KV cache were free",
    "repeats": "another was computing the same tokens, which it could then find in the cache",
    "loading": "its blocks were being read from the second tier",
}


def explain(history: History, request_id: str) -> str:
    """The story of each sequence of the request. Raises ConfigError where the trace has no such request."""
    lives = history.of_request(request_id)
    stories = []
    for number, life in enumerate(lives):
        title = life.request_id if len(lives) == 1 else f"{life.request_id}, answer {number}"
        stories.append("\n".join([title, *(f"  {line}" for line in _story(history, life))]))
    return "\n".join(stories)


def _story(history: History, life: Life) -> Iterator[str]:
    moments = sorted(life.moments, key=lambda moment: moment.time)
    if history.dropped_steps and (not moments or moments[0].kind != "queued"):
        yield f"came before the trace begins ({history.dropped_steps} older steps were not kept)"
    zero = moments[0].time if moments else life.shares[0].begin if life.shares else 0.0
    waits_since: Moment | None = None
    for moment in moments:
        at = f"{moment.time - zero:9.3f} s  "
        if moment.kind == "queued":
            yield f"{at}came in with a prompt of {_tokens(moment.tokens)}"
            waits_since = moment
        elif moment.kind == "admitted":
            yield from _waited(history, life, waits_since, moment, at)
            again = waits_since is not None and waits_since.kind == "preempted"
            yield f"{at}took part from step {moment.step} on; {_hit(moment.tokens, again)}"
            waits_since = None
        elif moment.kind == "found":
            yield f"{at}went on from {_tokens(moment.tokens)} more, which another had computed meanwhile"
        elif moment.kind == "loaded":
            yield f"{at}{_tokens(moment.tokens)} were read from the second tier into the cache in step {moment.step}"
        elif moment.kind == "preempted":
            yield (f"{at}was preempted in step {moment.step}: blocks ran out, and it was last in order; "
                   f"it gave up the blocks of {_tokens(moment.tokens)}")  # fmt: skip
            waits_since = moment
        elif moment.kind == "ended":
            yield from _answered(history, life, zero)
            yield f"{at}ended ({moment.reason}) after {_tokens(moment.tokens)}"
    if not any(moment.kind == "ended" for moment in moments):
        yield from _answered(history, life, zero)
        yield "had not ended when the trace ended"


def _waited(history: History, life: Life, since: Moment | None, until: Moment, at: str) -> Iterator[str]:
    """Why a sequence was not admitted in the steps between two moments."""
    if since is None:
        return
    passed = [step for step in history.steps.values() if since.time <= step.begin and step.number < until.step]
    seconds = until.time - since.time
    if not passed:
        yield f"{at}had waited {seconds:.3f} s, for the next step to begin"
        return
    reasons = Counter(
        step.held[1] if step.held is not None and step.held[0] == life.request_id else "" for step in passed
    )
    behind = reasons.pop("", 0)
    parts = [f"in {_steps(behind)} others were before it"] if behind else []
    parts += [f"in {_steps(count)} it was first in line, but {REASONS.get(reason, reason)}"
              for reason, count in reasons.most_common()]  # fmt: skip
    evicted = sum(step.evicted_blocks for step in passed)
    parts += [f"cached blocks evicted meanwhile: {evicted:,}"] if evicted else []
    yield f"{at}had waited {seconds:.3f} s and {_steps(len(passed))}: {'; '.join(parts)}"


def _hit(tokens: int, again: bool) -> str:
    if tokens:
        return f"{_tokens(tokens)} were {'still ' if again else 'found '}in the cache"
    return "all is computed again" if again else "nothing of it was found in the cache"


def _answered(history: History, life: Life, zero: float) -> Iterator[str]:
    """From the first share of the prompt to the last token."""
    sampled = [share for share in life.shares if share.sampled]
    if not sampled:
        return
    before = [share for share in life.shares if share.end <= sampled[0].end]
    computed = sum(share.count for share in before)
    yield (f"{sampled[0].end - zero:9.3f} s  first token, after {_tokens(computed)} were computed in "
           f"{_steps(len(before))}")  # fmt: skip
    gaps = [(later.end - earlier.end, later) for earlier, later in pairwise(sampled)]
    if gaps:
        longest, share = max(gaps, key=lambda gap: gap[0])
        tokens = sum(1 + share.accepted for share in sampled)
        mean = (sampled[-1].end - sampled[0].end) / (tokens - 1)
        yield (f"{sampled[-1].end - zero:9.3f} s  last of {_tokens(tokens)}; {1e3 * mean:.1f} ms between tokens, "
               f"at most {1e3 * longest:.1f} ms{_why_late(history, share, longest)}")  # fmt: skip
    drafted = sum(share.drafted for share in sampled)
    if drafted:
        accepted = sum(share.accepted for share in sampled)
        yield (f"{'':11}  {_tokens(drafted)} were guessed ahead, {accepted:,} of them right: "
               f"{_steps(len(sampled))} instead of {len(sampled) + accepted:,}")  # fmt: skip


def _why_late(history: History, share: Share, gap: float) -> str:
    step = history.steps.get(share.step)
    if step is None:
        return ""
    if step.end - step.begin < 0.5 * gap:
        return f" (before step {share.step}: it did not take part all the time)"
    others = step.num_tokens - share.count - share.drafted
    return f" (step {share.step}, in which {step.num_sequences - 1} others computed {_tokens(others)})"


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count:,} tokens"


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count:,} steps"
