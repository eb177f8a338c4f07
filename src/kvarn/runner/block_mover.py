"""`BlockMover`: blocks between an executable's cache and the second tier."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from kvarn.backends import Executable
from kvarn.runner.block_file import BlockFile
from kvarn.step import BlockLoad, BlockSave


class MoveSeconds(NamedTuple):
    """What moving one block takes."""

    save: float
    load: float


class BlockMover:
    """Carries out the saves and loads of steps."""

    def __init__(self, executable: Executable, file: BlockFile | None) -> None:
        """file: owned from now on; None: there is nothing to carry out."""
        self._executable = executable
        self._file = file
        self._seconds = 0.0

    def save(self, saves: Sequence[BlockSave]) -> None:
        """Copies blocks into slots, in order."""
        if saves:
            with self._timed():
                for save in saves:
                    self._open().save(save.slot, save.name, partial(self._executable.read_block, save.block))

    def load(self, loads: Sequence[BlockLoad]) -> tuple[int, ...]:
        """Copies slots into blocks; for each load the number of blocks up to the first slot that was wrong."""
        if not loads:
            return ()
        with self._timed():
            return tuple(self._load(load) for load in loads)

    def take_seconds(self) -> float:
        """What saves and loads took since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started

    def _load(self, load: BlockLoad) -> int:
        for count, (block, slot, name) in enumerate(zip(load.blocks, load.slots, load.names, strict=True)):
            if not self._open().load(slot, name, partial(self._executable.write_block, block)):
                return count
        return len(load.blocks)

    def forget(self) -> None:
        """Empties all slots."""
        if self._file is not None:
            for slot in range(self._file.num_slots):
                self._file.clear(slot)

    def close(self) -> None:
        """Closes the file. Idempotent."""
        if self._file is not None:
            self._file.close()

    def _open(self) -> BlockFile:
        if self._file is None:
            raise ValueError("the step moves blocks, but there is no block file")
        return self._file


def measure_move(executable: Executable, file: BlockFile, rounds: int = 5) -> MoveSeconds:
    """Of a block: the least of some rounds. Uses a slot that is empty or used least."""
    present = set(file.present().values())
    slot = next((slot for slot in range(file.num_slots) if slot not in present), 0)
    name, saves, loads = b"measured".ljust(32), [], []
    for _ in range(rounds):
        times = [time.perf_counter()]
        file.save(slot, name, partial(executable.read_block, 0))
        times.append(time.perf_counter())
        file.load(slot, name, partial(executable.write_block, 0))
        times.append(time.perf_counter())
        saves.append(times[1] - times[0])
        loads.append(times[2] - times[1])
    file.clear(slot)
    return MoveSeconds(min(saves), min(loads))
