"""`Meter`: how long requests and steps take, and how large they are, in histograms. Owned by `EngineCore`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from kvarn.engine.histogram import Histogram, HistogramSnapshot
from kvarn.request import FinishReason, Request, RequestTimes, SequenceOutput
from kvarn.scheduler import Sequence as EngineSequence
from kvarn.step import SchedulerOutput

# The same bounds for every model, so that histograms of several can be added.
TOKEN_SECONDS = (
    0.0005, 0.001, 0.0015, 0.002, 0.0025, 0.003, 0.004, 0.005, 0.006, 0.0075, 0.01, 0.0125, 0.015, 0.02, 0.025, 0.03,
    0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""Between tokens, and for steps: an answer of a small model has its next token in 3 ms."""
REQUEST_SECONDS = (
    0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4,
    0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0, 480.0, 960.0,
)  # fmt: skip
TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
"""1, 2, 5, 10 … 500,000."""
ANSWERS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
BOUNDS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "time_to_first_token_seconds": REQUEST_SECONDS,
        "inter_token_latency_seconds": TOKEN_SECONDS,
        "request_time_per_output_token_seconds": TOKEN_SECONDS,
        "e2e_request_latency_seconds": REQUEST_SECONDS,
        "request_queue_time_seconds": REQUEST_SECONDS,
        "request_inference_time_seconds": REQUEST_SECONDS,
        "request_prefill_time_seconds": REQUEST_SECONDS,
        "request_decode_time_seconds": REQUEST_SECONDS,
        "request_prompt_tokens": TOKENS,
        "request_prefill_kv_computed_tokens": TOKENS,
        "request_generation_tokens": TOKENS,
        "request_params_max_tokens": TOKENS,
        "request_params_n": ANSWERS,
        "iteration_tokens_total": TOKENS,
        "engine_step_seconds": TOKEN_SECONDS,
        "output_delivery_seconds": TOKEN_SECONDS,
    }
)
"""Each histogram's buckets, under vLLM's names where it has one. The last is `AsyncLLM`'s, which delivers."""


class RequestClock:
    """When things happened to one request. Filled by `Meter`."""

    __slots__ = ("_ended", "answers", "arrived", "request", "sequence_ids", "started")

    def __init__(self, request: Request, sequence_ids: tuple[int, ...], arrived: float) -> None:
        self.request = request
        self.sequence_ids = sequence_ids
        self.arrived = arrived
        self.started: float | None = None
        self.answers = [_AnswerClock() for _ in sequence_ids]
        self._ended: float | None = None

    def end(self, now: float) -> None:
        """Nothing more comes of it."""
        self._ended = now

    @property
    def times(self) -> RequestTimes | None:
        """What became of it; None until its end."""
        if self._ended is None:
            return None
        first = min((answer.first for answer in self.answers if answer.tokens), default=None)
        return RequestTimes(self.arrived, self.started, first, self._ended)


class _AnswerClock:
    """One sequence of a request."""

    __slots__ = ("first", "last", "tokens")

    def __init__(self) -> None:
        self.first = self.last = 0.0
        self.tokens = 0


class Meter:
    """Numbers of requests and steps. The engine's thread calls what mutates; `snapshot` and `ended` may be read by any.

    Times are seconds of the engine's clock. A request's are its own, an answer's those of each of its `n` sequences.
    Requests that were aborted or failed count in `ended` only: how long they took says nothing of the engine.
    """

    def __init__(self) -> None:
        self._histograms = {name: Histogram(bounds) for name, bounds in BOUNDS.items()}
        self.delivery = self._histograms["output_delivery_seconds"]
        """Not for the engine's thread: whoever delivers outputs observes."""
        self._gap = self._histograms["inter_token_latency_seconds"].observe
        self._unstarted: dict[int, RequestClock] = {}
        """By the ids of sequences that have not been scheduled."""
        self._ended = Counter(dict.fromkeys(FinishReason, 0))

    def queued(self, request: Request, sequences: Sequence[EngineSequence], arrived: float) -> RequestClock:
        """A request is known to the scheduler. arrived: when it was handed to the engine."""
        clock = RequestClock(request, tuple(sequence.sequence_id for sequence in sequences), arrived)
        self._unstarted.update(dict.fromkeys(clock.sequence_ids, clock))
        return clock

    def stepped(self, scheduled: SchedulerOutput, began: float, ended: float) -> None:
        """A step was taken. One that computes nothing (the runner is told to forget) is not observed."""
        tokens = scheduled.num_tokens
        if tokens:
            self._observe("engine_step_seconds", ended - began)
            self._observe("iteration_tokens_total", tokens)

    def scheduled(self, scheduled: SchedulerOutput, now: float) -> None:
        """A step was decided: those that are new in it have waited until now."""
        for new in scheduled.new:
            clock = self._unstarted.pop(new.sequence_id, None)
            if clock is not None and clock.started is None:
                clock.started = now

    def gained(self, clock: RequestClock, outputs: Iterable[SequenceOutput], now: float) -> None:
        """Answers of a request have new tokens, which came in one step."""
        for output in outputs:
            answer = clock.answers[output.index]
            if answer.tokens:
                self._gap(now - answer.last)
            else:
                if not any(other.tokens for other in clock.answers):
                    self._observe("time_to_first_token_seconds", now - clock.arrived)
                answer.first = now
            answer.last = now
            answer.tokens += len(output.token_ids)
            if output.finish_reason is not None:
                self._ended[output.finish_reason] += 1
                self._answered(answer)

    def finished(self, clock: RequestClock, cached_tokens: int, now: float) -> None:
        """All answers of a request are complete. cached_tokens: those of its prompt that were not computed for it."""
        self._close(clock, now)
        times, sampling, prompt = clock.times, clock.request.sampling, len(clock.request.prompt_token_ids)
        assert times is not None
        self._observe("e2e_request_latency_seconds", times.seconds)
        for name, seconds in (
            ("request_queue_time_seconds", times.queue_seconds),
            ("request_prefill_time_seconds", times.prefill_seconds),
            ("request_decode_time_seconds", times.decode_seconds),
            ("request_inference_time_seconds", times.inference_seconds),
        ):
            if seconds is not None:
                self._observe(name, seconds)
        self._observe("request_prompt_tokens", prompt)
        self._observe("request_prefill_kv_computed_tokens", prompt - cached_tokens)
        self._observe("request_params_n", sampling.n)
        if sampling.max_tokens is not None:
            self._observe("request_params_max_tokens", sampling.max_tokens)

    def broken_off(self, clock: RequestClock, reason: FinishReason, unfinished: int, now: float) -> None:
        """A request ends before so many of its answers are complete."""
        self._close(clock, now)
        self._ended[reason] += unfinished

    def reset(self) -> None:
        """Ids of sequences begin anew."""
        self._unstarted.clear()

    @property
    def ended(self) -> Mapping[str, int]:
        """Answers that ended, by their finish reasons."""
        return {reason.value: count for reason, count in self._ended.items()}

    def snapshot(self) -> Mapping[str, HistogramSnapshot]:
        """All histograms, by name."""
        return {name: histogram.snapshot() for name, histogram in self._histograms.items()}

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)

    def _answered(self, answer: _AnswerClock) -> None:
        self._observe("request_generation_tokens", answer.tokens)
        if answer.tokens > 1:
            self._observe("request_time_per_output_token_seconds", (answer.last - answer.first) / (answer.tokens - 1))

    def _close(self, clock: RequestClock, now: float) -> None:
        clock.end(now)
        for sequence_id in clock.sequence_ids:
            self._unstarted.pop(sequence_id, None)


NO_HISTOGRAMS: Mapping[str, HistogramSnapshot] = MappingProxyType(Meter().snapshot())
"""Those of an engine that has done nothing."""
