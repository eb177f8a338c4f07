"""`TwoSources`: as many guesses as pay where what is found is copied, and the rest is asked of a drafter that costs."""

from __future__ import annotations

from collections.abc import Sequence as ListOf

from kvarn.scheduler.acceptance import LENGTHS_TOGETHER, MOST_KINDS, Acceptance, kind_of
from kvarn.scheduler.account import Account
from kvarn.scheduler.cost import StepCost, StepShape
from kvarn.scheduler.costly import CostlySpeculation, Prospect
from kvarn.scheduler.sequence import Sequence
from kvarn.scheduler.speculation import limit

ANY_COPY_EVERY = 16
"""Of the steps in which short copies make way for the other drafter, one takes them: how often are they right?"""
COPIED_SHARE, AS_MANY = 0.1, 32.0
"""Of each sequence in what is known of all, and as many tokens of a sequence as that counts for."""


class TwoSources(CostlySpeculation):
    """`AutoSpeculation` for copies and `CostlySpeculation` for what is computed where nothing is copied.

    Each source has its own costs and is right in its own measure, copies by their length. A copy comes first, but only
    if one of its length is worth no less than what the other drafter is about to be asked for: both in seconds that
    they are expected to save. An account of each, so that a text that was read in vain stops no copies.
    """

    computed_kind = MOST_KINDS
    num_accounts = 2

    def __init__(self, most: int, most_copies: int, cost: StepCost, *, stops: bool = False) -> None:
        """most, most_copies: guesses for a sequence at most, by their source. The rest as of `CostlySpeculation`."""
        super().__init__(most, cost, stops=stops)
        self._most_copies = most_copies
        self._of_copies = self._accounts[1]
        self._computed_verified = False
        """Whether guesses that were computed are verified in this step."""
        self._copied_share = 0.0
        """Of tokens those that were copied, in sequences that ended lately."""
        self._asked = 0
        """Guesses of the sequence that `wanted` was told of last."""

    def plan(self, ready: ListOf[Sequence], shape: StepShape) -> None:
        """See `Speculation`."""
        super().plan(ready, shape)
        self._computed_verified = False

    def copies(self, sequence: Sequence) -> tuple[int, int]:
        """See `Speculation`."""
        if self._plain or self._steps < self._awake:
            return 0, 0
        count = limit(self._most_copies, sequence)
        if not self._asked or self._plans % ANY_COPY_EVERY == 0:
            return count, 0
        return count, self._least(sequence, count)

    def choose(self, drafted: ListOf[Sequence], shape: StepShape, room: int) -> list[int]:
        """See `Speculation`."""
        if not self._times.knows(shape.num_tokens):
            return [0] * len(drafted)
        self._computed_verified = any(not sequence.copied for sequence in drafted)
        if self._computed_verified:
            return super().choose(drafted, shape, room)
        return self._best(drafted, shape, room, self._of_copies)

    def wanted(self, sequence: Sequence) -> int:
        """See `Speculation`."""
        self._asked = super().wanted(sequence)
        return self._asked

    def ended(self, sequence: Sequence) -> None:
        """See `Speculation`."""
        super().ended(sequence)
        share = sequence.num_accepted_copies / sequence.num_output_tokens
        self._copied_share += COPIED_SHARE * (share - self._copied_share)

    def _computed_share(self, sequence: Sequence) -> float:
        copied = self._copied_share * AS_MANY + sequence.num_accepted_copies
        return 1 - copied / (AS_MANY + sequence.num_output_tokens)

    def _least(self, sequence: Sequence, count: int) -> int:
        """The length of the shortest copies that are worth what the other drafter is asked for; above `count`: none."""
        computed = self._computed(sequence)
        prospect = self._now if self._now.depth else self._hoped
        made = [self._reached(level) for level in range(self._asked)]
        gain = sum(reached * computed.gain(level) for level, reached in enumerate(made))
        worth = prospect.worth(gain, round(sum(made))) - prospect.guess * sum(made)
        for kind in range(MOST_KINDS):
            longest = count if kind == MOST_KINDS - 1 else min(count, (kind + 1) * LENGTHS_TOGETHER)
            if _most_saved(prospect, self._known(sequence, kind), longest) >= worth:
                return kind * LENGTHS_TOGETHER + 1
        return count + 1

    def _kind(self, sequence: Sequence, draft: tuple[int, ...]) -> int:
        return kind_of(draft) if sequence.copied else self.computed_kind

    def _booked_to(self) -> Account:
        return self._account if self._computed_verified or self._aside else self._of_copies


def _most_saved(prospect: Prospect, known: Acceptance, longest: int) -> float:
    """What a copy is expected to save at best, however many of its guesses are verified for that."""
    best = gain = 0.0
    for level in range(longest):
        gain += known.gain(level)
        best = max(best, prospect.worth(gain, level + 1))
    return best
