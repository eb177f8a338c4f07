"""Where activations are, and what everything takes on the card: exact, computed without torch and without a card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from kvarn.backends.arena import first_fit
from kvarn.backends.base import KvCacheSpec, MemoryPart, MemoryUse, StepLimits
from kvarn.backends.cuda.forms import DENSE, DTYPE_BYTES, MatrixForm, form_of, matrix_bytes
from kvarn.backends.cuda.launches import Lowered, Place, places
from kvarn.backends.cuda.libraries import library_parts
from kvarn.backends.cuda.lower import lower
from kvarn.backends.cuda.sampling_layout import SamplingLayout
from kvarn.backends.cuda.scratch import scratch_bytes
from kvarn.backends.cuda.step_layout import StepLayout
from kvarn.config import CudaConfig
from kvarn.kv_types import KV_TYPES
from kvarn.program import Program, Rope, RopeTable, Rows, Weight, ops
from kvarn.program.program import weights_read
from kvarn.tensors import DType

ALIGNMENT = 512
"""Of places and tensors: what torch's allocator rounds sizes up to."""
MOVED_BLOCKS = 8
"""Blocks whose bytes are held beside the cache at most while any number is copied in it."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets of all places in one allocation of `nbytes`; places whose lifetimes do not meet share bytes."""

    offsets: Mapping[Place, int]
    nbytes: int


def assign(lowered: Lowered, limits: StepLimits, dtype: str) -> Layout:
    """Gives every place an offset: first fit, launch by launch. Places of outputs live to the end."""
    touched = [tuple(places(launch)) for launch in lowered.launches]
    kept = [view.place for view in lowered.outputs.values()]
    offsets, top = first_fit(touched, kept, lambda place: _place_bytes(place, limits, dtype))
    return Layout(offsets, max(top, ALIGNMENT))


def memory_use(
    program: Program,
    dtypes: Mapping[str, DType],
    kv: KvCacheSpec,
    limits: StepLimits,
    config: CudaConfig,
    shared: Collection[str] = (),
    *,
    graphs: bool = True,
) -> MemoryUse:
    """What an executable takes on the card: its tensors to the byte, and what CUDA's libraries take for it.

    dtypes: how weights are stored, by name. shared: those that another executable holds. graphs: whether decode steps
    are recorded.
    """
    forms = matrix_forms(program, dtypes, config, shared)
    lowered = lower(program, forms, limits.outputs)
    recorded = graphs and not program.inputs  # a step with rows of the caller's is in no bucket
    libraries = library_parts(lowered, limits, graphs=recorded) if config.device == "cuda" else ()
    return MemoryUse(
        weights=weight_bytes(program, lowered, forms, config.dtype, shared),
        tables=sum(table_bytes(table, limits.max_model_len) for table in rotary_tables(program)),
        kv_cache=kv_cache_bytes(program, kv),
        activations=assign(lowered, limits, config.dtype).nbytes
        + aligned(scratch_bytes(program, lowered, forms, limits))
        + step_bytes(program, kv, limits),
        parts=(*tensor_parts(program, kv, limits), *libraries),
    )


def tensor_parts(program: Program, kv: KvCacheSpec, limits: StepLimits) -> tuple[MemoryPart, ...]:
    """Tensors that are neither weights nor cache nor activations."""
    layout = SamplingLayout.largest(program, limits)
    moved = MOVED_BLOCKS * program.kv_groups.block_bytes(KV_TYPES[kv.dtype], kv.block_size)
    return (
        MemoryPart("choice of tokens", aligned(layout.nbytes), f"rules and sums of {layout.rows} rows of logits"),
        MemoryPart("copies of blocks", aligned(moved), f"{MOVED_BLOCKS} of them, on their way in the cache or to disk"),
    )


def matrix_forms(
    program: Program, dtypes: Mapping[str, DType], config: CudaConfig, shared: Collection[str] = ()
) -> dict[str, MatrixForm]:
    """The form of each weight that may be one matrix with others: what one linear alone reads, and is held here."""
    uses = Counter(name for op in program.ops for name in weights_read(op))
    return {
        op.weight: form_of(dtypes[op.weight], config)
        for op in program.ops
        if isinstance(op, ops.Linear | ops.Logits) and uses[op.weight] == 1 and op.weight not in shared
    }


def weight_bytes(
    program: Program, lowered: Lowered, forms: Mapping[str, MatrixForm], dtype: str, shared: Collection[str] = ()
) -> int:
    """Bytes of the program's weights as kernels hold them, each tensor rounded up as the allocator does."""

    def rows(names: tuple[str, ...]) -> int:
        return sum(program.weight(name).shape[0] for name in names)

    held = set(shared)
    total = 0
    for names in lowered.matrices:
        if not held & set(names) and names[0] not in lowered.others:
            form = forms.get(names[0], DENSE)
            total += matrix_bytes(form, rows(names), program.weight(names[0]).shape[1], dtype, aligned)
    for names in lowered.biases:
        if not held & set(names):
            total += aligned(rows(names) * DTYPE_BYTES[dtype])
    for name, of_norm in lowered.others.items():
        if name not in held:
            total += aligned(program.weight(name).num_elements * (4 if of_norm else DTYPE_BYTES[dtype]))
    return total


def weight_sizes(program: Program, dtypes: Mapping[str, DType], config: CudaConfig) -> dict[str, int]:
    """Bytes of each weight as kernels hold it, by name, without the allocator's rounding."""
    forms = matrix_forms(program, dtypes, config)
    others, element = lower(program, forms).others, DTYPE_BYTES[config.dtype]

    def size(weight: Weight) -> int:
        form = forms.get(weight.name)
        if form is None:
            return weight.num_elements * (4 if others.get(weight.name, False) else element)
        rows, columns = weight.shape
        return matrix_bytes(form, rows, columns, config.dtype, int)

    return {weight.name: size(weight) for weight in program.weights}


def step_bytes(program: Program, kv: KvCacheSpec, limits: StepLimits) -> int:
    """Bytes of the arrays of a step, and of the rows that the caller gives."""
    inputs = sum(4 * limits.max_num_tokens * program.buffer(name).width for name in program.inputs)
    return aligned(StepLayout.largest(program, kv, limits).nbytes) + aligned(inputs)


def kv_cache_bytes(program: Program, kv: KvCacheSpec) -> int:
    """Bytes of the KV cache."""
    return program.kv_groups.block_bytes(KV_TYPES[kv.dtype], kv.block_size) * kv.num_blocks


def table_bytes(table: RopeTable, positions: int) -> int:
    """Bytes of sines and cosines of so many positions, float32."""
    return aligned(positions * table.rotary_dim * 4)


def rotary_tables(program: Program) -> set[RopeTable]:
    """The rotary tables that a program needs."""
    return {op.table for op in program.ops if isinstance(op, Rope)}


def aligned(size: int) -> int:
    """A size as the allocator gives it."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _place_bytes(place: Place, limits: StepLimits, dtype: str) -> int:
    rows = limits.max_num_tokens if place.rows is Rows.TOKENS else limits.max_num_outputs
    return aligned(rows * place.width * (4 if place.float32 else DTYPE_BYTES[dtype]))
