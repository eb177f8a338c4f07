"""`PendingTokens`: tokens that a step samples, while the next one is scheduled before they are known."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from kvarn.scheduler.sequence import Sequence
from kvarn.step import PENDING


class PendingTokens:
    """Those of one step at a time. It puts `PENDING` behind the tokens of sequences, and takes it away again."""

    def __init__(self) -> None:
        self._step = 0
        self._sequences: list[Sequence] = []

    def expect(self, step: int, sequences: Iterable[Sequence]) -> None:
        """The step samples a token of each of these."""
        assert not self._sequences, "the step before the last has no result yet"
        self._step, self._sequences = step, list(sequences)
        for sequence in self._sequences:
            sequence.token_ids.append(PENDING)

    def settle(self, step: int) -> bool:
        """Told that the tokens of a step are known and are about to be booked; whether they were expected."""
        if step != self._step:
            return False
        for sequence in self._sequences:
            sequence.token_ids.pop()
        self._sequences = []
        return True

    def without_ends(self, running: Collection[Sequence]) -> Collection[Sequence]:
        """Those of the running sequences that do not end with a token that is pending, by their length."""
        if not self._sequences:
            return running
        return [sequence for sequence in running if sequence.num_tokens < sequence.max_length]
