"""`Windows`: what the KV groups of a model see of a sequence, and how many blocks it takes for that."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Windows:
    """Of each KV group the number of last tokens that its layers see, the current one included; None: all of them.

    A window of no more than a block counts as a block and a token: then every sequence holds its last whole block,
    where its place in the prefix cache is.
    """

    block_size: int
    """Tokens in a block."""
    sizes: tuple[int | None, ...] = (None,)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def endless(self) -> bool:
        """Whether every group keeps everything."""
        return all(size is None for size in self.sizes)

    def first(self, group: int, position: int) -> int:
        """Index of the first block of a sequence that a token at `position` sees."""
        size = self._size(group)
        return 0 if size is None else max(0, position + 1 - size) // self.block_size

    def most_in_group(self, group: int, chunk: int) -> int | None:
        """Most blocks that a sequence ever holds in a group while it computes up to `chunk` tokens a step; None: all.

        What its last computed token sees stays, so that another may compute that token again (n > 1).
        """
        size = self._size(group)
        # So many tokens begin in the last slot of a block, at worst.
        return None if size is None else (size + chunk - 2) // self.block_size + 2

    def falls(self, group: int, num_tokens: int, steps: int) -> range:
        """Of the next `steps` tokens, one a step, those steps but the last after which a block has fallen out of sight.

        A step is counted from 1. The last of them computed token still sees what it saw.
        """
        size = self._size(group)
        if size is None:
            return range(0)
        after = size - num_tokens
        return range(max(after + self.block_size, after % self.block_size or self.block_size), steps, self.block_size)

    def most_blocks(self, num_tokens: int, chunk: int) -> int:
        """Most blocks that a sequence ever holds until it has `num_tokens`, of which a step computes up to `chunk`."""
        whole = blocks_for(num_tokens, self.block_size)
        bounds = (self.most_in_group(group, chunk) for group in range(len(self)))
        return sum(whole if bound is None else min(whole, bound) for bound in bounds)

    def _size(self, group: int) -> int | None:
        size = self.sizes[group]
        return None if size is None else max(size, self.block_size + 1)

    def longest(self, num_blocks: int, chunk: int, most: int) -> int:
        """Tokens of the longest sequence that `num_blocks` are enough for; up to `most` where there is no such."""
        lengths = range(1, max(most, num_blocks * self.block_size) + 1)
        return bisect_right(lengths, num_blocks, key=lambda length: self.most_blocks(length, chunk))


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)
