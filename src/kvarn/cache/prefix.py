"""The seam for reusing computed blocks between sequences: `PrefixCache`, and the null object that caches nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class PrefixCache(Protocol):
    """Finds blocks whose KV is known to be that of a token prefix. Holds references on the blocks it keeps."""

    def match(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Blocks with the KV of the longest cached prefix of `token_ids`, whole blocks only.

        Takes no references for the caller; they stay valid until the next `evict`.
        """
        ...

    def insert(self, token_ids: Sequence[int], blocks: Sequence[int]) -> None:
        """Told when a sequence gives its blocks up: they hold the KV of `token_ids` (only whole blocks may be kept)."""
        ...

    def evict(self, count: int) -> int:
        """Lets go of blocks until `count` more are free in the pool, or none is left to let go; returns how many."""
        ...


class NullPrefixCache:
    """Caches nothing."""

    def match(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Always empty."""
        del token_ids
        return ()

    def insert(self, token_ids: Sequence[int], blocks: Sequence[int]) -> None:
        """Keeps nothing."""

    def evict(self, count: int) -> int:
        """There is nothing to let go."""
        del count
        return 0
