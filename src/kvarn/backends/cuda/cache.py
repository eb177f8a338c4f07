"""`KvStore`: keys and values of all layers on the card."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvarn.backends.base import KvCacheSpec
from kvarn.backends.checks import check_moves
from kvarn.backends.cuda.inputs import sendable
from kvarn.backends.cuda.kernels.kv_write import LayerKv, kv_torch_dtype
from kvarn.backends.cuda.memory import MOVED_BLOCKS
from kvarn.program import KvGroups, KvLayer


class KvStore:
    """Owns the cache. Layers whose vectors have the same shapes are one tensor, so that blocks move in few launches.

    Raises ConfigError where the kernels do not have the cache's type.
    """

    def __init__(self, groups: KvGroups, kv: KvCacheSpec, device: torch.device) -> None:
        self._kv = kv
        self._stored = kv_torch_dtype(kv.dtype)
        self._device = device
        slots = kv.num_blocks * kv.block_size
        self._stacks: list[torch.Tensor] = []
        """Each (layers, slots, …)."""
        self._layers: dict[int, LayerKv] = {}
        for shape, members in _by_shape(groups.slots).items():
            self._add(shape, members, slots)
        self._of_layer = tuple(self._layers[slot] for _, slot in groups.places)

    def _add(self, shape: KvLayer, members: list[int], slots: int) -> None:
        count = len(members)
        scaled = self._kv.dtype == "int8"
        keys = self._zeros((count, slots, shape.heads, shape.key_dim), self._stored)
        values = self._zeros((count, slots, shape.heads, shape.value_dim), self._stored)
        scales = [self._zeros((count, slots, shape.heads), torch.float32) for _ in range(2)] if scaled else None
        for number, slot in enumerate(members):
            key_scales, value_scales = (None, None) if scales is None else (scales[0][number], scales[1][number])
            self._layers[slot] = LayerKv(keys[number], values[number], key_scales, value_scales)

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        stack = torch.zeros(shape, dtype=dtype, device=self._device)
        self._stacks.append(stack)
        return stack

    def layer(self, layer: int) -> LayerKv:
        """The cache that a KV layer of the program reads and writes."""
        return self._of_layer[layer]

    @property
    def nbytes(self) -> int:
        """Of all of it."""
        return sum(stack.numel() * stack.element_size() for stack in self._stacks)

    @property
    def block_bytes(self) -> int:
        """Of one block."""
        return self.nbytes // self._kv.num_blocks

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole blocks (source, destination), in order. Raises ValueError."""
        last: dict[int, int] = {}
        for source, destination in pairs:
            self._check_block(source)
            self._check_block(destination)
            last[destination] = last.get(source, source)
        size = self._kv.block_size
        within = np.arange(size)
        sources = (np.array(list(last.values()), np.int64)[:, None] * size + within).reshape(-1)
        destinations = (np.array(list(last), np.int64)[:, None] * size + within).reshape(-1)
        self._move(sources, destinations)

    def move_slots(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies from slot to slot, as if all at once. Raises ValueError."""
        sources, destinations = np.array(pairs, np.int64).reshape(-1, 2).T
        check_moves(sources, destinations, self._kv)
        self._move(sources, destinations)

    def _move(self, sources: NDArray[np.int64], destinations: NDArray[np.int64]) -> None:
        if not sources.size:
            return
        indexes = torch.from_numpy(np.stack([sources, destinations]))
        places = sendable(indexes, self._device).to(self._device, non_blocking=True)
        room = MOVED_BLOCKS * self.block_bytes // sources.size
        for stack in self._stacks:
            for part in _parts_of(_as_words(stack), room):
                part.index_copy_(1, places[1], part.index_select(1, places[0]))

    def read_block(self, block: int, out: NDArray[np.uint8]) -> None:
        """Copies a block to uint8[block_bytes]. Raises ValueError."""
        self._check_flat(block, out)
        start = 0
        for part in self._parts(block):
            flat = part.reshape(-1).view(torch.uint8).cpu().numpy()
            out[start : start + flat.size] = flat
            start += flat.size

    def write_block(self, block: int, data: NDArray[np.uint8]) -> None:
        """Sets a block to what `read_block` gave. Raises ValueError."""
        self._check_flat(block, data)
        flat = torch.from_numpy(np.ascontiguousarray(data)).to(self._device)
        start = 0
        for part in self._parts(block):
            size = part.numel() * part.element_size()
            part.copy_(flat[start : start + size].view(part.dtype).view(part.shape))
            start += size

    def _parts(self, block: int) -> Iterator[torch.Tensor]:
        size = self._kv.block_size
        for stack in self._stacks:
            yield stack[:, block * size : (block + 1) * size]

    def _check_flat(self, block: int, flat: NDArray[np.uint8]) -> None:
        self._check_block(block)
        if flat.size != self.block_bytes:
            raise ValueError(f"{flat.size} bytes of {self.block_bytes}")

    def _check_block(self, block: int) -> None:
        if not 0 <= block < self._kv.num_blocks:
            raise ValueError(f"block {block} is out of range 0…{self._kv.num_blocks - 1}")


def _by_shape(slots: Sequence[KvLayer]) -> dict[KvLayer, list[int]]:
    """The slots of a block, by the shapes of what they hold."""
    found: dict[KvLayer, list[int]] = {}
    for index, slot in enumerate(slots):
        found.setdefault(KvLayer(slot.heads, slot.key_dim, slot.value_dim), []).append(index)
    return found


def _as_words(stack: torch.Tensor) -> torch.Tensor:
    """(layers, slots, words of 8 bytes, or bytes): what indexes copy whatever the type."""
    flat = stack.view(stack.shape[0], stack.shape[1], -1)
    words = flat.shape[2] * flat.element_size() % 8 == 0
    return flat.view(torch.int64 if words else torch.uint8)


def _parts_of(stack: torch.Tensor, room: int) -> Iterator[torch.Tensor]:
    """A stack in parts that have at most `room` bytes of each slot, but a word."""
    layers, _, width = stack.shape
    words = max(1, room // stack.element_size())
    at_once, columns = max(1, words // width), min(width, words)
    for layer in range(0, layers, at_once):
        for column in range(0, width, columns):
            yield stack[layer : layer + at_once, :, column : column + columns]
