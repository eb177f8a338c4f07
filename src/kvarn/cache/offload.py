"""Which evicted blocks lie in the second tier: names of blocks, and the slots of a file that hold them. No bytes."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping

from kvarn.cache.salt import Salt
from kvarn.step import BlockSave

NAME_BYTES = 32


class OffloadIndex:
    """The slots of the second tier, the least recently used given away first. Never more entries than slots.

    A block's name is a hash of the block before it and of its own tokens (and of the KV group, for those but the first:
    `of_group`); the first hashes the identity of what
    computes (model, type of cache, block size, instruction set) and the salt. So equal names mean equal bits, nothing
    of one salt is found by another, and a name gives neither tokens nor salts away to who does not guess them whole.
    What is in the tier is not checked here: whoever reads it says where it was wrong (`drop`).
    """

    def __init__(self, num_slots: int = 0, identity: str = "", present: Mapping[bytes, int] | None = None) -> None:
        """present: what the slots hold from the last run by name, the least recently used first."""
        self.num_slots = num_slots
        self.num_saved = 0
        """Blocks that were given a slot."""
        self._identity = identity.encode()
        self._slots: OrderedDict[bytes, int] = OrderedDict(present or {})  # as in BlockPool
        used = set(self._slots.values())
        self._free = [slot for slot in range(num_slots - 1, -1, -1) if slot not in used]
        self._saves: list[BlockSave] = []

    def __len__(self) -> int:
        return len(self._slots)

    def root(self) -> bytes:
        """What the first block of all follows."""
        return hashlib.blake2b(self._identity, digest_size=NAME_BYTES).digest()

    def branch(self, before: bytes, salt: Salt) -> bytes:
        """What the first block of a salt's own follows, behind the common block named `before`."""
        tenant, own = (part.encode("utf-8", "surrogatepass") for part in salt)
        text = len(tenant).to_bytes(8, "little") + tenant + own
        return hashlib.blake2b(text, key=before, digest_size=NAME_BYTES, person=b"salt").digest()

    def after(self, before: bytes, tokens: Iterable[int]) -> bytes:
        """The name of the block of `tokens` that follows the block named `before`."""
        return hashlib.blake2b(array("q", tokens).tobytes(), key=before, digest_size=NAME_BYTES).digest()

    @staticmethod
    def of_group(name: bytes, group: int) -> bytes:
        """The name of a KV group's block, where `name` is what the blocks of all of them are named after."""
        if group == 0:
            return name
        return hashlib.blake2b(bytes((group,)), key=name, digest_size=NAME_BYTES, person=b"group").digest()

    def save(self, name: bytes, block: int) -> None:
        """Asks for the block to be saved, unless it is there. The block must keep its values until `take_saves`."""
        slot = self._slots.pop(name, None)
        if slot is None:
            slot = self._free.pop() if self._free else self._slots.popitem(last=False)[1]
            self._saves.append(BlockSave(block, slot, name))
            self.num_saved += 1
        self._slots[name] = slot

    def find(self, name: bytes) -> int | None:
        """The slot that should hold the block; it counts as used now."""
        slot = self._slots.pop(name, None)
        if slot is not None:
            self._slots[name] = slot
        return slot

    def drop(self, name: bytes) -> None:
        """Told that the slot does not hold the block."""
        slot = self._slots.pop(name, None)
        if slot is not None:
            self._free.append(slot)

    def forget(self) -> None:
        """Lets go of all blocks, and of what was to be saved."""
        self._free = list(range(self.num_slots - 1, -1, -1))
        self._slots.clear()
        self._saves.clear()

    def take_saves(self) -> tuple[BlockSave, ...]:
        """What is to be saved before any of the blocks is written again."""
        saves, self._saves = tuple(self._saves), []
        return saves

    def check(self) -> None:
        """Raises AssertionError where slots are lost or given twice. For tests."""
        slots = [*self._slots.values(), *self._free]
        assert len(slots) == len(set(slots)), "a slot is there twice"
