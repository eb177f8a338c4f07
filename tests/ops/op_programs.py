"""Programs of one or a few ops, fed with chosen activations: row i of an embedding table is the input of token i."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvarn.backends import Backend, InputBatch, KvCacheSpec, StepLimits
from kvarn.models.in_memory import InMemoryModel
from kvarn.program import Buffer, Embed, KvLayer, Op, Program, Rows, Weight
from kvarn.tensors import Tensor

BLOCK = 16


@dataclass
class OpProgram:
    """Collects inputs, weights and ops; `run` executes them on a back-end."""

    tokens: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Buffer] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    kv_layers: list[KvLayer] = field(default_factory=list)

    def input(self, name: str, values: np.ndarray) -> str:
        """A buffer whose row of token i is values[i]."""
        self.weight(f"{name}.table", Tensor.from_array(values.astype(np.float32)))
        self.buffer(name, values.shape[1])
        self.ops.append(Embed(name, f"{name}.table"))
        return name

    def weight(self, name: str, tensor: Tensor) -> str:
        self.tensors[name] = tensor
        return name

    def buffer(self, name: str, width: int, rows: Rows = Rows.TOKENS) -> str:
        self.buffers[name] = Buffer(name, rows, width)
        return name

    def add(self, op: Op) -> None:
        self.ops.append(op)

    def program(self, output: str) -> Program:
        weights = tuple(Weight(name, tensor.shape) for name, tensor in self.tensors.items())
        return Program(
            "ops", tuple(self.ops), tuple(self.buffers.values()), weights, tuple(self.kv_layers), self.tokens,
            max_positions=4096, output=output,
        )  # fmt: skip

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def release(self) -> None:
        """Nothing to let go."""

    def run(self, backend: Backend, output: str, batch: InputBatch | None = None, kv: str = "float32") -> np.ndarray:
        """The output buffer after one step of all tokens as one sequence (or of `batch`)."""
        batch = ragged([(range(self.tokens), 0)]) if batch is None else batch
        length, program = int(batch.seq_lens.max()), self.program(output)
        spec = KvCacheSpec(int(batch.block_tables.max()) + 1, BLOCK, kv)
        limits = StepLimits(batch.num_tokens, max(batch.num_sequences, batch.output_rows.size, 1), length)
        executable = backend.load(program, self, spec, limits)
        try:
            return executable.execute(batch)[output].copy()
        finally:
            executable.close()


def ragged(
    parts: Sequence[tuple[Sequence[int], int]],
    *,
    block_size: int = BLOCK,
    outputs: Sequence[int] | None = None,
    tables: Sequence[Sequence[int]] | None = None,
    num_groups: int = 1,
) -> InputBatch:
    """A batch of sequences given as (token ids, position of the first). outputs: None: all rows.

    tables: block ids of each sequence; None: consecutive blocks, sequence after sequence. num_groups: see `of_tables`.
    """
    lengths = [start + len(ids) for ids, start in parts]
    needed = [-(-length // block_size) for length in lengths]
    if tables is None:
        starts = np.concatenate([[0], np.cumsum(needed)])
        tables = [list(range(starts[i], starts[i + 1])) for i in range(len(parts))]
    table = np.full((len(parts), max(len(t) for t in tables)), -1, np.int32)
    for i, blocks in enumerate(tables):
        table[i, : len(blocks)] = blocks
    counts = [len(ids) for ids, _ in parts]
    total = sum(counts)
    return InputBatch.of_tables(
        token_ids=np.concatenate([np.asarray(ids, np.int32) for ids, _ in parts]),
        positions=np.concatenate([np.arange(start, start + len(ids)) for ids, start in parts]).astype(np.int32),
        query_start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        seq_lens=np.asarray(lengths, np.int32),
        tables=table,
        output_rows=np.asarray(range(total) if outputs is None else outputs, np.int32),
        block_size=block_size,
        num_groups=num_groups,
    )


def groups_of(model: InMemoryModel) -> int:
    """The KV groups of a model."""
    return len(model.program.kv_groups)


def quantized_activations(x: np.ndarray) -> np.ndarray:
    """What int8 rows stand for, float64: symmetric, scale max|x| / 127 of each 32, rounded to nearest even."""
    groups = x.astype(np.float32).reshape(len(x), -1, 32)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(largest > 0, np.rint(groups * (np.float32(127) / largest)), 0)
    scale = largest / np.float32(127)
    return (scale.astype(np.float64) * q).reshape(x.shape)
