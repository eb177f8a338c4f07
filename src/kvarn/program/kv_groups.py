"""`KvGroups`: the attention layers of a program, divided so that a block of the KV cache can serve any of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvarn.kv_types import KvType
from kvarn.program.buffers import KvLayer

MOST_GROUPS = 16
"""Each sequence has a table for each group, so that more of them cost more time in every step."""


@dataclass(frozen=True, slots=True)
class KvGroups:
    """Layers of a group have one window, and all groups as many places for layers, which hold the same for a token.

    So a block has a slot for each place of a group, and its bytes do not depend on whose it is: groups take blocks from
    one pool. A program with layers of one kind is one group, whose blocks hold all layers.
    """

    windows: tuple[int | None, ...]
    """What each group's layers see: the last so many tokens, the current one included; None: all. Those first."""
    places: tuple[tuple[int, int], ...]
    """Of each KV layer of the program: its group, and its slot in the group's blocks."""
    slots: tuple[KvLayer, ...]
    """What each slot of a block holds of a token."""

    def __len__(self) -> int:
        return len(self.windows)

    def block_bytes(self, kv: KvType, block_size: int) -> int:
        """Bytes of a block of that many tokens."""
        return block_size * sum(slot.bytes_per_token(kv) for slot in self.slots)


def kv_groups(layers: Sequence[KvLayer], max_positions: int) -> KvGroups:
    """The groups of a program's KV layers, of sequences up to `max_positions` tokens.

    Where the layers hold different shapes they are one group that keeps all tokens. Else a group has as many places as
    waste the least: a place without a layer wastes what its group keeps of the longest sequence. Of equals the larger.
    """
    windows = [None if layer.window is None or layer.window >= max_positions else layer.window for layer in layers]
    if len({(layer.heads, layer.key_dim, layer.value_dim) for layer in layers}) > 1:
        windows = [None] * len(layers)
    if not layers:
        return KvGroups((None,), (), ())
    kinds = Counter(windows)
    order = sorted(kinds, key=lambda window: (window is not None, window or 0))

    def groups(size: int) -> int:
        return sum(-(-count // size) for count in kinds.values())

    def wasted(size: int) -> int:
        return sum(-count % size * (window or max_positions) for window, count in kinds.items())

    sizes = [size for size in range(len(layers), 0, -1) if groups(size) <= max(MOST_GROUPS, len(kinds))]
    size = min(sizes, key=wasted)
    return _divided(layers, windows, order, size)


def one_group(layers: Sequence[KvLayer]) -> KvGroups:
    """All layers in one group that keeps all tokens, whatever they see."""
    return KvGroups((None,), tuple((0, index) for index in range(len(layers))), tuple(layers))


def _divided(
    layers: Sequence[KvLayer], windows: Sequence[int | None], order: Sequence[int | None], size: int
) -> KvGroups:
    """Groups of `size` places, those of one window after the other as `order` has them."""
    by_group: list[int | None] = []
    places: dict[int, tuple[int, int]] = {}
    for window in order:
        members = [index for index, own in enumerate(windows) if own == window]
        for number, layer in enumerate(members):
            places[layer] = len(by_group) + number // size, number % size
        by_group += [window] * -(-len(members) // size)
    slots = layers[:size] if len(by_group) > 1 else layers
    return KvGroups(tuple(by_group), tuple(places[index] for index in range(len(layers))), tuple(slots))
