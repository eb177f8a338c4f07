"""A loaded program on the CPU: packed weights, cache, threads, and one native plan per set of outputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvarn import _native
from kvarn.backends.base import InputBatch, KvCacheSpec, MemoryUse, StepLimits
from kvarn.backends.checks import check_inputs
from kvarn.backends.cpu.build import BuiltPlan, Parameters, build_plan
from kvarn.backends.cpu.compile import compile_program
from kvarn.backends.cpu.memory import assign, weight_bytes
from kvarn.backends.cpu.packed_file import PackedWeights
from kvarn.backends.cpu.packed_slot import PackedWriter
from kvarn.backends.plans import Plans
from kvarn.errors import EngineError
from kvarn.program import Program, Rows
from kvarn.tensors import DType

_Ints = NDArray[np.int32]
_Arrays = tuple[_Ints, _Ints, NDArray[np.int64], _Ints, _Ints, _Ints, _Ints, _Ints | None]


@dataclass(frozen=True, slots=True)
class CpuInfo:
    """What runs: instruction set, threads, and bytes held."""

    isa: str
    threads: int
    memory: MemoryUse


@dataclass(frozen=True, slots=True)
class StageCounter:
    """Times of one native stage, summed over steps."""

    label: str
    span_ns: int
    """From the first thread's begin to the last one's end."""
    busy_ns: int
    """Of all threads together."""
    calls: int
    """Steps in which it ran."""


class CpuExecutable:
    """See `kvarn.backends.base.Executable`. Owns all of its memory and threads; one caller at a time."""

    def __init__(
        self,
        program: Program,
        dtypes: Mapping[str, DType],
        parameters: Parameters,
        pool: _native.Pool,
        kv: _native.KvCache,
        kv_spec: KvCacheSpec,
        limits: StepLimits,
        isa: str,
        writer: PackedWriter | None = None,
        shared: Collection[str] = (),
    ) -> None:
        """shared: weights that another executable holds, too.

        writer: keeps the packed weights for later starts; begins after the first step, which it would slow down."""
        self.program = program
        self.kv = kv_spec
        self.limits = limits
        self._dtypes = dtypes
        self._parameters = parameters
        self._pool: _native.Pool | None = pool
        self._cache: _native.KvCache | None = kv
        self._isa = isa
        self._writer = writer
        self._shared = frozenset(shared)
        self._plans = Plans(program, limits.outputs, self._build)

    def execute(self, batch: InputBatch, outputs: Sequence[str] = ()) -> Mapping[str, NDArray[np.float32]]:
        """Runs one step in one native call without the GIL (see `Executable`)."""
        built = self._plans.returning(outputs)
        self._fill(built, batch)
        built.plan.run(*_arrays(batch))
        if self._writer is not None:
            self._writer.start()
        rows = {Rows.TOKENS: batch.num_tokens, Rows.OUTPUTS: int(batch.output_rows.size)}
        return {name: built.plan.array(buffer, rows[kind]) for name, (buffer, kind) in built.outputs.items()}

    def _fill(self, built: BuiltPlan, batch: InputBatch) -> None:
        """Copies what the caller gives to where the plan reads it."""
        if batch.inputs or built.inputs:
            check_inputs(batch, self.program)
            for name, buffer in built.inputs.items():
                built.plan.array(buffer, batch.num_tokens)[:] = batch.inputs[name]

    def count_stages(self, on: bool) -> None:
        """Switches the native counters of stages on or off, from zero. Off at load, when they cost nothing."""
        self._plans.main.plan.count(on)

    def stage_counters(self) -> list[StageCounter]:
        """What each stage took over the steps since counting was switched on; empty while it is off."""
        plan = self._plans.main.plan
        counters = zip(plan.labels, plan.counters(), strict=False)
        return [StageCounter(label, span, busy, calls) for label, (span, busy, calls) in counters]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole KV blocks (source, destination), in order. Raises ValueError."""
        self._open_cache().copy(list(pairs))

    def move_slots(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies keys and values from slot to slot in all layers (see `Executable`). Raises ValueError."""
        self._open_cache().move(list(pairs))

    def commit(self) -> int:
        """Touches a piece of the cache (see `Executable`): of one layer, 2 MiB."""
        return self._open_cache().commit()

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block."""
        return self._open_cache().block_bytes

    def read_block(self, block: int, out: NDArray[np.uint8]) -> None:
        """Copies a block's keys and values to uint8[block_bytes]. Raises ValueError."""
        self._open_cache().read(block, out)

    def write_block(self, block: int, data: NDArray[np.uint8]) -> None:
        """Sets a block to what `read_block` gave. Raises ValueError."""
        self._open_cache().write(block, data)

    @property
    def pool(self) -> _native.Pool:
        """The threads, for who runs when this executable does not: another one, or a sampler."""
        if self._pool is None:
            raise EngineError("the executable is closed")
        return self._pool

    def shared_weights(self, names: Collection[str]) -> PackedWeights:
        """Weights for another executable, which holds them as long as it needs them."""
        matrices, vectors = self._parameters.matrices, self._parameters.vectors
        return PackedWeights(
            {name: matrices[name] for name in names if name in matrices},
            {name: vectors[name] for name in names if name in vectors},
            {name: self._dtypes[name] for name in names},
        )

    def info(self) -> CpuInfo:
        """Instruction set, threads and bytes held now (activations of extra plans among them)."""
        if self._pool is None or self._cache is None:
            raise EngineError("the executable is closed")
        plans = [built.plan for built in self._plans]
        tables = sum(self.limits.max_model_len * table.rotary_dim * 4 for table in self._parameters.rotary)
        memory = MemoryUse(
            weights=weight_bytes(self.program, self._dtypes, self._shared),
            tables=tables,
            kv_cache=self._cache.nbytes,
            activations=sum(plan.arena_bytes + plan.scratch_bytes for plan in plans),
        )
        return CpuInfo(self._isa, self._pool.threads, memory)

    def close(self) -> None:
        """Releases threads and memory, once packed weights are on disk where they are to be kept. Idempotent."""
        writer, self._writer = self._writer, None
        try:
            if writer is not None:
                writer.finish()
        finally:
            self._plans.close()
            self._parameters = Parameters({}, {}, {})
            self._cache = None
            self._pool = None

    def _open_cache(self) -> _native.KvCache:
        if self._cache is None:
            raise EngineError("the executable is closed")
        return self._cache

    def _build(self, outputs: tuple[str, ...]) -> BuiltPlan:
        assert self._pool is not None
        assert self._cache is not None
        stages = compile_program(self.program, self._dtypes, (*self.limits.outputs, *outputs))
        layout = assign(stages, self.program, self.limits, self._pool.threads)
        return build_plan(
            stages, layout, self._parameters,
            program=self.program, limits=self.limits, pool=self._pool, kv=self._cache, isa=self._isa,
        )  # fmt: skip


def _arrays(batch: InputBatch) -> _Arrays:
    return (
        batch.token_ids, batch.positions, batch.slot_mapping, batch.query_start, batch.seq_lens, batch.block_tables,
        batch.output_rows, batch.tree_parents,
    )  # fmt: skip
