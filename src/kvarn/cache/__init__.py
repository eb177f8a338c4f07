"""Which blocks hold whose keys and values. Ids and counts only; the bytes belong to the back-end.

`BlockPool` owns the ids of all blocks and counts references, `BlockTable` is one sequence's list of them, and
`PrefixCache` is the seam for finding blocks that were computed before: `RadixPrefixCache` does.
"""

from kvarn.cache.pool import BlockPool, OutOfBlocksError
from kvarn.cache.prefix import NullPrefixCache, PrefixCache, PrefixPath, Salt
from kvarn.cache.radix import RadixPrefixCache
from kvarn.cache.table import BlockTable, blocks_for
from kvarn.cache.tree import common_length

__all__ = [
    "BlockPool", "BlockTable", "NullPrefixCache", "OutOfBlocksError", "PrefixCache", "PrefixPath", "RadixPrefixCache",
    "Salt", "blocks_for", "common_length",
]  # fmt: skip
