"""`BatchBuilder`: the arrays of a step, written into buffers that are allocated once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvarn.backends import InputBatch, StepLimits
from kvarn.backends.trees import with_trees
from kvarn.step import ScheduledSequence


class BatchBuilder:
    """Turns scheduled sequences into an `InputBatch`. It is on the path of every token, so it is written for few calls.

    The arrays it returns are views of its buffers, valid until the next call. Block tables that have not changed
    since a row was last written (the scheduler passes the same tuple then) are not written again.
    """

    def __init__(self, limits: StepLimits, block_size: int, num_groups: int = 1) -> None:
        """Allocates for the largest step that `limits` allow. num_groups: KV groups of the program."""
        tokens, sequences = limits.max_num_tokens, limits.max_num_sequences
        width = -(-limits.max_model_len // block_size)
        self._block_size = block_size
        self._token_ids = np.zeros(tokens, np.int32)
        self._positions = np.zeros(tokens, np.int32)
        self._slots = np.zeros((tokens, num_groups), np.int64)
        self._query_start = np.zeros(sequences + 1, np.int32)
        self._starts = np.zeros(sequences, np.int32)
        self._seq_lens = np.zeros(sequences, np.int32)
        self._tables = np.full((sequences, num_groups, width), -1, np.int32)
        self._written: list[tuple[tuple[int, ...], ...]] = [((),) * num_groups] * sequences
        self._arange = np.arange(tokens, dtype=np.int32)

    def build(self, sequences: Sequence[ScheduledSequence]) -> InputBatch:
        """The batch of at least one sequence, each with its draft after its tokens.

        Output rows are those of the last token and of the draft of each sequence with `sample`, and before them those
        of its prompt's tokens whose logprobs are asked for.
        """
        count = len(sequences)
        tokens = [s.token_ids if not s.draft else s.token_ids + s.draft for s in sequences]
        lengths = [len(ids) for ids in tokens]
        starts, seq_lens, query_start = self._starts[:count], self._seq_lens[:count], self._query_start[: count + 1]
        starts[:] = [s.start for s in sequences]
        query_start[1:] = lengths
        np.add(starts, query_start[1:], out=seq_lens)
        np.cumsum(query_start[1:], out=query_start[1:])
        total = int(query_start[-1])

        token_ids, positions = self._token_ids[:total], self._positions[:total]
        for row, sequence in enumerate(sequences):
            if self._written[row] is not sequence.block_tables:
                self._write_tables(row, sequence.block_tables)
        if total == count:
            owner = self._arange[:total]
            token_ids[:] = [ids[0] for ids in tokens]
            positions[:] = starts
        else:
            owner = np.repeat(self._arange[:count], lengths)
            token_ids[:] = [token for ids in tokens for token in ids]
            np.add(self._arange[:total], (starts - query_start[:-1])[owner], out=positions)
        blocks, offsets = np.divmod(positions, self._block_size)
        slots = self._slots[:total]
        slots[:] = self._tables[owner, :, blocks]
        slots *= self._block_size
        slots += offsets[:, None]
        trees: list[tuple[int, ...]] = []
        if any(s.draft or s.prompt for s in sequences):
            ends = zip(query_start[1:].tolist(), sequences, strict=True)
            rows = [row for end, s in ends for row in range(end - s.num_logits, end)]
            output_rows = np.array(rows, np.int32)
            if any(s.draft for s in sequences):
                trees = [s.parents for s in sequences]
        else:
            sampled = [row for row, s in enumerate(sequences) if s.sample]
            output_rows = query_start[1:][sampled]
            output_rows -= 1
        tables = self._tables[:count]
        batch = InputBatch(token_ids, positions, slots, query_start, seq_lens, tables, output_rows)
        return with_trees(batch, trees) if trees else batch

    def _write_tables(self, row: int, tables: tuple[tuple[int, ...], ...]) -> None:
        for group, (table, before) in enumerate(zip(tables, self._written[row], strict=True)):
            if table is not before:
                size = len(table)
                self._tables[row, group, :size] = table
                self._tables[row, group, size : len(before)] = -1
        self._written[row] = tables
