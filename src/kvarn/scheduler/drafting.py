"""`Drafting`: which guessed tokens go into a step, and what came of them. The scheduler's side of speculation."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field

from kvarn.cache import BlockPool, blocks_for
from kvarn.draft_tree import pruned
from kvarn.scheduler.budget import MIN_PROMPT_TOKENS, Budget
from kvarn.scheduler.cost import StepShape
from kvarn.scheduler.observer import Observer
from kvarn.scheduler.reuse import PrefixReuse
from kvarn.scheduler.sequence import Sequence
from kvarn.scheduler.speculation import Speculation
from kvarn.step import DraftTokens, SampledToken, ScheduledSequence, SchedulerOutput, StepOutput


@dataclass(slots=True)
class DraftCounts:
    """What was guessed since the start, and what of it became output."""

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    by_position: list[int] = field(default_factory=list)
    """Accepted tokens by how far ahead they were guessed, the next one at 0."""
    copied_tokens: int = 0
    """Of `draft_tokens` those that were looked up, not computed."""
    accepted_copies: int = 0
    """Of `accepted_tokens` the same."""
    seconds: float = 0.0
    """Spent on proposing."""

    def add(self, drafted: int, accepted: int, copied: bool) -> None:
        """One draft more."""
        self.drafts += 1
        self.draft_tokens += drafted
        self.accepted_tokens += accepted
        self.copied_tokens += drafted * copied
        self.accepted_copies += accepted * copied
        self.by_position += [0] * (accepted - len(self.by_position))
        for place in range(accepted):
            self.by_position[place] += 1


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """What there is room for."""

    max_step_drafts: int
    """Guesses in one step, of all sequences."""
    max_model_len: int
    """Slots of a sequence. Each branch of a tree has its own, so that a tree needs more than the text has positions."""
    reference_every: int = 0
    """See `KvType`."""
    writes_ahead: bool = False
    """Whether the drafter computes keys and values of its own for what it guesses, in the sequence's blocks."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Guesses that are wanted of one sequence: see the fields of `ScheduledSequence`."""

    ahead: int = 0
    nodes: int = 0
    copies: int = 0
    least_copied: int = 0
    least_sure: float = 0.0
    guess_cost: float = 0.0


NOTHING_WANTED = Wanted()


class Drafting:
    """Puts drafts into steps and books them. It changes drafts, counts and tables of sequences.

    A draft is a tree; its first guesses, however many, are a tree, too, so that a part of it is its beginning.

    Drafts are for sequences that compute one token. They count in the step's budget like all tokens, but take blocks
    only that nobody else wants in this step, and give back after it those that hold no known token: nobody is held
    up or preempted for a guess, and what the scheduler holds between two steps is the same as without guesses.

    But for a drafter that computes keys and values of its own for what it guesses (`writes_ahead`): it gets blocks for
    that, too, and what it has guessed keeps them for the next step, unless somebody needs them (`give_back`).
    """

    def __init__(
        self, control: Speculation, pool: BlockPool, reuse: PrefixReuse, observer: Observer, limits: DraftLimits
    ) -> None:
        """control: says how many. observer: told what was right."""
        self.control = control
        self.counts = DraftCounts()
        self._pool = pool
        self._reuse = reuse
        self._observer = observer
        self._limits = limits
        self._chosen: list[tuple[Sequence, int]] = []
        self._ahead: list[Sequence] = []
        """Sequences with blocks behind their known tokens."""
        self.active = control.most > 0
        """Whether any token may ever be guessed."""

    def decodes(self, running: Collection[Sequence], budget: Budget) -> StepShape:
        """The shape of the step's decodes (sequences that have one token to compute) with the drafts chosen for it.

        They leave a token of the budget for each of the others, and `MIN_PROMPT_TOKENS` for prompts.
        """
        ready = [s for s in running if s.num_uncomputed_tokens == 1]
        count, tokens = len(ready), sum([len(s.token_ids) for s in ready])
        shape = StepShape(count, count, count, tokens, tokens)
        if self.active:
            self.control.plan(ready, shape)
            self._chosen = []
            drafted = [s for s in ready if s.draft]
            if drafted:
                room = budget.draft_room(shape, len(running) - count + MIN_PROMPT_TOKENS)
                return self._choose(drafted, shape, min(room, self._limits.max_step_drafts))
        return shape

    def _choose(self, drafted: list[Sequence], shape: StepShape, room: int) -> StepShape:
        if room <= 0:
            return shape
        for sequence, count in zip(drafted, self.control.choose(drafted, shape, room), strict=True):
            if count > 0:
                self._chosen.append((sequence, count))
                shape = shape.drafted(sequence.num_tokens, count)
        return shape

    def put(self, parts: list[ScheduledSequence], sequences: Mapping[int, Sequence]) -> list[tuple[int, int]]:
        """Adds the chosen drafts to the step's parts, as far as blocks are left over; returns the blocks to copy.

        sequences: those of the parts, by id.
        """
        copies: list[tuple[int, int]] = []
        chosen = {sequence.sequence_id: count for sequence, count in self._chosen}
        self._chosen = []
        if not chosen and not self._limits.writes_ahead:
            return copies
        for place, part in enumerate(parts):
            count = chosen.get(part.sequence_id, 0)
            ahead = part.num_drafts_wanted if self._limits.writes_ahead else 0
            if count or ahead:
                sequence = sequences[part.sequence_id]
                draft = sequence.draft[: self._take(part.end, count, self._limits.max_model_len, sequence, copies)]
                self._take(part.end + len(draft), ahead, sequence.max_length, sequence, copies)
                parents, tables = sequence.parents[: len(draft)], sequence.table.ids
                parts[place] = dataclasses.replace(part, draft=draft, parents=parents, block_tables=tables)
        return copies

    def _take(self, end: int, count: int, most: int, sequence: Sequence, copies: list[tuple[int, int]]) -> int:
        """Takes blocks for `count` guesses in slots `end` …, below `most`, or for fewer; returns for how many."""
        blocks = len(sequence.table) + self._pool.num_available // len(self._pool.windows)
        last = min(end + count, blocks * self._pool.block_size, most)
        if last <= end:
            return 0
        copies += self._reuse.take_blocks(sequence, end, last)
        return last - end

    def give_back(self) -> bool:
        """Gives back the blocks that were kept for guesses, since somebody needs them; whether there were any."""
        before = self._pool.num_available
        for sequence in self._ahead:
            self._truncate(sequence, sequence.num_tokens)  # the last one may be in this step already
        self._ahead = []
        return self._pool.num_available > before

    def wanted(self, sequence: Sequence) -> Wanted:
        """How far to guess ahead for the step after this one, which samples a token of the sequence, how many guesses
        a tree of them may have, and how many copies there may be."""
        most = sequence.max_length - sequence.num_tokens - 2
        if most <= 0:
            return NOTHING_WANTED
        nodes = min(self.control.wanted(sequence), self._limits.max_model_len - sequence.num_tokens - 1)
        copies, least = self.control.copies(sequence)
        return Wanted(min(nodes, most), nodes, min(copies, most), least, *self.control.least_sure(sequence))

    def book(
        self,
        scheduled: SchedulerOutput,
        result: StepOutput,
        gained: ListOf[tuple[Sequence, SampledToken]],
        alive: Mapping[int, Sequence],
    ) -> None:
        """Told of a step when its tokens are booked. gained: those that were not dropped. alive: who goes on, by id."""
        if not self.active:
            return
        self.counts.seconds += result.draft_seconds + result.prepare_seconds
        tokens: dict[Sequence, list[int]] = {}
        for sequence, token in gained:
            tokens.setdefault(sequence, []).append(token.token_id)
        verified = Counter(token.sequence_id for token in result.sampled)
        parts = {part.sequence_id: part for part in scheduled.sequences if part.draft}
        for sequence, said in tokens.items():
            part = parts.get(sequence.sequence_id)
            # What a model drew may be accepted without being what would have come: only verified ones tell.
            drawn = self._limits.writes_ahead and not sequence.copied
            told = sequence.draft if not drawn else part.draft if part is not None else ()
            self.control.compare(sequence, told, sequence.parents[: len(told)], said)
            if sequence.finished:
                self.control.ended(sequence)
            sequence.draft = sequence.parents = ()
            if part is not None:
                self._count(sequence, len(part.draft), min(len(said), verified[sequence.sequence_id] - 1))
        copied = {draft.sequence_id for draft in result.drafts if draft.copied}
        lengths = {draft.sequence_id: len(draft.token_ids) for draft in result.drafts}
        computing = (part for part in scheduled.sequences if part.num_drafts_wanted and part.sequence_id not in copied)
        came = [(part.num_drafts_wanted, lengths.get(part.sequence_id, 0)) for part in computing]
        self.control.proposed(came, result.draft_seconds, result.prepare_seconds)
        for draft in result.drafts:
            owner = alive.get(draft.sequence_id)
            if owner is not None:
                owner.draft, owner.parents = self._fitting(owner, draft)
                owner.copied = draft.copied
        self._note_read(scheduled, result, copied, alive)
        self._keep_ahead(scheduled, alive)

    def _note_read(
        self, scheduled: SchedulerOutput, result: StepOutput, copied: set[int], alive: Mapping[int, Sequence]
    ) -> None:
        """Notes whose texts the drafter has read: of whom it computed guesses, or had none to make without being held
        up by reading."""
        guessed = {draft.sequence_id for draft in result.drafts}
        for part in scheduled.sequences:
            owner = alive.get(part.sequence_id)
            if owner is None or not part.num_drafts_wanted or part.sequence_id in copied:
                continue
            if part.sequence_id in guessed or not result.prepare_seconds:
                owner.num_drafter_tokens, owner.drafter_reads = owner.num_tokens, False

    def _fitting(self, sequence: Sequence, draft: DraftTokens) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The draft without what the sequence would not say, one token coming in any case, or the cache cannot hold."""
        start, every = sequence.num_tokens, self._limits.reference_every
        most, longest = self._limits.max_model_len - start, sequence.max_length - start - 1
        referred: set[int] = set()

        def fits(place: int, level: int) -> bool:
            if place >= most or level >= longest:
                return False
            if not every or (start + level) % every:
                return True
            alone = level not in referred
            referred.add(level)
            return alone

        return pruned(draft.token_ids, draft.parents, fits)

    def _keep_ahead(self, scheduled: SchedulerOutput, alive: Mapping[int, Sequence]) -> None:
        """Gives back the blocks of the step that hold neither known tokens nor what the drafter has of its guesses."""
        step = (alive.get(p.sequence_id) for p in scheduled.sequences if p.draft or p.num_drafts_wanted)
        touched = dict.fromkeys([*self._ahead, *(sequence for sequence in step if sequence is not None)])
        self._ahead = []
        for sequence in touched:
            if alive.get(sequence.sequence_id) is not sequence:
                continue
            # The last known token has its KV from the drafter already, and the last guess none.
            ahead = len(sequence.draft) if self._limits.writes_ahead and not sequence.copied else 0
            self._truncate(sequence, sequence.num_computed_tokens + ahead)
            if ahead:
                self._ahead.append(sequence)

    def _truncate(self, sequence: Sequence, num_tokens: int) -> None:
        sequence.table.truncate(blocks_for(num_tokens, self._pool.block_size))

    def _count(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        self.counts.add(drafted, accepted, sequence.copied)
        sequence.num_draft_tokens += drafted
        sequence.num_accepted_tokens += accepted
        sequence.num_accepted_copies += accepted * sequence.copied
        self._observer.verified(sequence, drafted, accepted)
