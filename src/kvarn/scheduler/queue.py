"""`WaitingQueue`: the sequences that wait, in their policy's order."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from kvarn.scheduler.policy import Policy, order_key
from kvarn.scheduler.sequence import Sequence


class WaitingQueue:
    """Sequences by lane, each lane sorted. Tells the policy which lanes have any.

    Adding and removing take O(log n) comparisons, finding the first O(lanes).
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._lanes: dict[str, list[Sequence]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        """Lane by lane."""
        return (sequence for lane in self._lanes.values() for sequence in lane)

    def __contains__(self, sequence: Sequence) -> bool:
        lane = self._lanes.get(self._policy.lane(sequence), [])
        index = self._position(lane, sequence)
        return index < len(lane) and lane[index] is sequence

    def first(self) -> Sequence:
        """Who is served next. There must be one."""
        heads = (lane[0] for lane in self._lanes.values())
        return min(heads, key=lambda sequence: order_key(self._policy, sequence))

    def add(self, sequence: Sequence) -> None:
        """Puts the sequence in its place."""
        name = self._policy.lane(sequence)
        if name not in self._lanes:
            self._policy.open(name)
        lane = self._lanes.setdefault(name, [])
        lane.insert(self._position(lane, sequence), sequence)
        self._size += 1

    def remove(self, sequence: Sequence) -> None:
        """Takes the sequence out. Raises ValueError where it is not in."""
        if sequence not in self:
            raise ValueError(f"sequence {sequence.sequence_id} does not wait")
        name = self._policy.lane(sequence)
        lane = self._lanes[name]
        del lane[self._position(lane, sequence)]
        self._size -= 1
        if not lane:
            del self._lanes[name]
            self._policy.close(name)

    def ahead(self, sequence: Sequence) -> Iterator[Sequence]:
        """Those of the others that will be admitted before this one, as far as prompts decide it; in no order.

        The sequence must wait itself. Takes O(waiting): it is for arrivals, not for steps. What outputs will be
        charged is not known and not counted.
        """
        policy = self._policy
        name = policy.lane(sequence)
        own = self._lanes[name]
        own = own[: self._position(own, sequence)]
        yield from own
        mine = (policy.rank(name) + sum(map(policy.price, own)), *policy.place(sequence))
        for other, lane in self._lanes.items():
            if other == name:
                continue
            rank = policy.rank(other)
            for rival in lane:
                if (rank, *policy.place(rival)) > mine:
                    break
                yield rival
                rank += policy.price(rival)

    def _position(self, lane: list[Sequence], sequence: Sequence) -> int:
        return bisect.bisect_left(lane, self._policy.place(sequence), key=self._policy.place)
