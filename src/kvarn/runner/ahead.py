"""`StepsAhead`: the runner's side of steps that are begun before the tokens of the step before are known here."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvarn.backends import InputBatch
from kvarn.backends.ahead import AheadExecutable
from kvarn.sampling.reference import choose
from kvarn.sampling.rules import RuleBook, needs_host
from kvarn.step import PENDING, NewSequence, SampledToken, ScheduledSequence, SchedulerOutput

Parts = Sequence[ScheduledSequence]


class Ahead(Protocol):
    """What a runner asks of it."""

    def add(self, sequence: NewSequence) -> None:
        """A sequence that will be in the next step."""
        ...

    def remove(self, sequence_id: int) -> None:
        """Forgets a sequence; unknown ones are ignored."""
        ...

    def takes(self, scheduled: SchedulerOutput) -> bool:
        """Whether `submit` may have the step."""
        ...

    def submit(self, scheduled: SchedulerOutput, batch: InputBatch) -> None:
        """Begins a step that it takes. batch: of its sequences; its `PENDING` tokens are those of the step before."""
        ...

    def collect(self) -> tuple[SchedulerOutput, list[SampledToken]]:
        """Waits for the oldest step that was begun; with its tokens, or marks in their place, as `Sampler.sample`."""
        ...

    def rechosen(self, sampled: list[SampledToken], logits: NDArray[np.float32], parts: Parts) -> list[SampledToken]:
        """What the sampler said to the rows of logits of an executed step, by part, but for sequences of whose tokens
        it does not know all, since some were chosen on the card."""
        ...

    def known(self, scheduled: SchedulerOutput) -> SchedulerOutput:
        """The step with the tokens in place of `PENDING`, all steps before it being collected."""
        ...

    def discard(self) -> None:
        """Forgets what was begun and not collected."""
        ...


class NeverAhead:
    """For back-ends that answer in the call."""

    def add(self, sequence: NewSequence) -> None:
        """Nothing."""

    def remove(self, sequence_id: int) -> None:
        """Nothing."""

    def takes(self, scheduled: SchedulerOutput) -> bool:
        """No."""
        del scheduled
        return False

    def submit(self, scheduled: SchedulerOutput, batch: InputBatch) -> None:
        """Is not called."""
        del scheduled, batch
        raise AssertionError("no step is taken")

    def collect(self) -> tuple[SchedulerOutput, list[SampledToken]]:
        """Is not called."""
        raise AssertionError("no step was begun")

    def rechosen(self, sampled: list[SampledToken], logits: NDArray[np.float32], parts: Parts) -> list[SampledToken]:
        """The same."""
        del logits, parts
        return sampled

    def known(self, scheduled: SchedulerOutput) -> SchedulerOutput:
        """The same."""
        return scheduled

    def discard(self) -> None:
        """Nothing."""


class StepsAhead:
    """Submits steps to an executable that chooses tokens by itself.

    It takes a step that computes something, moves nothing to or from the second tier, guesses nothing, and has no
    sequence whose tokens must be chosen on the host (`needs_host`). All other steps wait for what comes before them.
    """

    def __init__(self, executable: AheadExecutable, rules: RuleBook) -> None:
        self._executable = executable
        self._rules = rules
        self._on_host: set[int] = set()
        self._begun: deque[SchedulerOutput] = deque()
        self._rows: dict[int, int] = {}
        """Of each sequence that the last submitted step samples the row of logits."""
        self._said: dict[int, int] = {}
        """What the last collected step sampled."""

    def add(self, sequence: NewSequence) -> None:
        """See `Ahead.add`."""
        if needs_host(sequence):
            self._on_host.add(sequence.sequence_id)
        else:
            self._rules.add(sequence)

    def remove(self, sequence_id: int) -> None:
        """See `Ahead.remove`."""
        self._on_host.discard(sequence_id)
        self._rules.remove(sequence_id)

    def takes(self, scheduled: SchedulerOutput) -> bool:
        """See `Ahead.takes`."""
        if scheduled.block_saves or scheduled.block_loads or any(needs_host(new) for new in scheduled.new):
            return False
        parts = scheduled.sequences
        return bool(parts) and not any(part.draft or part.sequence_id in self._on_host for part in parts)

    def submit(self, scheduled: SchedulerOutput, batch: InputBatch) -> None:
        """See `Ahead.submit`."""
        previous = np.full(batch.num_tokens, -1, np.int32)
        ends = batch.query_start[1:] - 1
        for row, part in zip(ends.tolist(), scheduled.sequences, strict=True):
            if part.token_ids[-1] == PENDING:
                previous[row] = self._rows[part.sequence_id]
                batch.token_ids[row] = 0
        parts = [part for part in scheduled.sequences if part.sample]
        ids, positions = [part.sequence_id for part in parts], [part.end for part in parts]
        self._executable.submit(batch, self._rules.of(ids, positions, previous[batch.output_rows].tolist()), previous)
        self._rows = {part.sequence_id: row for row, part in enumerate(parts)}
        self._begun.append(scheduled)

    def collect(self) -> tuple[SchedulerOutput, list[SampledToken]]:
        """See `Ahead.collect`."""
        scheduled = self._begun.popleft()
        ids = self._executable.collect().tolist()
        parts = [part for part in scheduled.sequences if part.sample]
        tokens = [SampledToken(part.sequence_id, token) for part, token in zip(parts, ids, strict=True)]
        self._said = {token.sequence_id: token.token_id for token in tokens}
        for token in tokens:
            self._rules.said(token.sequence_id, token.token_id)
        return scheduled, tokens

    def rechosen(self, sampled: list[SampledToken], logits: NDArray[np.float32], parts: Parts) -> list[SampledToken]:
        """See `Ahead.rechosen`: by the definition, since few tokens are in need of it."""
        for row, part in enumerate(parts):
            if self._rules.remembers(part.sequence_id):
                (token,) = choose(logits[row : row + 1], self._rules.of([part.sequence_id], [part.end])).tolist()
                self._rules.said(part.sequence_id, token)
                sampled[row] = SampledToken(part.sequence_id, token)
        return sampled

    def known(self, scheduled: SchedulerOutput) -> SchedulerOutput:
        """See `Ahead.known`."""
        if not any(part.token_ids[-1] == PENDING for part in scheduled.sequences):
            return scheduled
        return replace(scheduled, sequences=tuple(self._with_last(part) for part in scheduled.sequences))

    def _with_last(self, part: ScheduledSequence) -> ScheduledSequence:
        if part.token_ids[-1] != PENDING:
            return part
        # Where there was no token to sample the sequence has failed, and nobody looks at its row.
        return replace(part, token_ids=(*part.token_ids[:-1], max(0, self._said[part.sequence_id])))

    def discard(self) -> None:
        """See `Ahead.discard`."""
        self._begun.clear()
        self._rows.clear()
        self._said.clear()
        self._executable.discard()
