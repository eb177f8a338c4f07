"""Stored types of cached keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KvType:
    """How a vector (one token's key or value of one head) is stored."""

    name: str
    element_bytes: int
    scale_bytes: int = 0
    """Bytes of the vector's own scale; 0: none."""

    def vector_bytes(self, dim: int) -> int:
        """Bytes of a vector of `dim` elements."""
        return dim * self.element_bytes + self.scale_bytes


KV_TYPES: Mapping[str, KvType] = {
    kind.name: kind
    for kind in (KvType("float32", 4), KvType("float16", 2), KvType("bfloat16", 2), KvType("int8", 1, 4))
}
"""All of them by name. int8 is symmetric, with a float32 scale for each vector."""

CACHE_TYPES = ("float16", "float32", "int8")
"""What a cache can be made of; other types are for planning."""
