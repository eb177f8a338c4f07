"""Stored types of cached keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KvType:
    """How a vector (one token's key or value of one head) is stored: in whole groups of elements."""

    name: str
    bits: int
    """Of an element."""
    group: int = 1
    """Elements that a vector is filled up to a multiple of, with zeros."""
    group_bytes: int = 0
    """Bytes of a group's scale and minimum."""
    scale_bytes: int = 0
    """Bytes of the vector's own scale; 0: none."""
    key_bytes: int = 0
    """Bytes of a group that keys take beyond that: their share of what tokens have in common."""
    reference_every: int = 0
    """At positions that are multiples of this a token's key is what the keys after it are stored against, so that only
    one of several guesses of it can be in the cache; 0: each key stands for itself."""

    def value_bytes(self, dim: int) -> int:
        """Bytes of a value of `dim` elements."""
        groups = -(-dim // self.group)
        return groups * (self.group * self.bits // 8 + self.group_bytes) + self.scale_bytes

    def vector_bytes(self, key_dim: int, value_dim: int) -> int:
        """Bytes of a key and a value of one token and head."""
        return self.value_bytes(key_dim) + -(-key_dim // self.group) * self.key_bytes + self.value_bytes(value_dim)


INT4_GROUP = 32
"""Elements of int4 that share a scale and a minimum."""
INT4_TOKENS = 16
"""Tokens whose keys are differences from the first one's: those of slots 16 i … 16 i + 15."""

KV_TYPES: Mapping[str, KvType] = {
    kind.name: kind
    for kind in (
        KvType("float32", 32),
        KvType("float16", 16),
        KvType("bfloat16", 16),
        KvType("int8", 8, scale_bytes=4),
        KvType("fp8_e4m3", 8),
        KvType(
            "int4",
            4,
            group=INT4_GROUP,
            group_bytes=4,
            key_bytes=2 * INT4_GROUP // INT4_TOKENS,
            reference_every=INT4_TOKENS,
        ),
    )
}
"""All of them by name.

int8 is symmetric, with a float32 scale for each vector. fp8_e4m3 is E4M3 (Micikevicius et al. 2022) without one. int4
has a float16 scale and a float16 minimum for each group of 32; keys are rotated and stored as differences from a
float16 key for every 16 tokens: `backends/reference/int4.py`.
"""

CACHE_TYPES = ("float16", "float32", "int8", "int4")
"""What a cache can be made of in a machine's memory; others are for cards, and for planning."""
CARD_CACHE_TYPES = ("float16", "bfloat16", "float32", "int8", "fp8_e4m3")
"""What a cache can be made of on a GPU."""
