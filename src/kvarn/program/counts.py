"""What a step costs, op by op: floating-point operations and bytes moved. Exact functions of program and step shape.

A multiply-add counts as two operations. Bytes of weights are counted once a step, however many rows share them: that is
what batching gains. Activations are float32 in the reference's sense and are not counted as memory traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from kvarn.kv_types import KvType
from kvarn.program import ops
from kvarn.program.buffers import Rows
from kvarn.program.program import Program, weights_read

BytesOf = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class StepShape:
    """The shape of a step. sequences: for each, (tokens computed, tokens in context after the step).
    outputs: rows whose logits are needed."""

    sequences: tuple[tuple[int, int], ...]
    outputs: int

    @property
    def tokens(self) -> int:
        """Tokens computed in the step."""
        return sum(count for count, _ in self.sequences)

    def attended(self, window: int | None) -> int:
        """Pairs of query and visible key over all sequences, for one head."""
        return sum(_pairs(end - count, end, window) for count, end in self.sequences)

    def context(self, window: int | None) -> int:
        """Cached tokens that the step reads, each once a sequence."""
        return sum(end if window is None else min(end, window + count - 1) for count, end in self.sequences)

    @staticmethod
    def prefill(length: int) -> StepShape:
        """One prompt of `length` tokens, logits of the last."""
        return StepShape(((length, length),), 1)

    @staticmethod
    def decode(batch: int, context: int) -> StepShape:
        """One token for each of `batch` sequences that have `context` tokens afterwards."""
        return StepShape(((1, context),) * batch, batch)


def _pairs(start: int, end: int, window: int | None) -> int:
    """Sum of min(p + 1, window) for p from start to end - 1."""
    whole = (end * (end + 1) - start * (start + 1)) // 2
    if window is None or end <= window:
        return whole
    if start >= window:
        return (end - start) * window
    return (window * (window + 1) - start * (start + 1)) // 2 + (end - window) * window


@dataclass(frozen=True, slots=True)
class Counts:
    """Costs; they add up."""

    flops: int = 0
    weight_bytes: int = 0
    kv_read_bytes: int = 0
    kv_write_bytes: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.flops + other.flops,
            self.weight_bytes + other.weight_bytes,
            self.kv_read_bytes + other.kv_read_bytes,
            self.kv_write_bytes + other.kv_write_bytes,
        )

    @property
    def bytes(self) -> int:
        """All bytes that must move."""
        return self.weight_bytes + self.kv_read_bytes + self.kv_write_bytes

    @property
    def intensity(self) -> float:
        """Operations a byte: below the machine's own ratio a step is bound by bandwidth (Williams et al. 2009)."""
        return self.flops / self.bytes if self.bytes else 0.0


def count_op(program: Program, op: ops.Op, shape: StepShape, weight_bytes: BytesOf, kv: KvType) -> Counts:
    """The cost of one op. weight_bytes: stored bytes of a weight by name. kv: stored type of keys and values."""
    stored = sum(weight_bytes(name) for name in weights_read(op))
    if isinstance(op, ops.KvWrite):
        written = shape.tokens * program.kv_layers[op.layer].bytes_per_token(kv)
        return Counts(kv_write_bytes=written)
    out = program.buffer(op.out)
    elements = out.width * (shape.tokens if out.rows is Rows.TOKENS else shape.outputs)
    if elements == 0:
        return Counts()
    match op:
        case ops.Embed() | ops.PositionEmbed():
            table = program.weight(op.weight)
            row = weight_bytes(op.weight) // table.shape[0]
            return Counts(flops=elements, weight_bytes=row * shape.tokens)
        case ops.Linear() | ops.Logits():
            return Counts(2 * elements * program.buffer(op.x).width, stored)
        case ops.Attention():
            layer = program.kv_layers[op.layer]
            pairs = shape.attended(op.window) * op.heads
            read = shape.context(op.window) * layer.bytes_per_token(kv)
            return Counts(2 * pairs * (layer.key_dim + layer.value_dim), 0, read)
        case ops.Norm():
            return Counts(4 * elements, stored)
        case ops.Rope():
            return Counts(3 * elements, stored)
        case ops.SelectRows() | ops.Input():
            return Counts()
        case _:
            return Counts(elements, stored)


def count_step(
    program: Program,
    shape: StepShape,
    weight_bytes: BytesOf,
    kv: KvType,
    selected: Iterable[ops.Op] | None = None,
) -> dict[str, Counts]:
    """Costs of a step by kind of op, over all ops or the selected ones."""
    totals: dict[str, Counts] = {}
    for op in program.ops if selected is None else selected:
        cost = count_op(program, op, shape, weight_bytes, kv)
        totals[op.kind] = totals.get(op.kind, Counts()) + cost
    return totals


def total(counts: Mapping[str, Counts]) -> Counts:
    """The sum over all kinds."""
    return sum(counts.values(), Counts())
