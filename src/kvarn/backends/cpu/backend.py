"""`CpuBackend`: chooses threads and instruction set, packs weights, builds executables."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

from kvarn import _native
from kvarn.backends.base import Executable, KvCacheSpec, MemoryUse, StepLimits
from kvarn.backends.cpu.build import Parameters, rotary_table
from kvarn.backends.cpu.executable import CpuExecutable
from kvarn.backends.cpu.memory import kv_slots, memory_use
from kvarn.backends.cpu.packed_file import PackedWeights
from kvarn.backends.cpu.packed_slot import PackedSlot, PackedWriter
from kvarn.backends.cpu.topology import physical_cores
from kvarn.errors import ConfigError, UnsupportedModelError
from kvarn.program import PositionEmbed, Program, Rope, Weight
from kvarn.tensors import DType, Tensor, TensorSource
from kvarn.tensors.dequantize import dequantize

ISA_VARIABLE = "KVARN_ISA"
MAX_THREADS = 1024
RELEASE_BYTES = 32 << 20


class CpuBackend:
    """Runs programs with native kernels. Stateless: each executable owns its threads and memory.

    threads: how many run a step, the caller among them; 0: one for each physical core the process may use. isa:
    "avx512", "avx2" or "scalar"; None: the environment's KVARN_ISA, else the best that the machine has. packed: where
    packed weights are found, and kept for the next time; the caller vouches that its key names the weights `load` gets.
    Raises ConfigError where the machine does not run it or `threads` is out of range.
    """

    name = "cpu"

    def __init__(self, threads: int = 0, isa: str | None = None, packed: PackedSlot | None = None) -> None:
        if not 0 <= threads <= MAX_THREADS:
            raise ConfigError(f"threads must be between 0 and {MAX_THREADS}, not {threads}")
        self.isa = _choose_isa(isa)
        self._cores = physical_cores()
        self.threads = threads or len(self._cores)
        self._packed = packed

    def memory_use(
        self,
        program: Program,
        dtypes: Mapping[str, DType],
        kv: KvCacheSpec,
        limits: StepLimits,
        *,
        shared: Collection[str] = (),
    ) -> MemoryUse:
        """What `load` will hold, to the byte."""
        return memory_use(program, dtypes, kv, limits, self.threads, shared)

    def load(
        self,
        program: Program,
        weights: TensorSource,
        kv: KvCacheSpec,
        limits: StepLimits,
        *,
        beside: Executable | None = None,
        shared: Collection[str] = (),
    ) -> CpuExecutable:
        """Packs every weight, or maps what was packed before; allocates cache and activations.

        The file is not needed afterwards. Raises UnsupportedModelError for shapes the kernels do not run, ConfigError
        for settings, ModelFileError from the source.
        """
        _check(program, kv, limits)
        other = None if beside is None else _cpu_executable(beside)
        pool = _native.Pool(self.threads, self._pins()) if other is None else other.pool
        slot = self._packed if other is None else None
        packed = None if slot is None else slot.read(program)
        writer = None
        if packed is None:
            packed = pack_weights(program, weights, pool, None if other is None else other.shared_weights(shared))
            writer = None if slot is None else PackedWriter(slot, program, packed)
        parameters = Parameters(
            matrices=packed.matrices,
            vectors=packed.vectors,
            rotary={
                table: rotary_table(table, limits.max_model_len)
                for table in {op.table for op in program.ops if isinstance(op, Rope)}
            },
        )
        cache = _native.KvCache(kv_slots(program), kv.num_blocks, kv.block_size, kv.dtype)
        return CpuExecutable(program, packed.dtypes, parameters, pool, cache, kv, limits, self.isa, writer, shared)

    def _pins(self) -> list[list[int]]:
        """Each thread on its own core, where there are as many cores; else wherever the system puts it."""
        return [list(core) for core in self._cores] if self.threads == len(self._cores) else []


def _cpu_executable(executable: Executable) -> CpuExecutable:
    if not isinstance(executable, CpuExecutable):
        raise TypeError("beside must be an executable of this back-end")
    return executable


def pack_weights(
    program: Program, weights: TensorSource, pool: _native.Pool, known: PackedWeights | None = None
) -> PackedWeights:
    """Every weight of the program in the form kernels read. Of the source little more than one tensor is in memory.

    known: weights that are packed already.
    """
    known = known or PackedWeights({}, {}, {})
    matrices: dict[str, _native.PackedWeight] = dict(known.matrices)
    vectors: dict[str, _native.Vector] = dict(known.vectors)
    dtypes: dict[str, DType] = dict(known.dtypes)
    unreleased = 0
    # One arena: with pages of its own each matrix would leave half a large page unused, or be written in small ones.
    arena, offset = _native.Pages(_arena_bytes(program, weights, dtypes)), 0
    for weight in program.weights:
        if weight.name in dtypes:
            continue
        tensor = _checked(weight, weights.tensor(weight.name))
        dtypes[weight.name] = tensor.dtype
        if len(tensor.shape) > 1:
            packed = _pack(tensor, pool, arena, offset)
            matrices[weight.name] = packed
            offset += packed.nbytes
        else:
            vectors[weight.name] = _vector(tensor)
        unreleased += tensor.nbytes
        if unreleased >= RELEASE_BYTES:
            weights.release()
            unreleased = 0
    return PackedWeights(matrices, vectors, dtypes)


def available_isas() -> list[str]:
    """Instruction sets that this machine runs, best first."""
    return list(_native.available_isas())


def _choose_isa(isa: str | None) -> str:
    wanted = isa if isa is not None else os.environ.get(ISA_VARIABLE, "")
    known = available_isas()
    if not wanted:
        return known[0]
    if wanted not in known:
        source = "isa" if isa is not None else ISA_VARIABLE
        raise ConfigError(f"{source} must be one of {', '.join(known)} on this machine, not {wanted!r}")
    return wanted


def _check(program: Program, kv: KvCacheSpec, limits: StepLimits) -> None:
    if kv.block_size < 16 or kv.block_size % 16:
        raise ConfigError(f"block_size must be a multiple of 16, not {kv.block_size}")
    if kv.num_blocks < 1:
        raise ConfigError(f"num_blocks must be at least 1, not {kv.num_blocks}")
    for name in ("max_num_tokens", "max_num_sequences", "max_model_len"):
        if getattr(limits, name) < 1:
            raise ConfigError(f"{name} must be at least 1, not {getattr(limits, name)}")
    for op in program.ops:
        if isinstance(op, PositionEmbed):
            positions = program.weight(op.weight).shape[0]
            if limits.max_model_len > positions:
                raise ConfigError(f"max_model_len must be at most {positions}, the model's positions, not "
                                  f"{limits.max_model_len}")  # fmt: skip
    for index, layer in enumerate(program.kv_layers):
        if layer.key_dim != layer.value_dim:
            raise UnsupportedModelError(f"KV layer {index}: values of another length than keys are not supported")


def _checked(weight: Weight, tensor: Tensor) -> Tensor:
    if tensor.shape != weight.shape:
        raise UnsupportedModelError(f"weight {weight.name} has shape {tensor.shape}, the program wants {weight.shape}")
    return tensor


def _arena_bytes(program: Program, weights: TensorSource, known: Collection[str]) -> int:
    names = (weight.name for weight in program.weights if len(weight.shape) > 1 and weight.name not in known)
    tensors = map(weights.tensor, names)
    return sum(_native.packed_bytes(tensor.dtype.name, tensor.rows, tensor.shape[-1]) for tensor in tensors)


def _pack(tensor: Tensor, pool: _native.Pool, arena: _native.Pages, offset: int) -> _native.PackedWeight:
    return _native.pack(tensor.dtype.name, tensor.rows, tensor.shape[-1], tensor.data, pool, arena, offset)


def _vector(tensor: Tensor) -> _native.Vector:
    return _native.Vector(dequantize(tensor))
