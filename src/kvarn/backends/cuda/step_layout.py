"""Where the arrays of a step are in one allocation, so that one copy takes them all to the card."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvarn.backends.base import InputBatch, KvCacheSpec, StepLimits
from kvarn.backends.cuda import parts
from kvarn.program import Program


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Sizes of a step's arrays: T tokens, S sequences, R rows with logits, G KV groups, block tables of B blocks.

    A step may be laid out for more than it has (`StepBuffers.fill`), so that its arrays are where those of another are.
    """

    tokens: int
    sequences: int
    outputs: int
    groups: int
    table_width: int
    trees: bool

    @staticmethod
    def of(batch: InputBatch, largest: StepLayout) -> StepLayout:
        """What just holds the batch; of its tables what sequences within the limits may need."""
        return StepLayout(
            batch.num_tokens, batch.num_sequences, int(batch.output_rows.size), largest.groups,
            min(batch.block_tables.shape[2], largest.table_width), batch.tree_parents is not None,
        )  # fmt: skip

    @staticmethod
    def largest(program: Program, kv: KvCacheSpec, limits: StepLimits) -> StepLayout:
        """What holds every step within the limits."""
        return StepLayout(
            limits.max_num_tokens, limits.max_num_sequences, limits.max_num_outputs, len(program.kv_groups),
            -(-limits.max_model_len // kv.block_size), True,
        )  # fmt: skip

    def arrays(self) -> Iterator[parts.Array]:
        """(name, shape, bytes of an element) of each array, in order."""
        yield "slot_mapping", (self.tokens, self.groups), 8
        yield "token_ids", (self.tokens,), 4
        yield "positions", (self.tokens,), 4
        yield "query_start", (self.sequences + 1,), 4
        yield "seq_lens", (self.sequences,), 4
        yield "output_rows", (self.outputs,), 4
        yield "block_tables", (self.sequences, self.groups, self.table_width), 4
        if self.trees:
            yield "tree_parents", (self.tokens,), 4

    def offsets(self) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        """(name, shape, bytes of an element, offset) of each array."""
        return parts.offsets(self.arrays())

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return parts.num_bytes(self.arrays())
