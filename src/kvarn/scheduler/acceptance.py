"""`Acceptance`: how often guesses of a sequence's next tokens are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MEMORY = 0.9
"""What is known counts this much less with each guess."""
PRIOR_WEIGHT = 2.0
"""Guesses that a prior counts for."""
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


@dataclass(slots=True)
class Acceptance:
    """Two rates: of the first guess, and of each that follows right ones. After a wrong one guesses say nothing.

    They differ where guesses are copied: whether a copy is the right one shows in its first token.
    """

    first: Rate
    later: Rate

    @classmethod
    def prior(
        cls, first: float, later: float, memory: float = MEMORY, weight: float = PRIOR_WEIGHT
    ) -> Acceptance:
        """Where nothing was seen of the sequence. weight: guesses that it counts for."""
        rates = (Rate(weight * mean, weight * (1 - mean), memory) for mean in (first, later))
        return cls(*rates)

    def compare(self, draft: Sequence[int], tokens: Sequence[int]) -> None:
        """Takes in what came in the place of a draft, whether that was verified or not."""
        rate = self.first
        for guess, token in zip(draft, tokens, strict=False):
            rate.take(guess == token)
            if guess != token:
                return
            rate = self.later

    def gain(self, place: int) -> float:
        """Tokens that the guess at `place` (0: the first) of a draft is expected to bring: whether all up to it are
        right."""
        return self.first.mean * self.later.mean**place
