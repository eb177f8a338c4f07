"""Where activations are, and what everything takes: exact, computed without loading anything."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from kvarn import _native
from kvarn.backends.arena import first_fit
from kvarn.backends.base import KvCacheSpec, MemoryUse, StepLimits
from kvarn.backends.cpu.compile import compile_program
from kvarn.backends.cpu.stages import (
    AttentionStage,
    LinearStage,
    Place,
    PositionStage,
    Stage,
    StageList,
    reads,
    writes,
)
from kvarn.program import Program, Rope, Rows, Weight
from kvarn.tensors import DType

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets of all places in an arena of `arena_bytes`; places whose lifetimes do not meet share bytes."""

    offsets: Mapping[Place, int]
    arena_bytes: int


def assign(stages: StageList, program: Program, limits: StepLimits, threads: int) -> Layout:
    """Gives every place an offset: first fit, stage by stage. Places of outputs live to the end."""
    sizes = _sizes(stages, program, limits, threads)
    touched = [(*reads(stage), *writes(stage)) for stage in stages.stages]
    offsets, top = first_fit(touched, list(stages.outputs.values()), sizes.__getitem__)
    return Layout(offsets, max(top, ALIGNMENT))


def memory_use(
    program: Program,
    dtypes: Mapping[str, DType],
    kv: KvCacheSpec,
    limits: StepLimits,
    threads: int,
    shared: Collection[str] = (),
) -> MemoryUse:
    """What `CpuBackend(threads).load(...)` will hold, to the byte. dtypes: stored type of each of the weights.

    shared: weights that another executable holds.
    """
    stages = compile_program(program, dtypes, limits.outputs)
    layout = assign(stages, program, limits, threads)
    rotary = {op.table for op in program.ops if isinstance(op, Rope)}
    return MemoryUse(
        weights=weight_bytes(program, dtypes, shared),
        tables=sum(limits.max_model_len * table.rotary_dim * 4 for table in rotary),
        kv_cache=kv_cache_bytes(program, kv),
        activations=layout.arena_bytes + threads * _thread_bytes(stages, program, kv.dtype),
    )


def weight_bytes(program: Program, dtypes: Mapping[str, DType], shared: Collection[str] = ()) -> int:
    """Bytes of the program's weights as kernels hold them, less those that another executable holds."""
    return sum(held_bytes(weight, dtypes[weight.name]) for weight in program.weights if weight.name not in shared)


def held_bytes(weight: Weight, dtype: DType) -> int:
    """Bytes of one weight, stored as `dtype`, as kernels hold it: vectors as float32, matrices packed."""
    if len(weight.shape) == 1:
        return 4 * weight.num_elements
    columns = weight.shape[-1]
    return int(_native.packed_bytes(dtype.name, weight.num_elements // columns, columns))


def kv_cache_bytes(program: Program, kv: KvCacheSpec) -> int:
    """Bytes of the KV cache."""
    return int(_native.kv_bytes(kv_slots(program), kv.num_blocks, kv.block_size, kv.dtype))


def kv_slots(program: Program) -> list[tuple[int, int, int]]:
    """(heads, key_dim, value_dim) of each slot of a KV block, as the native cache wants them."""
    return [(slot.heads, slot.key_dim, slot.value_dim) for slot in program.kv_groups.slots]


def _sizes(stages: StageList, program: Program, limits: StepLimits, threads: int) -> dict[Place, int]:
    sizes: dict[Place, int] = {}
    for stage in stages.stages:
        for place in (*reads(stage), *writes(stage)):
            rows = limits.max_num_tokens if place.rows is Rows.TOKENS else limits.max_num_outputs
            exact = _native.quant_bytes(rows, place.width) if place.quantized else rows * place.width * 4
            sizes[place] = _aligned(exact)
        if isinstance(stage, AttentionStage):
            layer = program.kv_layers[stage.layer]
            sizes[stage.partials] = _aligned(
                _native.attention_partial_bytes(
                    stage.heads, layer.heads, layer.value_dim, limits.max_model_len, threads
                )
            )
    return sizes


def _thread_bytes(stages: StageList, program: Program, kv_dtype: str) -> int:
    scratch, own = 0, 0
    for stage in stages.stages:
        scratch = max(scratch, _scratch_bytes(stage, program, kv_dtype))
        if isinstance(stage, LinearStage) and stage.recipe:
            own = max(own, _native.linear_own_bytes(stage.recipe.x.width))
    return int(_native.thread_bytes(scratch, own))


def _scratch_bytes(stage: Stage, program: Program, kv_dtype: str) -> int:
    match stage:
        case LinearStage():
            return int(_native.linear_scratch_bytes())
        case AttentionStage():
            layer = program.kv_layers[stage.layer]
            group = stage.heads // layer.heads
            return int(_native.attention_scratch_bytes(group, layer.key_dim, layer.value_dim, kv_dtype))
        case PositionStage():
            return 4 * stage.x.width
        case _:
            return 0


def _aligned(size: int) -> int:
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
