"""The order in which sequences are served: a `Policy` gives each a key, and `WaitingQueue` keeps them in that order."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Protocol

from kvarn.scheduler.sequence import Sequence


class Policy(Protocol):
    """Who comes first: admitted before others, given tokens before others, preempted after them."""

    def key(self, sequence: Sequence) -> tuple[int, ...]:
        """Smaller is served first. Unique to the sequence, and constant from `add` to its end."""
        ...


class FirstComeFirstServed:
    """In order of arrival; the sequences of one request by index."""

    def key(self, sequence: Sequence) -> tuple[int, ...]:
        """Arrival, then index."""
        return (sequence.arrival, sequence.index)


class OrderedSequences:
    """Sequences in the policy's order. Adding and removing take O(log n) comparisons."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._items: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._items)

    def __getitem__(self, index: int) -> Sequence:
        return self._items[index]

    def __contains__(self, sequence: Sequence) -> bool:
        index = self._position(sequence)
        return index < len(self._items) and self._items[index] is sequence

    def add(self, sequence: Sequence) -> None:
        """Puts the sequence in its place."""
        bisect.insort(self._items, sequence, key=self._policy.key)

    def remove(self, sequence: Sequence) -> None:
        """Takes the sequence out. Raises ValueError where it is not in."""
        if sequence not in self:
            raise ValueError(f"sequence {sequence.sequence_id} is not in the list")
        del self._items[self._position(sequence)]

    def _position(self, sequence: Sequence) -> int:
        return bisect.bisect_left(self._items, self._policy.key(sequence), key=self._policy.key)
