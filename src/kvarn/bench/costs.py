"""What work must move and multiply at least, and how long the machine's roof makes that take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from kvarn.backends.cpu import held_bytes
from kvarn.bench.roofline import Roof
from kvarn.program import Program, ops
from kvarn.program.counts import BytesOf, StepShape, count_op
from kvarn.tensors import DType


class Limit(StrEnum):
    """What work cannot be faster than."""

    MEMORY = "memory"
    ARITHMETIC = "arithmetic"


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes that must come from memory or go there, and multiply-adds. Costs add up."""

    weight_bytes: int = 0
    """As the CPU back-end holds them; once a step, however many rows share them."""
    kv_bytes: int = 0
    """Read and written."""
    integer_macs: int = 0
    """Of quantized weights with int8 activations."""
    float_macs: int = 0
    """Of float weights, and of attention."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.weight_bytes + other.weight_bytes,
            self.kv_bytes + other.kv_bytes,
            self.integer_macs + other.integer_macs,
            self.float_macs + other.float_macs,
        )

    @property
    def bytes(self) -> int:
        """All bytes."""
        return self.weight_bytes + self.kv_bytes

    @property
    def macs(self) -> int:
        """All multiply-adds."""
        return self.integer_macs + self.float_macs

    def seconds(self, roof: Roof, limit: Limit) -> float:
        """What the bytes, or the multiply-adds, take at least under this roof."""
        if limit is Limit.MEMORY:
            return self.bytes / roof.read_bytes
        return self.integer_macs / roof.integer_macs + self.float_macs / roof.float_macs

    def bound(self, roof: Roof) -> tuple[float, Limit]:
        """Seconds that the work takes at least, and which of both limits says so."""
        return max((self.seconds(roof, limit), limit) for limit in Limit)


def op_cost(program: Program, op: ops.Op, shape: StepShape, dtypes: Mapping[str, DType], kv_item_bytes: int) -> Cost:
    """The cost of one op of a step on the CPU back-end. dtypes: stored type of each weight."""
    counts = count_op(program, op, shape, _held(program, dtypes), kv_item_bytes)
    macs = counts.flops // 2 if isinstance(op, ops.Linear | ops.Logits | ops.Attention) else 0
    integer = isinstance(op, ops.Linear | ops.Logits) and dtypes[op.weight].quantized
    return Cost(
        weight_bytes=counts.weight_bytes,
        kv_bytes=counts.kv_read_bytes + counts.kv_write_bytes,
        integer_macs=macs if integer else 0,
        float_macs=0 if integer else macs,
    )


def step_cost(program: Program, shape: StepShape, dtypes: Mapping[str, DType], kv_item_bytes: int) -> Cost:
    """The cost of a step: of all its ops."""
    return sum((op_cost(program, op, shape, dtypes, kv_item_bytes) for op in program.ops), Cost())


def _held(program: Program, dtypes: Mapping[str, DType]) -> BytesOf:
    return lambda name: held_bytes(program.weight(name), dtypes[name])
