"""Random trees of draft tokens, and the paths that they stand for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st
from op_programs import ragged

from kvarn.backends import Executable
from kvarn.backends.trees import with_trees
from kvarn.kv_types import INT4_TOKENS

Parents = tuple[int, ...]


def shapes(most: int) -> st.SearchStrategy[list[int]]:
    """Choices that `tree_of` makes a tree of, of up to `most` drafts: wide and deep ones, chains among them."""
    any_shape = st.lists(st.integers(0, 1000), min_size=1, max_size=most)
    deep = st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=1, max_size=most)
    return any_shape | deep


def tree_of(choices: Sequence[int], start: int, kv: str = "float16") -> Parents:
    """Draft i's parent is `choice` drafts before it, or the last known token. start: the position of the first level.

    In an int4 cache a draft is left out where another one is at its multiple of 16 already.
    """
    parents: list[int] = []
    positions: list[int] = []
    for choice in choices:
        index = len(parents)
        parent = index - 1 - choice % (index + 1)
        position = start if parent < 0 else positions[parent] + 1
        if kv == "int4" and position % INT4_TOKENS == 0 and position in positions:
            continue
        parents.append(parent)
        positions.append(position)
    return tuple(parents)


def path_to(parents: Parents, draft: int) -> list[int]:
    """A draft's ancestors, from the first level on, and itself."""
    path: list[int] = []
    while draft >= 0:
        path.insert(0, draft)
        draft = parents[draft]
    return path


def leaves(parents: Parents) -> list[int]:
    return [draft for draft in range(len(parents)) if draft not in parents]


class Stream:
    """One sequence on an executable, in blocks of its own."""

    def __init__(self, executable: Executable, table: Sequence[int], block_size: int) -> None:
        """table: block b of it is a block of each KV group (see `InputBatch.of_tables`)."""
        self.executable, self.table, self.block_size = executable, list(table), block_size
        self.num_groups = len(executable.program.kv_groups)

    def run(self, ids: Sequence[int], start: int, drafts: Sequence[int] = (), parents: Parents = ()) -> np.ndarray:
        """Every row's output of a step of tokens from position `start` on, and of a tree of drafts after them."""
        batch = ragged(
            [([*ids, *drafts], start)],
            tables=[self.table], block_size=self.block_size, num_groups=self.num_groups,
        )  # fmt: skip
        outputs = self.executable.execute(with_trees(batch, [parents]))
        return next(iter(outputs.values())).copy()

    def accept(self, known: int, path: Sequence[int]) -> None:
        """Moves a path's drafts to where their positions are, after `known` tokens, in all groups."""
        self.executable.move_slots(
            [
                (self._slot(known + draft, group), self._slot(known + level, group))
                for level, draft in enumerate(path)
                for group in range(self.num_groups)
            ]
        )

    def _slot(self, position: int, group: int) -> int:
        block = self.table[position // self.block_size] * self.num_groups + group
        return block * self.block_size + position % self.block_size
