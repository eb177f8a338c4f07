"""Where the activations of a step lie in one allocation: places whose lifetimes do not meet share bytes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import TypeVar

P = TypeVar("P", bound=Hashable)


def first_fit(
    touched: Sequence[Collection[P]], kept: Collection[P], size_of: Callable[[P], int]
) -> tuple[dict[P, int], int]:
    """An offset for every place, and where the last of them ends.

    touched: what each operation of a step reads and writes, in their order; a place lives from the first that touches
    it to the last. kept: places that live to the end. size_of: bytes of a place.
    """
    last = {place: index for index, places in enumerate(touched) for place in places}
    last.update(dict.fromkeys(kept, len(touched)))
    offsets: dict[P, int] = {}
    live: dict[P, int] = {}
    top = 0
    for index, places in enumerate(touched):
        for place in places:
            if place in offsets:
                continue
            size = size_of(place)
            offsets[place] = _gap(sorted((offsets[p], size_of(p)) for p in live), size)
            live[place] = last[place]
            top = max(top, offsets[place] + size)
        live = {place: end for place, end in live.items() if end > index}
    return offsets, top


def _gap(taken: list[tuple[int, int]], size: int) -> int:
    """The lowest offset where `size` bytes fit between (offset, size) spans in ascending order."""
    offset = 0
    for start, length in taken:
        if start - offset >= size:
            break
        offset = max(offset, start + length)
    return offset
