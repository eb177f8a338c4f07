"""`Runner`: executes what the scheduler decided and samples."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvarn.backends import Executable, StepLimits
from kvarn.draft_tree import chain, path
from kvarn.errors import RequestError
from kvarn.grammar import GrammarMasks, StepMasks
from kvarn.request import SamplingParams
from kvarn.runner.ahead import Ahead, NeverAhead
from kvarn.runner.batch import BatchBuilder
from kvarn.runner.block_file import BlockFile
from kvarn.runner.block_mover import BlockMover
from kvarn.runner.drafter import Drafter, NullDrafter, Proposal
from kvarn.runner.failures import of_prompts, without_failed
from kvarn.runner.guide import guided
from kvarn.runner.pooler import NullPooler, Pooler
from kvarn.runner.prompt_logprobs import take_prompts
from kvarn.sampling import Draft, Sampler, TokenMasks
from kvarn.step import (
    DraftTokens,
    FailedSequence,
    NewSequence,
    SampledToken,
    ScheduledSequence,
    SchedulerOutput,
    StepOutput,
)  # fmt: skip

logger = logging.getLogger(__name__)


class _Begun(NamedTuple):
    """What came of all that comes before the program."""

    refused: list[FailedSequence]
    loaded: tuple[int, ...]
    moved: float
    """Seconds that saves and loads took."""
    prepare_seconds: float


class Runner:
    """One loaded program with its sampler. Knows of sequences only what a step says; the sampler keeps the rest.

    Owns the executable and closes it. Not thread-safe.
    """

    def __init__(
        self,
        executable: Executable,
        sampler: Sampler,
        limits: StepLimits,
        block_size: int,
        *,
        logits: str = "logits",
        block_file: BlockFile | None = None,
        drafter: Drafter | None = None,
        grammars: GrammarMasks | None = None,
        pooler: Pooler | None = None,
        ahead: Ahead | None = None,
    ) -> None:
        """limits: those the executable was loaded with. logits: the program's output buffer.

        block_file: where blocks are saved and loaded, owned from now on; None: a step must not ask for that.
        drafter: who proposes drafts; None: nobody. grammars: of the sequences that have one, owned from now on; None:
        no sequence may have one. pooler: makes embeddings; None: no sequence may be one. ahead: begins steps on an
        executable that can be ahead of its caller, with no drafter; None: all steps are executed.
        """
        self._blocks = BlockMover(executable, block_file)
        self._executable = executable
        self._sampler = sampler
        self._drafter = drafter or NullDrafter()
        self.grammars = grammars or GrammarMasks()
        self.pooler = pooler or NullPooler()
        self._ahead = ahead or NeverAhead()
        self._drawn: dict[int, Proposal] = {}
        """The last proposals that were drawn from probabilities, by sequence."""
        self._num_groups = len(executable.program.kv_groups)
        self._batches = BatchBuilder(limits, block_size, self._num_groups)
        self._block_size = block_size
        self._logits = logits
        self._hidden = executable.program.last_layer
        self._known: set[int] = set()
        self._refused: deque[list[FailedSequence]] = deque()
        """By the steps that were submitted and not collected."""

    def execute(self, scheduled: SchedulerOutput) -> StepOutput:
        """Runs a step: forgets who finished, moves blocks, runs the program, samples, lets the next tokens be guessed.

        A step may be empty. All steps that were submitted must be collected.
        """
        scheduled = self._ahead.known(scheduled)
        begun = self._begin(scheduled)
        if not scheduled.sequences:
            return StepOutput(scheduled.step, (), begun.loaded, begun.moved, prepare_seconds=begun.prepare_seconds)
        parts = [s for s in scheduled.sequences if s.sample]
        pending = self.grammars.begin(parts)
        values = self._executable.execute(self._batches.build(scheduled.sequences), self._drafter.buffers)
        masks = None if pending is None else self.grammars.finish(pending)
        pooled = self.pooler.take(scheduled, values)
        values, prompts, failed = take_prompts(values, self._logits, scheduled.sequences, self._sampler)
        failed += [*begun.refused, *of_prompts(scheduled, values.get(self._hidden))]
        sampled, failed = self._sample(values[self._logits], parts, masks, failed)
        started = time.perf_counter()
        asked = scheduled.asking_nothing_of({failure.sequence_id for failure in failed})
        proposals = guided(self.grammars, asked, self._drafter.propose(asked, sampled, values))
        wanted = any(part.num_drafts_wanted or part.num_copies_wanted for part in asked.sequences)
        draft_seconds = time.perf_counter() - started if wanted else 0.0
        self._drawn = {p.sequence_id: p for p in proposals if p.probabilities is not None}
        drafts = tuple(_tokens(p) for p in proposals if p.token_ids)
        return StepOutput(
            scheduled.step, tuple(sampled), begun.loaded, begun.moved, drafts, draft_seconds, begun.prepare_seconds,
            tuple(failed), prompts, pooled,
        )  # fmt: skip

    def submits(self, scheduled: SchedulerOutput) -> bool:
        """Whether the step may be submitted, rather than executed."""
        return self._ahead.takes(scheduled)

    def submit(self, scheduled: SchedulerOutput) -> None:
        """Begins a step, which may have tokens that are `PENDING`. Two at most are not collected."""
        begun = self._begin(scheduled)
        self._ahead.submit(scheduled, self._batches.build(scheduled.sequences))
        self._refused.append(begun.refused)

    def collect(self) -> StepOutput:
        """What the oldest submitted step produced, as `execute` would say."""
        scheduled, sampled = self._ahead.collect()
        kept, failed = without_failed(sampled, self._refused.popleft())
        return StepOutput(scheduled.step, tuple(kept), failed=tuple(failed))

    def discard(self) -> None:
        """Forgets what was submitted and not collected."""
        self._refused.clear()
        self._ahead.discard()

    def _begin(self, scheduled: SchedulerOutput) -> _Begun:
        """All that comes before the program."""
        self._blocks.save(scheduled.block_saves)
        for sequence_id in scheduled.finished:
            self._known.discard(sequence_id)
            self._remove(sequence_id)
        refused = [failure for new in scheduled.new if (failure := self._add(new)) is not None]
        if scheduled.block_copies:
            self._executable.copy_blocks(scheduled.block_copies)
        loaded = self._blocks.load(scheduled.block_loads)
        moved = self._blocks.take_seconds()
        started = time.perf_counter()
        computed = self._drafter.prepare(scheduled)
        return _Begun(refused, loaded, moved, time.perf_counter() - started if computed else 0.0)

    def _sample(
        self,
        logits: NDArray[np.float32],
        parts: list[ScheduledSequence],
        masks: StepMasks | None,
        failed: list[FailedSequence],
    ) -> tuple[list[SampledToken], list[FailedSequence]]:
        """What the parts say, and all sequences that fail in this step, those that had failed before among them."""
        if not parts:
            return [], failed
        ids, positions = [s.sequence_id for s in parts], [s.end for s in parts]
        given = () if masks is None else (TokenMasks(masks.bits, masks.rows),)
        if logits.shape[0] == len(parts):
            sampled = self._ahead.rechosen(self._sampler.sample(logits, ids, positions, *given), logits, parts)
        else:
            sampled = self._sampler.verify(logits, ids, positions, [self._draft(s) for s in parts], *given)
            self._move_accepted(parts, sampled)
        kept, failed = without_failed(sampled, failed if masks is None else failed + masks.failed)
        if masks is not None:
            self.grammars.advance(kept)
        return kept, failed

    def _move_accepted(self, parts: list[ScheduledSequence], sampled: list[SampledToken]) -> None:
        """Moves the KV of accepted guesses to the slots of their positions, where they were behind other branches."""
        said: dict[int, list[int]] = {}
        for token in sampled:
            said.setdefault(token.sequence_id, []).append(token.token_id)
        moves = [
            (self._slot(table, part.end + place), self._slot(table, part.end + level))
            for part in parts
            if part.draft
            for level, place in enumerate(path(part.draft, part.parents, said.get(part.sequence_id, ())))
            if place != level
            for table in part.block_tables
        ]
        if moves:
            self._executable.move_slots(moves)

    def _slot(self, table: tuple[int, ...], position: int) -> int:
        block, offset = divmod(position, self._block_size)
        return table[block] * self._block_size + offset

    def _draft(self, part: ScheduledSequence) -> Draft:
        """The draft with the probabilities that it was drawn from, if it was."""
        drawn = self._drawn.get(part.sequence_id)
        count = len(part.draft)
        if not count or drawn is None or drawn.probabilities is None:
            return Draft(part.draft, parents=part.parents)
        assert drawn.token_ids[:count] == part.draft, "a draft is a beginning of what was proposed last"
        return Draft(part.draft, drawn.probabilities[:count], part.parents)

    def _add(self, new: NewSequence) -> FailedSequence | None:
        """Takes a sequence in. Where that fails, why: it is a plain one then until the scheduler takes it back."""
        self._known.add(new.sequence_id)
        try:
            self._take_in(new)
            return None
        except Exception as error:
            self._remove(new.sequence_id)
            plain = SamplingParams(temperature=0.0, max_tokens=new.sampling.max_tokens)
            self._take_in(replace(new, sampling=plain, stop_token_ids=(), pooling=None))
            if isinstance(error, RequestError):
                return FailedSequence(new.sequence_id, str(error), error.field or "")
            logger.exception("sequence %d could not be taken in", new.sequence_id)
            return FailedSequence(new.sequence_id, f"it could not be taken in: {type(error).__name__}", "")

    def _take_in(self, new: NewSequence) -> None:
        self._sampler.add(new)
        self._drafter.add(new)
        self.grammars.add(new)
        self.pooler.add(new)
        self._ahead.add(new)

    def _remove(self, sequence_id: int) -> None:
        self._sampler.remove(sequence_id)
        self._drafter.remove(sequence_id)
        self.grammars.remove(sequence_id)
        self.pooler.remove(sequence_id)
        self._ahead.remove(sequence_id)

    def forget_moved(self) -> None:
        """Empties the second tier."""
        self._blocks.forget()

    def reset(self) -> None:
        """Forgets all sequences, then runs one token to see that the program still runs. Raises what that raises."""
        self.discard()
        for sequence_id in self._known:
            self._remove(sequence_id)
        self._known.clear()
        tables = ((0,),) * self._num_groups
        probe = ScheduledSequence(sequence_id=-1, token_ids=(0,), start=0, block_tables=tables, sample=True)
        self._executable.execute(self._batches.build((probe,)))

    def close(self) -> None:
        """Closes the drafter, the executable and the block file. Idempotent."""
        self._drafter.close()
        self._executable.close()
        self._blocks.close()
        self.grammars.close()


def _tokens(proposal: Proposal) -> DraftTokens:
    parents = chain(len(proposal.token_ids)) if proposal.parents is None else proposal.parents
    return DraftTokens(proposal.sequence_id, proposal.token_ids, parents, proposal.copied)
