"""Which blocks hold whose keys and values. Ids and counts only; the bytes belong to the back-end.

`BlockPool` owns the ids of all blocks and counts references, `BlockTable` is one sequence's list of them, and
`PrefixCache` is the seam for finding blocks that were computed before: `RadixPrefixCache` does.
`OffloadIndex` knows which of those it evicted lie in a second tier.
"""

from kvarn.cache.offload import OffloadIndex
from kvarn.cache.pool import BlockPool, OutOfBlocksError
from kvarn.cache.prefix import NullPrefixCache, PrefixCache, PrefixHit, PrefixPath
from kvarn.cache.radix import RadixPrefixCache
from kvarn.cache.salt import Salt
from kvarn.cache.table import BlockTable, blocks_for
from kvarn.cache.tree import common_length

__all__ = [
    "BlockPool", "BlockTable", "NullPrefixCache", "OffloadIndex", "OutOfBlocksError", "PrefixCache", "PrefixHit",
    "PrefixPath", "RadixPrefixCache", "Salt", "blocks_for", "common_length",
]  # fmt: skip
