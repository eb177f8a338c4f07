"""`DraftKv`: of which tokens a draft model's keys and values are there, in the blocks of the model it guesses for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Table = tuple[int, ...]
"""Blocks of a sequence by position, in the KV group that keeps all tokens."""


@dataclass(frozen=True, slots=True)
class _Ahead:
    """KV of tokens that were only guessed: of sequence `sequence_id`, from `position` on, in one block."""

    sequence_id: int
    position: int
    tokens: tuple[int, ...]


class DraftKv:
    """Bookkeeping alone: ids and counts. The draft model's storage has as many blocks, under the same ids.

    So the scheduler's tables serve both models, and sharing, copies and preemption need nothing more. Of each block it
    is known how many leading tokens have their draft KV: a block that the target writes anew from some slot on has none
    behind that. What is missing is computed when it is wanted: nothing else here can be wrong, only late.

    Tokens that the drafter guessed have their draft KV before the target has seen them. It is kept for what the target
    then writes in the same place, if that is the same sequence with the same tokens; at the sequence's next write the
    rest is forgotten.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """Blocks without any draft KV."""
        self._size = block_size
        self._valid = np.zeros(num_blocks, np.int32)
        self._ahead: dict[int, _Ahead] = {}
        """By block."""
        self._guessing: dict[int, list[int]] = {}
        """By sequence, blocks that may hold what was guessed for it."""

    def copied(self, pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Told of blocks (source, destination) that were copied, in order; returns those with draft KV to copy."""
        copies = []
        for source, destination in pairs:
            self._valid[destination] = self._valid[source]
            ahead = self._ahead.get(source)
            if ahead is None:
                self._ahead.pop(destination, None)
            else:
                self._keep(destination, ahead)
            if self._valid[source] or ahead is not None:
                copies.append((source, destination))
        return copies

    def loaded(self, blocks: Iterable[int]) -> None:
        """Told of blocks that were filled from elsewhere: the target's KV only."""
        for block in blocks:
            self._valid[block] = 0
            self._ahead.pop(block, None)

    def written(self, sequence_id: int, table: Table, start: int, tokens: Sequence[int]) -> None:
        """Told that the target writes the KV of a sequence's tokens from position `start` on."""
        size, follows = self._size, True
        end = start + len(tokens)
        for index in range(start // size, -(-end // size)):
            block = table[index]
            position = max(start, index * size)
            valid = min(int(self._valid[block]), position - index * size)
            guessed = self._ahead.pop(block, None)
            same = 0
            if follows and valid == position - index * size and guessed is not None:
                its_own = (guessed.sequence_id, guessed.position) == (sequence_id, position)
                same = _common(guessed.tokens, tokens[position - start : (index + 1) * size - start]) if its_own else 0
            follows = position + same == min(end, (index + 1) * size)
            self._valid[block] = valid + same
        self.forget(sequence_id)

    def forget(self, sequence_id: int) -> None:
        """Forgets what was guessed for a sequence."""
        for block in self._guessing.pop(sequence_id, ()):
            ahead = self._ahead.get(block)
            if ahead is not None and ahead.sequence_id == sequence_id:
                del self._ahead[block]

    def known(self, table: Table, length: int) -> int:
        """How many of the first `length` tokens, from the first on, have their draft KV. The target has their KV."""
        valid = self._valid[np.array(table[: -(-length // self._size)], np.int64)]
        short = np.flatnonzero(valid < self._size)
        if not short.size:
            return length
        first = int(short[0])
        return min(length, first * self._size + int(valid[first]))

    def computed(self, table: Table, start: int, end: int) -> None:
        """The drafter has computed tokens start … end - 1, whose KV the target has, and all before have theirs."""
        for index in range(start // self._size, -(-end // self._size)):
            held = min(self._size, end - index * self._size)
            self._valid[table[index]] = max(int(self._valid[table[index]]), held)

    def guessed(self, sequence_id: int, table: Table, position: int, tokens: Sequence[int]) -> None:
        """The drafter has computed `tokens` from `position` on, before the target; all before have theirs."""
        self.forget(sequence_id)
        size, end = self._size, position + len(tokens)
        for index in range(position // size, -(-end // size)):
            block, first = table[index], max(position, index * size)
            self._valid[block] = first - index * size
            own = tuple(tokens[first - position : (index + 1) * size - position])
            self._keep(block, _Ahead(sequence_id, first, own))

    def _keep(self, block: int, ahead: _Ahead) -> None:
        self._ahead[block] = ahead
        self._guessing.setdefault(ahead.sequence_id, []).append(block)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    count = 0
    for one, other in zip(a, b, strict=False):
        if one != other:
            break
        count += 1
    return count
