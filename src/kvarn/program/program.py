"""`Program`: the one description of a model that every back-end, planner and quantizer reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property

from kvarn.kv_types import KvType
from kvarn.program.buffers import Buffer, KvLayer, Weight
from kvarn.program.kv_groups import KvGroups, kv_groups, one_group
from kvarn.program.ops import Input, Op, SelectRows

BUFFER_FIELDS = frozenset({"out", "x", "q", "k", "v", "gate", "up", "a", "b"})
WEIGHT_FIELDS = frozenset({"weight", "bias"})


def buffers_read(op: Op) -> tuple[str, ...]:
    """Names of the buffers an op reads."""
    return tuple(getattr(op, f.name) for f in fields(op) if f.name in BUFFER_FIELDS and f.name != "out")


def weights_read(op: Op) -> tuple[str, ...]:
    """Names of the weights an op reads."""
    names = (getattr(op, f.name) for f in fields(op) if f.name in WEIGHT_FIELDS)
    return tuple(name for name in names if name is not None)


@dataclass(frozen=True)
class Program:
    """A model as a list of ops. Immutable; `validate` has passed for every instance.

    Shared weights (tied embeddings) are one `Weight` that two ops name. `output` is the buffer of logits; any other
    buffer can be asked for by name at execution.
    """

    name: str
    ops: tuple[Op, ...]
    buffers: tuple[Buffer, ...]
    weights: tuple[Weight, ...]
    kv_layers: tuple[KvLayer, ...]
    vocab_size: int
    max_positions: int
    output: str = "logits"
    one_kv_group: bool = False
    """All KV layers keep all tokens in one group, whatever they see: for a program that has its keys and values in the
    blocks of another's sequences."""

    def __post_init__(self) -> None:
        from kvarn.program.shapes import validate

        validate(self)

    def buffer(self, name: str) -> Buffer:
        """The buffer of that name. Raises KeyError."""
        for buffer in self.buffers:
            if buffer.name == name:
                return buffer
        raise KeyError(name)

    def weight(self, name: str) -> Weight:
        """The weight of that name. Raises KeyError."""
        for weight in self.weights:
            if weight.name == name:
                return weight
        raise KeyError(name)

    def ops_of_kind(self, kind: str) -> Iterator[Op]:
        """All ops of one kind, in order."""
        return (op for op in self.ops if op.kind == kind)

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the buffers that the caller fills."""
        return tuple(op.out for op in self.ops if isinstance(op, Input))

    @cached_property
    def last_layer(self) -> str:
        """The buffer that the last layer leaves: hidden states before the last norm, a row for each token."""
        return next(op.x for op in reversed(self.ops) if isinstance(op, SelectRows))

    @property
    def num_parameters(self) -> int:
        """Elements of all weights; a shared weight counts once."""
        return sum(weight.num_elements for weight in self.weights)

    @cached_property
    def kv_groups(self) -> KvGroups:
        """How the KV layers share the blocks of the cache."""
        if self.one_kv_group:
            return one_group(self.kv_layers)
        return kv_groups(self.kv_layers, self.max_positions)

    def kv_bytes_per_token(self, kv: KvType) -> int:
        """Bytes that one token takes in the caches of all layers."""
        return sum(layer.bytes_per_token(kv) for layer in self.kv_layers)
