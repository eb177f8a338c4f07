"""Where what the choice of tokens needs is in one allocation: tokens, rules, and the kernels' working storage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvarn.backends.base import StepLimits
from kvarn.backends.cuda import parts
from kvarn.backends.row_rules import EDIT, WORDS
from kvarn.program import Program

UNDER_WAY = 2
"""Steps that may be submitted and not collected: the tokens of so many are on the card."""
SURVEYED = 2048
"""Tokens of a vocabulary that a program of the first kernel looks at."""
EDITS_AT_ONCE = 1 << 16
"""Edits that are taken to the card at a time, where no row has more: a prompt's tokens are that many at most."""


@dataclass(frozen=True, slots=True)
class SamplingLayout:
    """For steps of at most so many tokens, with so many rows of logits over `vocab` tokens."""

    tokens: int
    rows: int
    vocab: int

    @staticmethod
    def largest(program: Program, limits: StepLimits) -> SamplingLayout:
        """What holds every step within the limits."""
        return SamplingLayout(limits.max_num_tokens, limits.max_num_outputs, program.buffer(program.output).width)

    @property
    def edits(self) -> int:
        """Edits that there is room for: those of one row at least, and of no more than there can be."""
        return min(self.rows * self.vocab, max(self.vocab, EDITS_AT_ONCE))

    def arrays(self) -> Iterator[parts.Array]:
        """(name, shape, bytes of an element) of each array, in order."""
        blocks = -(-self.vocab // SURVEYED)
        yield "sums", (self.rows, blocks), 8
        yield "tops", (self.rows, blocks), 4
        yield "best", (self.rows, blocks), 4
        yield "ids", (UNDER_WAY, self.rows), 4
        yield "previous", (self.tokens, 1), 4
        yield "rows", (self.rows, WORDS), 4
        yield "masks", (self.rows + 1, -(-self.vocab // 32)), 4
        yield "edits", (self.edits, EDIT.itemsize // 4), 4

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return parts.num_bytes(self.arrays())
