"""`EngineCore`: requests in, one step at a time, outputs out. Synchronous, and the same whoever drives it."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any

from kvarn.engine.events import EngineStats, Event, RequestFailed, join_parts
from kvarn.engine.meter import Meter
from kvarn.engine.output import RequestText
from kvarn.engine.steps import Steps
from kvarn.errors import EngineError, KvarnError, RequestError
from kvarn.grammar import CompiledGrammar, GrammarCompiler, GrammarStats
from kvarn.request import FinishReason, Request, RequestOutput, SequenceOutput
from kvarn.runner import Runner
from kvarn.scheduler import MeasuredCost, NullObserver, Observer, Scheduler, Sequence, StepShape, StepTimes
from kvarn.step import FailedSequence, SampledToken, SchedulerOutput, StepOutput
from kvarn.text import Tokenizer, token_sequences

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Counters:
    """What `EngineStats` counts since the start; a reset does not set it back."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    failed_steps: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    evicted_tokens: int = 0
    saved_tokens: int = 0
    loaded_tokens: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_by_position: tuple[int, ...] = ()
    copied_tokens: int = 0
    accepted_copies: int = 0
    draft_seconds: float = 0.0

    def plus(self, scheduler: Scheduler) -> _Counters:
        """With what the scheduler has counted."""
        drafted = scheduler.drafting.counts
        by_position = zip_longest(self.accepted_by_position, drafted.by_position, fillvalue=0)
        return replace(
            self,
            drafts=self.drafts + drafted.drafts,
            draft_tokens=self.draft_tokens + drafted.draft_tokens,
            accepted_tokens=self.accepted_tokens + drafted.accepted_tokens,
            accepted_by_position=tuple(map(sum, by_position)),
            copied_tokens=self.copied_tokens + drafted.copied_tokens,
            accepted_copies=self.accepted_copies + drafted.accepted_copies,
            draft_seconds=self.draft_seconds + drafted.seconds,
            preemptions=self.preemptions + scheduler.num_preemptions,
            prefix_queries=self.prefix_queries + scheduler.reuse.num_queries,
            prefix_hits=self.prefix_hits + scheduler.reuse.num_hits,
            evicted_tokens=self.evicted_tokens + scheduler.reuse.num_evicted_tokens,
            saved_tokens=self.saved_tokens + scheduler.reuse.num_saved_tokens,
            loaded_tokens=self.loaded_tokens + scheduler.reuse.num_loaded_tokens,
        )


class EngineCore:
    """A scheduler, a runner and a tokenizer put together. Not thread-safe, but for `check`.

    Owns the runner and closes it. After `step` raised, `reset` brings the engine back to an empty state.
    """

    def __init__(
        self,
        runner: Runner,
        new_scheduler: Callable[[], Scheduler],
        tokenizer: Tokenizer,
        vocab_size: int,
        *,
        cost: MeasuredCost | None = None,
        observer: Observer | None = None,
        grammars: GrammarCompiler | None = None,
        clock: Callable[[], float] = time.perf_counter,
        idle: Callable[[], bool] = lambda: False,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """new_scheduler: makes an empty scheduler over the runner's blocks. vocab_size: width of the logits.

        grammars: compiles those of requests, for the runner to find; owned from now on; None: a request must have none.
        cost: learns from every step that succeeds, scheduling and texts included, but not what moving blocks and
        guessing took.
        observer: told of every step, with times of `clock` in seconds; `new_scheduler` tells it of the rest.
        idle: something of milliseconds that may be done while there is no work; False where nothing is left of it, at
        least until another step was taken.
        on_close: called after the runner is closed (the model's files, from which a back-end may still read).
        """
        self._runner = runner
        self._on_close = on_close
        self._new_scheduler = new_scheduler
        self._scheduler = new_scheduler()
        self._limits, self._check_order = self._scheduler.limits, self._scheduler.policy.check
        self._check_drafts = self._scheduler.drafting.control.check
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._texts: dict[str, RequestText] = {}
        self._grammars = grammars
        self._compiled: dict[str, CompiledGrammar] = {}
        """Those of the requests, so that the runner finds them whenever a sequence begins."""
        self._counters = _Counters()
        self.meter = Meter()
        self._cost = cost or MeasuredCost()
        self._observer = observer or NullObserver()
        self._clock = clock
        self._steps = Steps(runner, clock, self.meter.scheduled)
        self._idle = idle
        self._closed = False

    def check(self, request: Request) -> None:
        """Raises RequestError, naming field and limit, for a request this engine can never run. Any thread may call."""
        self._limits.check(request)
        self._check_order(request)
        self._check_drafts(request)
        if request.pooling is not None and not self._runner.pooler.active:
            raise RequestError("this engine makes no embeddings", field="pooling")
        sampling = request.sampling
        if sampling.grammar is not None:
            self.grammars.check(sampling.grammar)
        for field, ids in (
            ("prompt", request.prompt_token_ids),
            ("logit_bias", sampling.logit_bias),
            ("stop_token_ids", sampling.stop_token_ids),
            ("allowed_token_ids", sampling.allowed_token_ids or ()),
            ("bad_words", [token for word in sampling.bad_words if not isinstance(word, str) for token in word]),
        ):
            wrong = next((token for token in ids if not 0 <= token < self._vocab_size), None)
            if wrong is not None:
                raise RequestError(f"{field}: token ids are 0 to {self._vocab_size - 1}, not {wrong}", field=field)

    def resolve(self, request: Request) -> Request:
        """The same with token ids in place of the texts of `bad_words`. Any thread may call; idempotent."""
        sampling = request.sampling
        if not any(isinstance(word, str) for word in sampling.bad_words):
            return request
        words = token_sequences(self._tokenizer, sampling.bad_words)
        return replace(request, sampling=replace(sampling, bad_words=words))

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    @property
    def grammars(self) -> GrammarCompiler:
        """Compiles grammars. Raises RequestError where none are taken."""
        if self._grammars is None:
            raise RequestError("this engine takes no grammars", field="grammar")
        return self._grammars

    def now(self) -> float:
        """The time of the engine's clock, in seconds. Any thread may call."""
        return self._clock()

    def add(self, request: Request, *, arrived: float | None = None) -> None:
        """Queues a request. Without a seed it gets one at random. Raises RequestError, OverloadError.

        Waits for its grammar where that is not compiled yet (see `grammars`). arrived: since when it waits; None: now.
        """
        arrived = self._clock() if arrived is None else arrived
        request = self.resolve(request)
        self.check(request)
        grammar = request.sampling.grammar
        compiled = None if grammar is None else self.grammars.find(grammar) or self.grammars.compile(grammar)
        sequences = self._scheduler.add(request, seed=secrets.randbits(63))
        try:
            clock = self.meter.queued(request, sequences, arrived)
            self._texts[request.request_id] = RequestText(request, sequences, self._tokenizer, clock)
        except Exception:
            self._scheduler.abort(request.request_id)
            raise
        if compiled is not None:
            self._compiled[request.request_id] = compiled

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request and frees its blocks at once. Returns its last output; None where there is no such request."""
        self._scheduler.abort(request_id)
        text = self._forget(request_id, FinishReason.ABORT)
        return None if text is None else text.abort()

    def _forget(self, request_id: str, broken_off: FinishReason) -> RequestText | None:
        """broken_off: why, where it is not finished."""
        self._compiled.pop(request_id, None)
        text = self._texts.pop(request_id, None)
        if text is not None and not text.finished:
            self.meter.broken_off(text.clock, broken_off, text.num_unfinished, self._clock())
        return text

    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self._scheduler.has_work() or self._steps.under_way

    def idle(self) -> bool:
        """Does a piece of what can be done while there is no work; False where nothing is left to do for now.

        Raises what that raises, as `step` does.
        """
        return self._idle()

    def step(self) -> list[Event]:
        """Runs one step; returns what each request gained by it. The next one may be under way then.

        Raises what the runner raises: then nothing is known of the state, and only `reset` and `close` may follow.
        """
        try:
            return self._step()
        except BaseException:
            self._counters.failed_steps += 1
            raise

    def _step(self) -> list[Event]:
        step = self._steps.take(self._scheduler)
        scheduled, result = step.scheduled, step.result
        events = self._book(scheduled, result, step.executed)
        times = StepTimes(step.began, step.decided, step.executed, self._clock())
        ended = times.executed if step.overlaps else times.ended
        shape, seconds = StepShape.of(scheduled), ended - times.began - result.aside_seconds
        self._cost.observe(shape, seconds)
        self._scheduler.drafting.control.timed(shape, seconds)
        self._observer.stepped(scheduled, times)
        self.meter.stepped(scheduled, times.began, times.ended)
        return events

    def _book(self, scheduled: SchedulerOutput, result: StepOutput, now: float) -> list[Event]:
        """What each request gained by a step. now: when it was computed."""
        parts: dict[str, list[SequenceOutput]] = {}
        for prompt in result.prompt_logprobs:
            for text in self._texts.values():
                if text.is_unfinished(prompt.sequence_id):
                    text.prompt_logprobs += prompt.logprobs
        failed: list[Event] = []
        pooled = {vector.sequence_id: vector.vector for vector in result.pooled}

        def stops(sequence: Sequence, token: SampledToken) -> str | int | None:
            request_id = sequence.request.request_id
            text = self._texts.get(request_id)
            if text is None:
                return None
            text.embedding = pooled.get(sequence.sequence_id)
            try:
                output = text.append(sequence, token)
            except Exception:
                failed.append(self._fail_one(request_id))
                return None
            parts.setdefault(request_id, []).append(output)
            return output.stop_reason

        self._count(self._scheduler.update(scheduled, result, stops))
        failed += self._fail_sequences(result)
        return failed + [self._message(i, outputs, now) for i, outputs in parts.items() if i in self._texts]

    def stats(self) -> EngineStats:
        """A snapshot."""
        scheduler = self._scheduler
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            queued=scheduler.backlog.requests,
            queued_tokens=scheduler.backlog.prompt_tokens,
            num_blocks=scheduler.num_blocks,
            free_blocks=scheduler.num_free_blocks,
            cached_blocks=scheduler.num_cached_blocks,
            **self._grammar_numbers(),
            **asdict(self._counters.plus(scheduler)),
        )

    def _grammar_numbers(self) -> dict[str, Any]:
        compiled = GrammarStats() if self._grammars is None else self._grammars.stats()
        masks = self._runner.grammars
        return {
            "grammars_compiled": compiled.compiled,
            "grammar_cache_hits": compiled.cache_hits,
            "grammars_refused": compiled.refused,
            "grammar_compile_seconds": compiled.compile_seconds,
            "grammar_mask_seconds": masks.seconds,
            "grammar_wait_seconds": masks.waited_seconds,
        }

    def forget_cached(self) -> int:
        """Drops the KV that is only cached, in the second tier's file too; returns how many blocks that were.

        What sequences hold stays, and so do declared prefixes. No answer changes by it.
        """
        count = self._scheduler.reuse.forget()
        self._runner.forget_moved()
        return count

    def reset(self) -> None:
        """Drops all requests and starts anew, after `step` raised: nothing of the cache is believed, only the weights.

        Raises where the program does not run any more; may be tried again then.
        """
        for request_id in list(self._texts):
            self._forget(request_id, FinishReason.ERROR)
        self.meter.reset()
        self._observer.reset()
        scheduler, counters = self._new_scheduler(), self._counters.plus(self._scheduler)
        self._scheduler, self._counters = scheduler, counters
        self._steps.forget()
        self._runner.reset()

    def close(self) -> None:
        """Saves the prefix cache to its second tier, where there is one, and releases the model. Idempotent."""
        if not self._closed:
            self._closed = True
            self._spill()
        self._runner.close()
        if self._grammars is not None:
            self._grammars.close()
        self._on_close()

    def _spill(self) -> None:
        self._steps.forget()
        scheduled = self._scheduler.spill()
        if scheduled.block_saves:
            try:
                self._runner.execute(scheduled)
            except Exception:
                logger.exception("the prefix cache could not be saved")

    def _message(self, request_id: str, outputs: list[SequenceOutput], now: float) -> RequestOutput:
        text = self._texts[request_id]
        gains = tuple(outputs) if len(outputs) == 1 else join_parts(outputs)
        self.meter.gained(text.clock, gains, now)
        if text.finished:
            self.meter.finished(text.clock, text.num_cached_tokens, now)
            self._forget(request_id, FinishReason.STOP)
        return text.output(gains)

    def _fail_one(self, request_id: str) -> RequestFailed:
        """Ends a request whose text could not be made; the others go on."""
        error_id = new_error_id()
        logger.exception("request %s failed (error id %s)", request_id, error_id)
        self._scheduler.abort(request_id)
        self._forget(request_id, FinishReason.ERROR)
        return RequestFailed(request_id, EngineError(f"the request failed in the engine (error id {error_id})"))

    def _fail_sequences(self, result: StepOutput) -> list[Event]:
        """Ends the requests that cannot go on."""
        failed: list[Event] = []
        for sequence in result.failed:
            found = (i for i, text in self._texts.items() if text.is_unfinished(sequence.sequence_id))
            request_id = next(found, None)
            if request_id is not None:
                self._scheduler.abort(request_id, keep=sequence.finite)
                if sequence.field == "grammar":
                    self.grammars.forget(self._compiled[request_id].grammar)
                self._forget(request_id, FinishReason.ERROR)
                failed.append(RequestFailed(request_id, self._reason(request_id, sequence)))
        return failed

    @staticmethod
    def _reason(request_id: str, sequence: FailedSequence) -> KvarnError:
        if sequence.field:
            return RequestError(sequence.message, field=sequence.field)
        error_id = new_error_id()
        logger.error("request %s failed (error id %s): %s", request_id, error_id, sequence.message)
        told = "the request failed in the engine" if sequence.finite else sequence.message
        return EngineError(f"{told} (error id {error_id})")

    def _count(self, sampled: list[tuple[Sequence, SampledToken]]) -> None:
        counters = self._counters
        counters.steps += 1
        counters.generated_tokens += len(sampled)
        for sequence, _ in sampled:
            if sequence.index == 0 and sequence.num_output_tokens == 1:
                counters.prompt_tokens += sequence.num_prompt_tokens


def new_error_id() -> str:
    """A short id that is in the log and in the client's error, so that one finds the other."""
    return secrets.token_hex(6)
