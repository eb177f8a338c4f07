"""What a load came to: percentiles of its times, rates, goodput, errors by kind, and how busy the client itself was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvarn.bench.serve.answers import Answer
from kvarn.bench.serve.ranks import Distribution
from kvarn.bench.serve.slo import Slo


@dataclass(frozen=True, slots=True)
class Window:
    """The measured part of a load, in seconds since its begin: the requests planned in it, and what comes in it.

    Answers that are not at their end then are waited for, so that the slow ones are in the percentiles.
    """

    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end - self.begin

    def holds(self, moment: float) -> bool:
        """Whether a moment is in it."""
        return self.begin <= moment <= self.end


@dataclass(frozen=True, slots=True)
class ClientLoad:
    """What the client itself took. cpu_seconds: of processor time, over `seconds`. late: seconds that its timers,
    twenty a second, woke up too late: an answer's time may be that much too long."""

    seconds: float
    cpu_seconds: float
    late: Distribution | None

    @property
    def cpu_share(self) -> float:
        """Of one processor."""
        return self.cpu_seconds / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Summary:
    """One load. Times in seconds, rates a second over the window; None where there was nothing to take them of."""

    requests: int
    """Planned in the window."""
    completed: int
    failed: int
    errors: Mapping[str, int]
    """By kind, most first."""
    details: Mapping[str, str]
    """What was said of the first of each kind."""
    seconds: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    counted: bool
    """Whether the server said how many tokens they are."""
    times: Mapping[str, Distribution | None]
    """By name of `slo.TIMES`; of requests that were answered whole."""
    lag: Distribution | None
    """How late requests were sent."""
    offered_per_s: float
    """Requests planned."""
    requests_per_s: float
    """Answers that came to their end in the window."""
    prompt_tokens_per_s: float
    """Of prompts whose first token came in it."""
    output_tokens_per_s: float
    """That came in it."""
    good: int
    """Requests planned in the window whose answer kept the limits."""
    goodput: float
    """Of these, a second."""
    client: ClientLoad


def summarize(answers: Sequence[Answer], window: Window, slo: Slo, client: ClientLoad) -> Summary:
    """The summary of a load, the requests before its window among it: their tokens may come in the window."""
    measured = [answer for answer in answers if window.holds(answer.planned)]
    whole = [answer for answer in measured if not answer.failure]
    failures = Counter(answer.failure for answer in measured if answer.failure)
    details: dict[str, str] = {}
    for answer in measured:
        if answer.failure:
            details.setdefault(answer.failure, answer.detail)
    good = sum(slo.good(answer) for answer in measured)
    seconds = window.seconds or 1e-9
    return Summary(
        requests=len(measured),
        completed=len(whole),
        failed=len(measured) - len(whole),
        errors=dict(failures.most_common()),
        details=details,
        seconds=window.seconds,
        prompt_tokens=sum(answer.prompt_tokens for answer in whole),
        output_tokens=sum(answer.output_tokens for answer in whole),
        cached_tokens=sum(answer.cached_tokens for answer in whole),
        counted=all(answer.counted for answer in whole),
        times={
            "ttft": Distribution.of(answer.ttft for answer in whole if answer.ttft is not None),
            "tpot": Distribution.of(answer.tpot for answer in whole if answer.tpot is not None),
            "itl": Distribution.of(gap for answer in whole for gap in answer.gaps),
            "e2e": Distribution.of(answer.e2e for answer in whole),
        },
        lag=Distribution.of(answer.lag for answer in measured),
        offered_per_s=len(measured) / seconds,
        requests_per_s=sum(not a.failure and window.holds(a.end) for a in answers) / seconds,
        prompt_tokens_per_s=sum(a.prompt_tokens for a in answers if a.stamps and window.holds(a.stamps[0])) / seconds,
        output_tokens_per_s=sum(_tokens_in(answer, window) for answer in answers) / seconds,
        good=good,
        goodput=good / seconds,
        client=client,
    )


def _tokens_in(answer: Answer, window: Window) -> float:
    """Tokens that came in the window; each event of an answer has as many as the others."""
    inside = sum(window.holds(stamp) for stamp in answer.stamps)
    return inside * answer.output_tokens / len(answer.stamps) if inside else 0.0
