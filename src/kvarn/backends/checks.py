"""Checks that every back-end makes of a batch before it runs anything: no index may leave its array."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvarn.backends.base import InputBatch, KvCacheSpec, StepLimits
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
    expected = np.arange(tokens) - np.repeat(starts[1:] - lengths, counts)
    _check(np.array_equal(batch.positions, expected), "positions must end at seq_lens - 1, without gaps")
    _check(batch.positions.min() >= 0, "a position is negative")
    groups = len(program.kv_groups)
    _check(batch.slot_mapping.shape == (tokens, groups), f"slots must be those of {groups} KV groups")
    needed = -(-lengths // kv.block_size)
    width = batch.block_tables.shape[-1]
    _check(batch.block_tables.shape == (sequences, groups, width), f"there must be tables of {groups} KV groups")
    _check(width >= needed.max(), "a block table is too short")
    owner, blocks = np.repeat(np.arange(sequences), counts), batch.positions // kv.block_size
    for group in range(groups):
        table = batch.block_tables[:, group]
        begins = first_blocks(batch, program.kv_groups.windows[group], kv.block_size)
        index = np.arange(width)[None, :]
        used = table[(index >= begins[:, None]) & (index < needed[:, None])]
        _check(used.min() >= 0 and used.max() < kv.num_blocks, f"a block id is out of range 0…{kv.num_blocks - 1}")
        slots = table[owner, blocks].astype(np.int64) * kv.block_size + batch.positions % kv.block_size
        _check(np.array_equal(batch.slot_mapping[:, group], slots), "a slot is not its position's")
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
