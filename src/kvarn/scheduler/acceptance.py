"""`Acceptance`: how often guesses of a sequence's next tokens are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from kvarn.draft_tree import chain

MEMORY = 0.9
"""What is known counts this much less with each guess."""
PRIOR_WEIGHT = 2.0
"""Guesses that a prior counts for."""
RANKS, RANK_SHARE = 4, 0.4
"""Of guesses of one token so many are told apart, the later ones being one kind; as long as none was seen each is taken
to be right in this share of the cases in which those before it are wrong."""
LENGTHS_TOGETHER, MOST_KINDS = 2, 5
"""Drafts of so many lengths are one kind; there are so many kinds at most."""


def kind_of(draft: Sequence[int]) -> int:
    """Which drafts it is like, 0 … MOST_KINDS - 1. A drafter that is surer of itself proposes more."""
    return min((len(draft) - 1) // LENGTHS_TOGETHER, MOST_KINDS - 1)


@dataclass(slots=True)
class Rate:
    """The mean of a Beta distribution whose counts fade: a discounted Beta-Bernoulli estimate."""

    right: float
    wrong: float
    memory: float = MEMORY

    @property
    def mean(self) -> float:
        """Probability that a guess is right."""
        return self.right / (self.right + self.wrong)

    def take(self, right: bool) -> None:
        """One more guess."""
        self.right = self.memory * self.right + right
        self.wrong = self.memory * self.wrong + (not right)


Rates = list[Rate]
"""By rank: of several guesses of the same token which one it is, in the drafter's order; the last is of all others."""


def _rates(mean: float, memory: float) -> Rates:
    """As long as none was seen. mean: of the first."""
    means = [mean, *((1 - mean) * RANK_SHARE * (1 - RANK_SHARE) ** rank for rank in range(RANKS - 1))]
    return [Rate(PRIOR_WEIGHT * mean, PRIOR_WEIGHT * (1 - mean), memory) for mean in means]


@dataclass(slots=True)
class Acceptance:
    """How often guesses are right: those of the next token, and those that follow a right one. After a wrong one
    guesses say nothing.

    They differ where guesses are copied: whether a copy is the right one shows in its first token. Where there are
    several guesses of a token, those that the drafter names first are the likelier.
    """

    first: Rates
    later: Rates

    @classmethod
    def prior(cls, first: float, later: float, memory: float = MEMORY) -> Self:
        """Where nothing was seen. first, later: means of guesses that are the only ones of their token."""
        return cls(_rates(first, memory), _rates(later, memory))

    def start(self, weight: float = PRIOR_WEIGHT) -> Acceptance:
        """Where nothing was seen of a sequence, and this is known of all. weight: guesses that it counts for."""
        return Acceptance(*([_start(rate, weight) for rate in rates] for rates in (self.first, self.later)))

    def compare(self, draft: Sequence[int], tokens: Sequence[int], parents: Sequence[int] | None = None) -> None:
        """Takes in what came in the place of a draft, whether that was verified or not. parents: None: a chain's."""
        parents = chain(len(draft)) if parents is None else parents
        at, begin, rates = -1, 0, self.first
        for token in tokens:
            children = [place for place in range(begin, len(draft)) if parents[place] == at]
            right = -1
            for rank, place in enumerate(children):
                rates[min(rank, RANKS - 1)].take(draft[place] == token)
                if right < 0 and draft[place] == token:
                    right = place
            if right < 0:
                return
            at, begin, rates = right, right + 1, self.later

    def gain(self, level: int) -> float:
        """Tokens that the guess at `level` (0: of the next token) of a chain is expected to bring."""
        return self.first[0].mean * self.later[0].mean ** level

    def gains(self, parents: Sequence[int]) -> list[float]:
        """Tokens that each guess of a draft is expected to bring: whether it and all that it follows are right."""
        gains: list[float] = []
        ranks = [0] * (len(parents) + 1)  # by parent, the last known token's at the end
        for parent in parents:
            rates = self.first if parent < 0 else self.later
            rate = rates[min(ranks[parent], RANKS - 1)].mean
            ranks[parent] += 1
            gains.append(rate if parent < 0 else rate * gains[parent])
        return gains


def _start(rate: Rate, weight: float) -> Rate:
    return Rate(weight * rate.mean, weight * (1 - rate.mean))
