"""`Rings`: blocks of a cache for layers with a short window, in which each sequence's text goes round."""

from __future__ import annotations

from collections.abc import Collection, Sequence


class Rings:
    """Equal shares of blocks for a number of sequences. Bookkeeping alone."""

    def __init__(self, count: int, size: int) -> None:
        """count: sequences that have a ring at the same time. size: blocks of each."""
        self._size = size
        self._free = list(reversed(range(count)))
        self._used: dict[int, int] = {}

    @staticmethod
    def size(window: int, ahead: int, block_size: int) -> int:
        """Blocks that hold what the last known row sees, and `ahead` rows after it.

        Rows before it may be written in the same step, more than there is room for: then some of them attend to what is
        overwritten. In a single layer nobody reads that: keys and values are of the row alone.
        """
        return -(-(window + ahead) // block_size) + 1

    def of(self, sequence_id: int, busy: Collection[int]) -> tuple[Sequence[int], int | None]:
        """The sequence's blocks, and the sequence they were taken from, if they were: one that is not among `busy`,
        of which there must be no more than rings."""
        robbed = None
        if sequence_id not in self._used:
            if not self._free:
                robbed = next(other for other in self._used if other not in busy)
                self.free(robbed)
            self._used[sequence_id] = self._free.pop()
        first = self._used[sequence_id] * self._size
        return range(first, first + self._size), robbed

    def free(self, sequence_id: int) -> None:
        """Takes a sequence's ring back; unknown ones are ignored."""
        ring = self._used.pop(sequence_id, None)
        if ring is not None:
            self._free.append(ring)
