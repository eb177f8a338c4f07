"""`Rings`: which sequence has which share of a small cache."""

from __future__ import annotations

from collections.abc import Collection


class Rings:
    """Equal shares for a number of sequences, numbered from 0. Bookkeeping alone."""

    def __init__(self, count: int) -> None:
        """count: sequences that have a ring at the same time."""
        self._free = list(reversed(range(count)))
        self._used: dict[int, int] = {}

    def of(self, sequence_id: int, busy: Collection[int]) -> tuple[int, int | None]:
        """The sequence's ring, and the sequence that it was taken from, if it was: one that is not among `busy`, of
        which there must be no more than rings."""
        robbed = None
        if sequence_id not in self._used:
            if not self._free:
                robbed = next(other for other in self._used if other not in busy)
                self.free(robbed)
            self._used[sequence_id] = self._free.pop()
        return self._used[sequence_id], robbed

    def free(self, sequence_id: int) -> None:
        """Takes a sequence's ring back; unknown ones are ignored."""
        ring = self._used.pop(sequence_id, None)
        if ring is not None:
            self._free.append(ring)
