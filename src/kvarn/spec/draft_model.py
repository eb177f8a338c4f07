"""`DraftModelDrafter`: a smaller model with the same vocabulary says what comes next (Leviathan et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvarn.backends import Executable, StepLimits
from kvarn.runner import BatchBuilder, Proposal
from kvarn.sampling import Sampler
from kvarn.spec.chain import probability_of
from kvarn.spec.draft_kv import DraftKv, Table
from kvarn.step import NewSequence, SampledToken, ScheduledSequence, SchedulerOutput

CATCH_UP_TOKENS = 64
"""Of texts that the draft model has not seen, computed in one of its steps at most, so that nobody is held up for long.
Where no more are missing they are computed with the first guess, so that weights are read once for both."""


def draft_limits(limits: StepLimits, max_positions: int) -> StepLimits:
    """The largest step of a draft model beside a target with those limits."""
    tokens = max(CATCH_UP_TOKENS, 2 * limits.max_num_sequences, limits.max_num_drafts + 2)
    return StepLimits(tokens, limits.max_num_sequences, min(limits.max_model_len, max_positions))


class _Text:
    """All known tokens of a sequence, and how its guesses are drawn."""

    def __init__(self, new: NewSequence) -> None:
        self.tokens = list(new.prompt_token_ids)
        self.ends = frozenset(new.stop_token_ids)
        self.greedy = new.sampling.greedy
        self.drawn = not self.greedy and new.sampling.seed is None


@dataclass(slots=True)
class _Guess:
    """A proposal while it is made."""

    sequence_id: int
    table: Table
    text: _Text
    known: int
    """Leading tokens of the text with draft KV, at the beginning."""
    depth: int
    """Tokens to guess."""
    least_sure: float
    guess_cost: float
    """See `ScheduledSequence`; 0 where guesses are drawn, which are as good where many tokens are likely."""
    row: int = -1
    """Of the probabilities, where the first token's are; -1: it is not drawn from any."""
    draft: list[int] = field(default_factory=list)
    sure: float = 1.0
    """Probability that all of the draft is right, as the draft model holds it."""

    def goes_on(self) -> bool:
        """Whether it is to have one token more."""
        return len(self.draft) < self.depth and self.draft[-1] >= 0 and self.sure >= self.least_sure

    def step(self) -> ScheduledSequence:
        """What the draft model computes for its next token."""
        if self.draft:
            return self._computing(self.draft[-1:], len(self.text.tokens) + len(self.draft) - 1)
        return self._computing(self.text.tokens[self.known :], self.known)

    def _computing(self, tokens: list[int], start: int) -> ScheduledSequence:
        return ScheduledSequence(self.sequence_id, tuple(tokens), start, (self.table,), sample=True)


def _going_on(guesses: Sequence[_Guess], cost: float) -> list[_Guess]:
    """Those that are to have one token more. cost: what that takes, in tokens: it is the same for one as for all."""
    going = [guess for guess in guesses if guess.goes_on()]
    return going if sum(guess.sure - guess.least_sure for guess in going) >= cost else []


class DraftModelDrafter:
    """Guesses with a draft model, k tokens in k steps of it, for all sequences together.

    **Its keys and values** are in a storage of its own with the target's block ids, in the blocks of the KV group that
    keeps all tokens, whatever windows its own layers have (`DraftKv`). Prefix hits, copies and preemption are the
    target's; blocks from the second tier, and text that came while nothing was guessed, lack draft KV. It is computed
    with a sequence's next guess, or where that is too much before it: up to `CATCH_UP_TOKENS` a step for all, nothing
    being guessed meanwhile.

    **How tokens are drawn**, for each request by what accepts most of those that keep its promise. Greedy ones: the
    draft model's likeliest, compared. With a `seed`: from the draft model's distribution by the very random number that
    the target's token will be drawn with, and compared: the answer is the same to the bit as without guesses, as a
    seed promises. Without one: from the draft model's distribution q after the request's temperature, top-k, top-p,
    min-p, bias and penalties, and accepted by the ratio p / q. No rule accepts more (1 - the distance between the two
    distributions); the answer has the exact distribution, but depends on what was guessed.
    """

    buffers: Sequence[str] = ()

    def __init__(
        self,
        executable: Executable,
        sampler: Sampler,
        limits: StepLimits,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        max_step_drafts: int,
    ) -> None:
        """executable: the draft model with one KV group; not owned. sampler: the target's, which knows the sequences.

        limits: those the executable was loaded with. num_blocks: the target's. vocab_size: width of the target's
        logits. max_step_drafts: tokens guessed in a step at most; float32[max_step_drafts, vocab_size] is allocated.
        """
        self._executable = executable
        self._sampler = sampler
        self._limits = limits
        self._block_size = block_size
        self._max_step_drafts = max_step_drafts
        self._kv = DraftKv(num_blocks, block_size)
        self._batches = BatchBuilder(limits, block_size)
        self._output = executable.program.output
        self._last_token = executable.program.vocab_size - 1
        self._probabilities = np.zeros((max_step_drafts, vocab_size), np.float32)
        self._texts: dict[int, _Text] = {}

    def add(self, sequence: NewSequence) -> None:
        """See `Drafter.add`."""
        self._texts[sequence.sequence_id] = _Text(sequence)

    def remove(self, sequence_id: int) -> None:
        """See `Drafter.remove`."""
        self._texts.pop(sequence_id, None)
        self._kv.forget(sequence_id)

    def prepare(self, scheduled: SchedulerOutput) -> bool:
        """See `Drafter.prepare`. Computes some of what is missing of those that want guesses."""
        copies = self._kv.copied(scheduled.block_copies)
        if copies:
            self._executable.copy_blocks(copies)
        for load in scheduled.block_loads:
            self._kv.loaded(load.blocks)
        for part in scheduled.sequences:
            self._kv.written(part.sequence_id, part.block_tables[0], part.start, part.token_ids + part.draft)
        return self._catch_up([part for part in scheduled.sequences if part.num_drafts_wanted])

    def close(self) -> None:
        """Nothing: the executable is not owned."""

    def propose(
        self,
        scheduled: SchedulerOutput,
        sampled: Sequence[SampledToken],
        values: Mapping[str, NDArray[np.float32]],
    ) -> Sequence[Proposal]:
        """See `Drafter.propose`."""
        del values
        for token in sampled:
            self._texts[token.sequence_id].tokens.append(token.token_id)
        guesses = self._begin([part for part in scheduled.sequences if part.num_drafts_wanted])
        going, total = guesses, sum(guess.guess_cost for guess in guesses)
        while going:
            self._guess(going)
            going = _going_on(going, total)
        return [proposal for guess in guesses if (proposal := self._end(guess)) is not None]

    def _catch_up(self, parts: Sequence[ScheduledSequence]) -> bool:
        """Computes some of what is missing, if the next guesses cannot do it: with them comes what this step brings."""
        ends = [min(part.end, self._limits.max_model_len) for part in parts]
        missing = [end - self._kv.known(self._table(part), end) for part, end in zip(parts, ends, strict=True)]
        if sum(missing) + sum(len(part.draft) + 1 for part in parts) <= self._limits.max_num_tokens:
            return False
        left, written, steps = min(CATCH_UP_TOKENS, self._limits.max_num_tokens), set[int](), []
        for part, end, lacks in zip(parts, ends, missing, strict=True):
            known, count, table = end - lacks, min(lacks, left), self._table(part)
            if not count or not self._claim(table, known, known + count, written):
                continue
            left -= count
            tokens = tuple(self._texts[part.sequence_id].tokens[known : known + count])
            steps.append(ScheduledSequence(part.sequence_id, tokens, known, (table,), sample=False))
        if steps:
            self._run(steps)
            for step in steps:
                self._kv.computed(step.block_tables[0], step.start, step.end)
        return bool(steps)

    def _begin(self, parts: Sequence[ScheduledSequence]) -> list[_Guess]:
        """Those of the step's sequences that can be guessed for, and how far."""
        rows, left, written = 0, self._limits.max_num_tokens, set[int]()
        guesses: list[_Guess] = []
        for place, part in enumerate(parts):
            text, table = self._texts[part.sequence_id], self._table(part)
            last = len(text.tokens) - 1
            share = (self._max_step_drafts - rows) // (len(parts) - place)
            room = min(len(table) * self._block_size, self._limits.max_model_len) - last
            depth = min(part.num_drafts_wanted, share, room)
            if depth <= 0 or text.tokens[last] in text.ends:
                continue
            known = self._kv.known(table, last)
            missing = last + 1 - known
            if missing > left:
                continue
            if not self._claim(table, known, last + depth, written):
                continue
            limits = (part.least_sure, part.guess_cost) if text.greedy else (0.0, 0.0)
            guess = _Guess(part.sequence_id, table, text, known, depth, *limits, rows if text.drawn else -1)
            left, rows = left - missing, rows + depth
            guesses.append(guess)
        return guesses

    def _table(self, part: ScheduledSequence) -> Table:
        """The sequence's blocks, as far as the draft model has positions."""
        table, most = part.block_tables[0], -(-self._limits.max_model_len // self._block_size)
        return table if len(table) <= most else table[:most]

    def _claim(self, table: Table, start: int, end: int, written: set[int]) -> bool:
        """Takes the blocks of positions start … end - 1 to write; False where another sequence writes one of them.

        Two that share blocks would compute the same: the other finds it there in the next step.
        """
        blocks = table[start // self._block_size : -(-end // self._block_size)]
        if not written.isdisjoint(blocks):
            return False
        written.update(blocks)
        return True

    def _guess(self, going: Sequence[_Guess]) -> None:
        """One token more for each of them, -1 where the draft model has none to say."""
        logits = self._run([guess.step() for guess in going])
        tokens = self._sampler.guess(
            logits,
            [guess.sequence_id for guess in going],
            [len(guess.text.tokens) + len(guess.draft) for guess in going],
            [guess.draft for guess in going],
            self._probabilities,
            [-1 if guess.row < 0 else guess.row + len(guess.draft) for guess in going],
        )
        for guess, token, row in zip(going, tokens, logits, strict=True):
            guess.draft.append(token)
            if guess.least_sure or guess.guess_cost:
                guess.sure *= probability_of(row, token)

    def _end(self, guess: _Guess) -> Proposal | None:
        """Books what was computed for a guess; the proposal."""
        last = len(guess.text.tokens) - 1
        self._kv.computed(guess.table, guess.known, last)
        self._kv.guessed(guess.sequence_id, guess.table, last, (guess.text.tokens[last], *guess.draft[:-1]))
        draft = tuple(token for token in guess.draft if token >= 0)
        if not draft:
            return None
        drawn = None if guess.row < 0 else self._probabilities[guess.row : guess.row + len(draft)]
        return Proposal(guess.sequence_id, draft, drawn)

    def _run(self, steps: Iterable[ScheduledSequence]) -> NDArray[np.float32]:
        """One step of the draft model: its logits. A token that its vocabulary lacks is taken for another."""
        parts = [
            ScheduledSequence(s.sequence_id, tuple(min(t, self._last_token) for t in s.token_ids), s.start,
                              s.block_tables, s.sample)
            for s in steps
        ]  # fmt: skip
        return self._executable.execute(self._batches.build(parts))[self._output]
