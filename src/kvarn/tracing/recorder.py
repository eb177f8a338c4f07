"""`TraceRecorder`: an observer that keeps the last steps, with what was decided in each."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from kvarn.request import FinishReason
from kvarn.scheduler import Hold, Sequence, StepShape, StepTimes
from kvarn.step import SchedulerOutput

MAX_ENTRIES = 200_000
"""Shares of sequences in steps, and steps, that are kept at most: some tens of megabytes."""


@dataclass(frozen=True, slots=True)
class Happened:
    """Something that a sequence went through. kind: queued, admitted, found, loaded, preempted or ended."""

    kind: str
    time: float
    sequence_id: int
    request_id: str
    index: int
    """0 … n-1 of its request."""
    tokens: int
    """queued: of its prompt. admitted: in the cache already. found: of another, beyond its own. loaded: from the second
    tier. preempted: computed until then. ended: sampled."""
    reason: str = ""
    """ended: why."""


@dataclass(frozen=True, slots=True)
class Part:
    """A sequence's share of a step."""

    sequence_id: int
    request_id: str
    start: int
    count: int
    sampled: bool


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step, and what happened since the one before."""

    number: int
    times: StepTimes
    shape: StepShape
    budget: int
    """Tokens that the step might have had at most."""
    parts: tuple[Part, ...]
    happened: tuple[Happened, ...] = ()
    held: tuple[str, str] | None = None
    """(request, reason) of the first waiting sequence, where it was not admitted."""
    waiting: int = 0
    """Sequences that wait, after the step."""
    evicted_blocks: int = 0


@dataclass(slots=True)
class _Gathered:
    """What has been told since the last step."""

    happened: list[Happened] = field(default_factory=list)
    held: tuple[str, str] | None = None
    evicted_blocks: int = 0


class TraceRecorder:
    """See `kvarn.scheduler.Observer`. Keeps the last steps; of older ones only that there were some.

    After the engine was reset, ids of sequences and numbers of steps go on where they stood, so that none is there
    twice. The step that failed is one without parts, in which the sequences that were lost ended.

    Called in the engine's thread; `steps` may be read when that has ended, or between two steps.
    """

    def __init__(
        self, budget: int, *, max_entries: int = MAX_ENTRIES, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """budget: the engine's max_num_batched_tokens. clock: the engine's."""
        self.steps: deque[StepRecord] = deque()
        self.num_dropped = 0
        """Steps that are not kept any more."""
        self._budget = budget
        self._max_entries = max_entries
        self._clock = clock
        self._entries = 0
        self._gathered = _Gathered()
        self._live: dict[int, Sequence] = {}
        """By the scheduler's id: those that have not ended before the last step."""
        self._waiting: set[int] = set()
        self._first_id = 0
        """What is added to the scheduler's ids, and to its steps' numbers."""
        self._next_id = 0
        self._first_step = 0
        self._last_step = 0

    def queued(self, sequence: Sequence) -> None:
        """See `Observer`."""
        self._live[sequence.sequence_id] = sequence
        self._next_id = max(self._next_id, self._first_id + sequence.sequence_id + 1)
        self._waiting.add(sequence.sequence_id)
        self._happened("queued", sequence, sequence.num_prompt_tokens)

    def admitted(self, sequence: Sequence) -> None:
        """See `Observer`."""
        self._waiting.discard(sequence.sequence_id)
        self._happened("admitted", sequence, sequence.num_computed_tokens)

    def held(self, sequence: Sequence, reason: Hold) -> None:
        """See `Observer`."""
        self._gathered.held = (sequence.request.request_id, reason.value)

    def preempted(self, sequence: Sequence) -> None:
        """See `Observer`."""
        self._waiting.add(sequence.sequence_id)
        self._happened("preempted", sequence, sequence.num_computed_tokens)

    def found(self, sequence: Sequence, num_tokens: int) -> None:
        """See `Observer`."""
        self._happened("found", sequence, num_tokens)

    def loaded(self, sequence: Sequence, num_tokens: int) -> None:
        """See `Observer`."""
        self._happened("loaded", sequence, num_tokens)

    def evicted(self, num_blocks: int) -> None:
        """See `Observer`."""
        self._gathered.evicted_blocks += num_blocks

    def ended(self, sequence: Sequence) -> None:
        """See `Observer`."""
        self._waiting.discard(sequence.sequence_id)
        reason = "" if sequence.finish_reason is None else sequence.finish_reason.value
        self._happened("ended", sequence, sequence.num_output_tokens, reason)

    def stepped(self, scheduled: SchedulerOutput, times: StepTimes) -> None:
        """See `Observer`."""
        parts = tuple(
            Part(self._first_id + p.sequence_id, self._name(p.sequence_id), p.start, len(p.token_ids), p.sample)
            for p in scheduled.sequences
        )
        record = self._record(self._first_step + scheduled.step, times, StepShape.of(scheduled), parts)
        for event in record.happened:
            if event.kind == "ended":
                self._live.pop(event.sequence_id - self._first_id, None)

    def reset(self) -> None:
        """See `Observer`."""
        for sequence in self._live.values():
            if not sequence.finished:
                self._happened("ended", sequence, sequence.num_output_tokens, FinishReason.ERROR.value)
        self._live.clear()
        self._waiting.clear()
        now = self._clock()
        self._record(self._last_step + 1, StepTimes(now, now, now, now), StepShape(0, 0, 0, 0), ())
        self._first_id, self._first_step = self._next_id, self._last_step

    def _name(self, sequence_id: int) -> str:
        sequence = self._live.get(sequence_id)
        return "" if sequence is None else sequence.request.request_id

    def _record(self, number: int, times: StepTimes, shape: StepShape, parts: tuple[Part, ...]) -> StepRecord:
        """Keeps a step, with what was told since the last one."""
        self._last_step = number
        gathered, self._gathered = self._gathered, _Gathered()
        record = StepRecord(
            number=number,
            times=times,
            shape=shape,
            budget=self._budget,
            parts=parts,
            happened=tuple(gathered.happened),
            held=gathered.held,
            waiting=len(self._waiting),
            evicted_blocks=gathered.evicted_blocks,
        )
        self.steps.append(record)
        self._entries += _entries(record)
        while self._entries > self._max_entries and len(self.steps) > 1:
            self._entries -= _entries(self.steps.popleft())
            self.num_dropped += 1
        return record

    def _happened(self, kind: str, sequence: Sequence, tokens: int, reason: str = "") -> None:
        sequence_id = self._first_id + sequence.sequence_id
        self._gathered.happened.append(
            Happened(kind, self._clock(), sequence_id, sequence.request.request_id, sequence.index, tokens, reason)
        )


def _entries(step: StepRecord) -> int:
    return 1 + len(step.parts) + len(step.happened)
