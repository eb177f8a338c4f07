"""Checks that every back-end makes of a batch before it runs anything: no index may leave its array."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvarn.backends.base import InputBatch, KvCacheSpec, StepLimits
from kvarn.kv_types import INT4_TOKENS
from kvarn.program import Program


def _check(ok: bool | np.bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def first_blocks(batch: InputBatch, window: int | None, block_size: int) -> NDArray[np.int64]:
    """Of each sequence the index of the first block that any of its rows sees."""
    starts = batch.seq_lens.astype(np.int64) - np.diff(batch.query_start)
    return np.zeros_like(starts) if window is None else np.maximum(0, starts - window + 1) // block_size


def check_batch(batch: InputBatch, program: Program, kv: KvCacheSpec, limits: StepLimits) -> None:
    """Raises ValueError where the batch is inconsistent, exceeds the limits, or names anything out of range."""
    tokens, sequences, rows = batch.num_tokens, batch.num_sequences, batch.output_rows.size
    _check(0 < tokens <= limits.max_num_tokens, f"{tokens} tokens in a step, 1 to {limits.max_num_tokens} are allowed")
    _check(0 < sequences <= limits.max_num_sequences, f"{sequences} sequences, at most {limits.max_num_sequences}")
    _check(batch.positions.size == tokens, "positions must match the tokens")
    starts, lengths = batch.query_start, batch.seq_lens
    _check(starts.size == sequences + 1 and starts[0] == 0 and starts[-1] == tokens, "query_start must span all tokens")
    counts = np.diff(starts)
    _check(counts.min() > 0, "each sequence needs at least one token")
    _check(lengths.max() <= limits.max_model_len, f"a sequence is longer than max_model_len={limits.max_model_len}")
    _check(batch.token_ids.min() >= 0 and batch.token_ids.max() < program.vocab_size, "a token id is out of range")
    check_inputs(batch, program)
    places = np.arange(tokens) - np.repeat(starts[1:] - lengths, counts)
    _check(places.min() >= 0, "a sequence is shorter than its rows")
    owner = np.repeat(np.arange(sequences), counts)
    if batch.tree_parents is None:
        _check(np.array_equal(batch.positions, places), "positions must end at seq_lens - 1, without gaps")
    else:
        _check_trees(batch, batch.tree_parents, places, owner, kv)
    _check_tables(batch, program, places, owner, kv)
    _check(rows <= tokens, "more output rows than tokens")
    _check(
        rows == 0
        or (
            batch.output_rows[0] >= 0
            and batch.output_rows[-1] < tokens
            and bool(np.all(np.diff(batch.output_rows) > 0))
        ),
        "output_rows must be ascending and within the tokens",
    )


def check_inputs(batch: InputBatch, program: Program) -> None:
    """Raises ValueError where the batch lacks rows that the program wants, or has other ones."""
    _check(batch.inputs.keys() == set(program.inputs), f"inputs must be {list(program.inputs)}")
    for name, rows in batch.inputs.items():
        shape = (batch.num_tokens, program.buffer(name).width)
        _check(rows.shape == shape, f"the input {name!r} must have the shape {shape}, not {rows.shape}")


def _check_tables(
    batch: InputBatch, program: Program, places: NDArray[np.int64], owner: NDArray[np.int64], kv: KvCacheSpec
) -> None:
    """places, owner: see `_check_trees`."""
    groups = len(program.kv_groups)
    _check(batch.slot_mapping.shape == (batch.num_tokens, groups), f"slots must be those of {groups} KV groups")
    needed = -(-batch.seq_lens // kv.block_size)
    width = batch.block_tables.shape[-1]
    _check(batch.block_tables.shape == (needed.size, groups, width), f"there must be tables of {groups} KV groups")
    _check(width >= needed.max(), "a block table is too short")
    index = np.arange(width)[None, :]
    for group, window in enumerate(program.kv_groups.windows):
        table = batch.block_tables[:, group]
        begins = first_blocks(batch, window, kv.block_size)
        used = table[(index >= begins[:, None]) & (index < needed[:, None])]
        _check(used.min() >= 0 and used.max() < kv.num_blocks, f"a block id is out of range 0…{kv.num_blocks - 1}")
        slots = table[owner, places // kv.block_size].astype(np.int64) * kv.block_size + places % kv.block_size
        _check(np.array_equal(batch.slot_mapping[:, group], slots), "a slot is not its position's")


def _check_trees(
    batch: InputBatch,
    parents: NDArray[np.int32],
    places: NDArray[np.int64],
    owner: NDArray[np.int64],
    kv: KvCacheSpec,
) -> None:
    """places: the positions that rows had without trees. owner: the sequence of each row."""
    _check(parents.shape == (batch.num_tokens,), "tree_parents must match the tokens")
    drafts = parents >= 0
    rows = np.arange(batch.num_tokens)
    _check(parents.min() >= -1, "tree_parents: a parent is a row, or -1 for a known token")
    _check(not drafts[batch.query_start[:-1]].any(), "tree_parents: a sequence's first row is a known token's")
    _check(
        not (drafts[:-1] & ~drafts[1:] & (owner[:-1] == owner[1:])).any(),
        "tree_parents: drafts are a sequence's last rows",
    )
    roots = batch.query_start[1:] - 1 - np.bincount(owner[drafts], minlength=batch.num_sequences)
    _check(
        ((parents < rows) & (parents >= roots[owner]))[drafts].all(),
        "tree_parents: a parent is the row of the last known token or of an earlier draft",
    )
    expected = np.where(drafts, batch.positions[np.maximum(parents, 0)] + 1, places)
    _check(np.array_equal(batch.positions, expected), "positions must be without gaps, a draft's its parent's + 1")
    if kv.dtype == "int4":
        first = drafts & (batch.positions % INT4_TOKENS == 0)
        begun = np.stack([owner[first], batch.positions[first]])
        _check(
            np.unique(begun, axis=1).shape == begun.shape,
            f"tree_parents: one draft at most at a multiple of {INT4_TOKENS} in an int4 cache",
        )


def check_moves(sources: NDArray[np.int64], destinations: NDArray[np.int64], kv: KvCacheSpec) -> None:
    """Raises ValueError where a slot does not exist, or two moves have one destination."""
    slots = kv.num_blocks * kv.block_size
    for name, given in (("source", sources), ("destination", destinations)):
        _check(not ((given < 0) | (given >= slots)).any(), f"a {name} is out of range 0…{slots - 1}")
    _check(np.unique(destinations).size == destinations.size, "two slots are moved to one destination")
