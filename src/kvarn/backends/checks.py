"""Checks that every back-end makes of a batch before it runs anything: no index may leave its array."""

from __future__ import annotations

import numpy as np

from kvarn.backends.base import InputBatch, KvCacheSpec, StepLimits
from kvarn.program import Program


def _check(ok: bool | np.bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def check_batch(batch: InputBatch, program: Program, kv: KvCacheSpec, limits: StepLimits) -> None:
    """Raises ValueError where the batch is inconsistent, exceeds the limits, or names anything out of range."""
    tokens, sequences, rows = batch.num_tokens, batch.num_sequences, batch.output_rows.size
    _check(0 < tokens <= limits.max_num_tokens, f"{tokens} tokens in a step, 1 to {limits.max_num_tokens} are allowed")
    _check(0 < sequences <= limits.max_num_sequences, f"{sequences} sequences, at most {limits.max_num_sequences}")
    _check(batch.positions.size == batch.slot_mapping.size == tokens, "positions and slots must match the tokens")
    starts, lengths = batch.query_start, batch.seq_lens
    _check(starts.size == sequences + 1 and starts[0] == 0 and starts[-1] == tokens, "query_start must span all tokens")
    counts = np.diff(starts)
    _check(counts.min() > 0, "each sequence needs at least one token")
    _check(lengths.max() <= limits.max_model_len, f"a sequence is longer than max_model_len={limits.max_model_len}")
    _check(batch.token_ids.min() >= 0 and batch.token_ids.max() < program.vocab_size, "a token id is out of range")
    expected = np.arange(tokens) - np.repeat(starts[1:] - lengths, counts)
    _check(np.array_equal(batch.positions, expected), "positions must end at seq_lens - 1, without gaps")
    _check(batch.positions.min() >= 0, "a position is negative")
    needed = -(-lengths // kv.block_size)
    width = batch.block_tables.shape[1]
    _check(batch.block_tables.shape[0] == sequences and width >= needed.max(), "a block table is too short")
    used = batch.block_tables[np.arange(width)[None, :] < needed[:, None]]
    _check(used.min() >= 0 and used.max() < kv.num_blocks, f"a block id is out of range 0…{kv.num_blocks - 1}")
    owner = np.repeat(np.arange(sequences), counts)
    slots = batch.block_tables[owner, batch.positions // kv.block_size].astype(np.int64) * kv.block_size
    _check(np.array_equal(batch.slot_mapping, slots + batch.positions % kv.block_size), "a slot is not its position's")
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
