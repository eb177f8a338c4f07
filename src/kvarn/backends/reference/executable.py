"""`ReferenceBackend` and its executable: the program's ops in order, one NumPy function each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from kvarn.backends.base import InputBatch, KvCacheSpec, MemoryUse, StepLimits
from kvarn.backends.checks import check_batch, check_moves, first_blocks
from kvarn.backends.reference import functions as f
from kvarn.backends.reference.cache import cache_bytes, layer_cache
from kvarn.backends.trees import contexts, position_slots
from kvarn.errors import ConfigError
from kvarn.kv_types import INT4_TOKENS
from kvarn.program import Program, Rows, ops
from kvarn.tensors import DType, TensorSource
from kvarn.tensors.dequantize import dequantize

Floats = NDArray[np.float32]


class ReferenceBackend:
    """Runs any program in NumPy float32 on dequantized weights: slow and plain. Stateless."""

    name = "reference"

    def memory_use(
        self, program: Program, dtypes: Mapping[str, DType], kv: KvCacheSpec, limits: StepLimits
    ) -> MemoryUse:
        """Every weight as float32, and all buffers of a step; an op's own intermediate results come on top."""
        del dtypes
        rows = {Rows.TOKENS: limits.max_num_tokens, Rows.OUTPUTS: limits.max_num_outputs}
        slots = kv.num_blocks * kv.block_size
        return MemoryUse(
            weights=4 * program.num_parameters,
            tables=0,
            kv_cache=sum(cache_bytes(layer, slots, kv.dtype) for layer in program.kv_groups.slots),
            activations=sum(4 * buffer.width * rows[buffer.rows] for buffer in program.buffers),
        )

    def load(self, program: Program, weights: TensorSource, kv: KvCacheSpec, limits: StepLimits) -> ReferenceExecutable:
        """Keeps the source; weights are dequantized when first used and kept, embedding rows at each use.

        Raises ConfigError where the model has learned positions and fewer than limits.max_model_len, or where blocks of
        int4 do not hold whole groups of tokens.
        """
        if kv.dtype == "int4" and kv.block_size % INT4_TOKENS:
            raise ConfigError(f"block_size must be a multiple of {INT4_TOKENS} for int4, not {kv.block_size}")
        for op in program.ops:
            if isinstance(op, ops.PositionEmbed):
                learned = program.weight(op.weight).shape[0]
                if limits.max_model_len > learned:
                    raise ConfigError(f"max_model_len must be at most {learned}, the positions that the model learned")
        return ReferenceExecutable(program, weights, kv, limits)


class ReferenceExecutable:
    """A loaded program. Owns the cache and the dequantized weights. Not thread-safe."""

    def __init__(self, program: Program, weights: TensorSource, kv: KvCacheSpec, limits: StepLimits) -> None:
        self.program = program
        self.kv = kv
        self.limits = limits
        self._source = weights
        self._weights: dict[str, Floats] = {}
        slots = kv.num_blocks * kv.block_size
        self._cache = [layer_cache(layer, slots, kv.dtype) for layer in program.kv_groups.slots]

    def execute(self, batch: InputBatch, outputs: Sequence[str] = ()) -> Mapping[str, Floats]:
        """Runs one step (see `Executable`). A named buffer is returned with the value it has last."""
        check_batch(batch, self.program, self.kv, self.limits)
        for name in outputs:
            try:
                self.program.buffer(name)
            except KeyError:
                raise ValueError(f"the program has no buffer {name!r}") from None
        buffers: dict[str, Floats] = {}
        for op in self.program.ops:
            self._run(op, batch, buffers)
        return {name: buffers[name] for name in (self.program.output, *outputs)}

    def commit(self) -> int:
        """Nothing: this back-end is for small models."""
        return 0

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole blocks (source, destination), in order."""
        size = self.kv.block_size
        for source, destination in pairs:
            for cache in self._cache:
                cache.copy(source * size, destination * size, size)

    def move_slots(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies keys and values from slot to slot (see `Executable`)."""
        sources, destinations = np.array(pairs, np.int64).reshape(-1, 2).T
        check_moves(sources, destinations, self.kv)
        for cache in self._cache:
            cache.move(sources, destinations)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return sum(part.nbytes for cache in self._cache for part in cache.parts(0, self.kv.block_size))

    def read_block(self, block: int, out: NDArray[np.uint8]) -> None:
        """Copies a block's keys and values. Raises ValueError."""
        for part, kept in self._parts(block, out):
            kept[:] = part

    def write_block(self, block: int, data: NDArray[np.uint8]) -> None:
        """Sets a block to what `read_block` gave. Raises ValueError."""
        for part, kept in self._parts(block, data):
            part[:] = kept

    def _parts(self, block: int, flat: NDArray[np.uint8]) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        """(bytes in the cache, bytes of `flat`) of each slot's part of a block."""
        if not 0 <= block < self.kv.num_blocks or flat.size != self.block_bytes:
            raise ValueError(f"block {block} of {self.kv.num_blocks}, {flat.size} bytes of {self.block_bytes}")
        size, start = self.kv.block_size, 0
        for part in (part for cache in self._cache for part in cache.parts(block * size, size)):
            yield part, flat[start : start + part.size]
            start += part.size

    def close(self) -> None:
        """Drops weights and cache."""
        self._weights.clear()
        self._cache.clear()

    def _weight(self, name: str) -> Floats:
        if name not in self._weights:
            self._weights[name] = dequantize(self._source.tensor(name))
        return self._weights[name]

    def _rows(self, name: str, rows: NDArray[np.int32]) -> Floats:
        """Rows of a table, without dequantizing all of it."""
        if name in self._weights:
            return self._weights[name][rows]
        tensor = self._source.tensor(name)
        return np.concatenate([dequantize(tensor.row_slice(int(row), int(row) + 1)) for row in rows])

    def _run(self, op: ops.Op, batch: InputBatch, buffers: dict[str, Floats]) -> None:
        match op:
            case ops.Embed():
                buffers[op.out] = self._rows(op.weight, batch.token_ids) * np.float32(op.scale)
            case ops.PositionEmbed():
                buffers[op.out] = buffers[op.x] + self._weight(op.weight)[batch.positions]
            case ops.Norm():
                buffers[op.out] = self._norm(op, buffers[op.x])
            case ops.Linear():
                out = buffers[op.x] @ self._weight(op.weight).T
                buffers[op.out] = out if op.bias is None else out + self._weight(op.bias)
            case ops.Rope():
                heads = buffers[op.x].reshape(-1, op.heads, op.head_dim)
                buffers[op.out] = f.rope(heads, batch.positions, op.table).reshape(len(heads), -1)
            case ops.KvWrite():
                self._write(op, batch, buffers)
            case ops.Attention():
                buffers[op.out] = self._attention(op, batch, buffers[op.q])
            case ops.Activation():
                buffers[op.out] = f.activation(op.function, buffers[op.x])
            case ops.GatedActivation():
                buffers[op.out] = f.activation(op.function, buffers[op.gate]) * buffers[op.up]
            case ops.Add():
                buffers[op.out] = buffers[op.a] + buffers[op.b]
            case ops.SelectRows():
                buffers[op.out] = buffers[op.x][batch.output_rows]
            case ops.Logits():
                out = (buffers[op.x] @ self._weight(op.weight).T) * np.float32(op.scale)
                out = out if op.bias is None else out + self._weight(op.bias)
                buffers[op.out] = f.soft_cap(out, op.softcap)
            case _:
                assert_never(op)

    def _norm(self, op: ops.Norm, x: Floats) -> Floats:
        groups = x.reshape(len(x), op.groups, x.shape[1] // op.groups)
        weight = self._weight(op.weight)
        if op.norm == "rms":
            out = f.rms_norm(groups, weight, op.eps)
            out = out if op.bias is None else out + self._weight(op.bias)
        else:
            out = f.layer_norm(groups, weight, None if op.bias is None else self._weight(op.bias), op.eps)
        return out.reshape(x.shape)

    def _write(self, op: ops.KvWrite, batch: InputBatch, buffers: dict[str, Floats]) -> None:
        """Stores keys and values as the cache's type would give them back."""
        layer = self.program.kv_layers[op.layer]
        tokens = batch.num_tokens
        keys = buffers[op.k].reshape(tokens, layer.heads, layer.key_dim)
        values = buffers[op.v].reshape(tokens, layer.heads, layer.value_dim)
        group, slot = self.program.kv_groups.places[op.layer]
        places = position_slots(batch, group, self.kv.block_size)
        self._cache[slot].write(batch.slot_mapping[:, group], places, keys, values)

    def _attention(self, op: ops.Attention, batch: InputBatch, q: Floats) -> Floats:
        group, slot = self.program.kv_groups.places[op.layer]
        cache = self._cache[slot]
        heads = cache.prepared(q.reshape(-1, op.heads, op.head_dim))
        size = self.kv.block_size
        begins = first_blocks(batch, op.window, size) * size
        parts = []
        every = (contexts(batch, sequence, group, size, int(begin)) for sequence, begin in enumerate(begins))
        for rows, begin, slots in itertools.chain.from_iterable(every):
            # What nobody sees is not there any more: zeros, which get the weight 0 as all that is masked.
            keys, values = (np.pad(x, ((begin, 0), (0, 0), (0, 0))) for x in cache.read(slots))
            parts.append(
                f.attention(
                    heads[rows],
                    keys,
                    values,
                    batch.positions[rows],
                    scale=op.scale,
                    window=op.window,
                    softcap=op.softcap,
                ).reshape(-1, op.heads * values.shape[2])
            )
        return np.concatenate(parts)
