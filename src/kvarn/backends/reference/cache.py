"""Keys and values of one layer, as the cache's type gives them back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvarn.backends.reference import functions as f
from kvarn.backends.reference import int4
from kvarn.kv_types import INT4_GROUP, INT4_TOKENS
from kvarn.program import KvLayer

Floats = NDArray[np.float32]
Slots = NDArray[np.int64]


class LayerCache:
    """Owns `slots` keys and values of each head of a layer, stored as `dtype`, one of `CACHE_TYPES`."""

    def __init__(self, layer: KvLayer, slots: int, dtype: str) -> None:
        stored = np.float16 if dtype == "float16" else np.float32
        self._dtype = dtype
        self._keys = np.zeros((slots, layer.heads, layer.key_dim), stored)
        self._values = np.zeros((slots, layer.heads, layer.value_dim), stored)

    def write(self, slots: Slots, places: Slots, keys: Floats, values: Floats) -> None:
        """Stores keys (T, heads, key_dim) and values (T, heads, value_dim) in T slots.

        places: the slots of their positions, which drafts of a tree are not in.
        """
        del places
        self._keys[slots] = f.stored_vectors(keys, self._dtype)
        self._values[slots] = f.stored_vectors(values, self._dtype)

    def read(self, slots: Slots) -> tuple[Floats, Floats]:
        """Keys and values of slots: (N, heads, key_dim), (N, heads, value_dim)."""
        return self._keys[slots].astype(np.float32), self._values[slots].astype(np.float32)

    def prepared(self, q: Floats) -> Floats:
        """Queries (T, heads, head_dim) as they are to be multiplied with the keys that `read` gives."""
        return q

    def move(self, sources: Slots, destinations: Slots) -> None:
        """Copies from slots to as many others, as if all at once."""
        for array in (self._keys, self._values):
            array[destinations] = array[sources]

    def copy(self, source: int, destination: int, count: int) -> None:
        """Copies `count` slots from slot `source` on to slot `destination` on."""
        for array in (self._keys, self._values):
            array[destination : destination + count] = array[source : source + count]

    def parts(self, start: int, count: int) -> list[NDArray[np.uint8]]:
        """All bytes of `count` slots from slot `start` on, as views."""
        return [_bytes(array[start : start + count]) for array in (self._keys, self._values)]


class Int4LayerCache(LayerCache):
    """The same in 4 bits (see `int4`). Keys are kept rotated, and their dimensions filled up to groups.

    A token must be written after, or together with, the first one of the 16 that its position belongs to: their
    reference is where that position's slot is, also where drafts of a tree are in other slots.
    """

    def __init__(self, layer: KvLayer, slots: int) -> None:
        groups = -(-layer.key_dim // INT4_GROUP)
        super().__init__(KvLayer(layer.heads, groups * INT4_GROUP, layer.value_dim), slots, "float32")
        self._references = np.zeros((-(-slots // INT4_TOKENS), layer.heads, groups * INT4_GROUP), np.float32)

    def write(self, slots: Slots, places: Slots, keys: Floats, values: Floats) -> None:
        """See `LayerCache.write`."""
        rotated = int4.rotate(int4.filled(keys))
        first = places % INT4_TOKENS == 0
        self._references[places[first] // INT4_TOKENS] = int4.as_half(rotated[first])
        references = self._references[places // INT4_TOKENS]
        self._keys[slots] = int4.as_codes(rotated - references) + references
        self._values[slots] = int4.as_codes(int4.filled(values))[..., : values.shape[-1]]

    def prepared(self, q: Floats) -> Floats:
        """See `LayerCache.prepared`: rotated as keys are."""
        missing = self._keys.shape[-1] - q.shape[-1]
        return int4.rotate(np.pad(q, ((0, 0), (0, 0), (0, missing))), query=True)

    def copy(self, source: int, destination: int, count: int) -> None:
        """See `LayerCache.copy`."""
        super().copy(source, destination, count)
        start, to = source // INT4_TOKENS, destination // INT4_TOKENS
        blocks = -(-count // INT4_TOKENS)
        self._references[to : to + blocks] = self._references[start : start + blocks]

    def parts(self, start: int, count: int) -> list[NDArray[np.uint8]]:
        """See `LayerCache.parts`."""
        first, blocks = start // INT4_TOKENS, -(-count // INT4_TOKENS)
        return [*super().parts(start, count), _bytes(self._references[first : first + blocks])]


def _bytes(array: NDArray[np.float16] | NDArray[np.float32]) -> NDArray[np.uint8]:
    return array.reshape(-1).view(np.uint8)


def layer_cache(layer: KvLayer, slots: int, dtype: str) -> LayerCache:
    """An empty cache of that type."""
    return Int4LayerCache(layer, slots) if dtype == "int4" else LayerCache(layer, slots, dtype)


def cache_bytes(layer: KvLayer, slots: int, dtype: str) -> int:
    """What `layer_cache` takes: for types that CPUs do not compute with, float32 of the same values."""
    if dtype != "int4":
        return slots * layer.heads * (layer.key_dim + layer.value_dim) * (2 if dtype == "float16" else 4)
    key_dim = -(-layer.key_dim // INT4_GROUP) * INT4_GROUP
    references = -(-slots // INT4_TOKENS) * key_dim
    return 4 * layer.heads * (slots * (key_dim + layer.value_dim) + references)
