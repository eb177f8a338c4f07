"""Trees of draft tokens in a batch (see `InputBatch.tree_parents`): how they are made, and what their rows read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kvarn.backends.base import InputBatch

Slots = NDArray[np.int64]


def with_trees(batch: InputBatch, drafts: Sequence[Sequence[int]]) -> InputBatch:
    """A batch of chains as one whose sequences' last rows are trees.

    drafts: of each sequence the parents of its last rows, by index among them: -1 is the row before them. A sequence
    without drafts, or whose drafts are a chain, stays as it is; the batch itself where all do. Raises ValueError where
    a parent does not come before its draft, or a sequence has no row before its drafts.
    """
    if all(_is_chain(parents) for parents in drafts):
        return batch
    rows = np.full(batch.num_tokens, -1, np.int32)
    positions = batch.positions.copy()
    for end, begin, parents in zip(batch.query_start[1:], batch.query_start[:-1], drafts, strict=True):
        first = int(end) - len(parents)
        if first <= begin:
            raise ValueError(f"{len(parents)} drafts among {end - begin} rows of a sequence")
        if _is_chain(parents):
            continue
        for row, parent in enumerate(parents, first):
            if not -1 <= parent < row - first:
                raise ValueError(f"the parent of draft {row - first} is {parent}, which is no draft before it")
            rows[row] = first + parent
            positions[row] = positions[first + parent] + 1
    return replace(batch, positions=positions, tree_parents=rows)


def _is_chain(parents: Sequence[int]) -> bool:
    return all(parent == index - 1 for index, parent in enumerate(parents))


def position_slots(batch: InputBatch, group: int, block_size: int) -> Slots:
    """int64[T]: the slot that a row's position has in a KV group. A draft of a tree has another one of its own."""
    if batch.tree_parents is None:
        return batch.slot_mapping[:, group]
    owner = np.repeat(np.arange(batch.num_sequences), np.diff(batch.query_start))
    blocks = batch.block_tables[owner, group, batch.positions // block_size].astype(np.int64)
    slots: Slots = blocks * block_size + batch.positions % block_size
    return slots


def contexts(
    batch: InputBatch, sequence: int, group: int, block_size: int, start: int = 0
) -> Iterator[tuple[slice, int, Slots]]:
    """(rows, `start`, slots by position from there on) of one sequence in a KV group.

    Known tokens read one context, a draft of a tree that of its path. start: what is before it is not looked at.
    """
    begin, end = (int(row) for row in batch.query_start[sequence : sequence + 2])
    places = np.arange(start, batch.seq_lens[sequence])
    blocks = batch.block_tables[sequence, group, places // block_size].astype(np.int64)
    slots: Slots = blocks * block_size + places % block_size
    parents = batch.tree_parents
    first = end if parents is None else end - int((parents[begin:end] >= 0).sum())
    known = slots[: len(slots) - (end - first)]
    yield slice(begin, first), start, known
    for row in range(first, end):
        path: list[int] = []
        at = row
        while at >= first:
            assert parents is not None
            path.insert(0, int(batch.slot_mapping[at, group]))
            at = int(parents[at])
        yield slice(row, row + 1), start, np.concatenate([known, np.array(path, np.int64)])
