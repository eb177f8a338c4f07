"""`plan`: what weights, KV cache and activations take, and what a step costs, before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvarn.backends import Backend, KvCacheSpec, MemoryUse, StepLimits
from kvarn.backends.cpu import CpuBackend
from kvarn.cache import Windows
from kvarn.errors import ConfigError
from kvarn.kv_types import CACHE_TYPES, KV_TYPES, KvType
from kvarn.program import Program
from kvarn.program.counts import StepShape, count_step, total
from kvarn.tensors import DType

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class StepCost:
    """One step's operations and bytes. intensity: operations a byte."""

    flops: int
    weight_bytes: int
    kv_read_bytes: int
    kv_write_bytes: int
    intensity: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Numbers of one model under one setting; bytes unless said otherwise."""

    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_bytes_per_token_without_grouping: int
    """Were there a KV head for each query head (MHA): what grouped-query attention saves."""
    kv_bytes_per_sequence: int
    """Of max_model_len tokens, were all of them kept."""
    kv_bytes_per_sequence_needed: int
    """Of these, what is kept: of layers with a sliding window what they can still see."""
    kv_bytes_total: int
    """What the sequences of the batch keep."""
    kv_bytes_allocated: int
    """The whole blocks that they hold for it."""
    batch: int
    max_model_len: int
    kv_dtype: str
    activation_bytes: int
    """Of the back-end, for the largest step."""
    packed_weight_bytes: int
    """The weights as the back-end holds them."""
    outgrow_tokens: int
    """Tokens (batch times length) from which the cache is larger than the weights."""
    prefill_tokens: int
    prefill: StepCost
    decode: StepCost
    """One token for each sequence of the batch, with max_model_len tokens of context."""

    @property
    def total_bytes(self) -> int:
        """Stored weights, cache and activations together."""
        return self.weight_bytes + self.kv_bytes_allocated + self.activation_bytes


def plan(
    program: Program,
    dtypes: Mapping[str, DType],
    *,
    batch: int = 1,
    max_model_len: int | None = None,
    kv_dtype: str = "float16",
    prefill_tokens: int = 512,
    max_num_batched_tokens: int = 512,
    backend: Backend | None = None,
) -> Plan:
    """The plan of a program whose weights are stored as `dtypes` says (by weight name).

    max_model_len None: what the model was made for. backend: None: the CPU's with one thread. Raises ConfigError naming
    the setting that is out of range.
    """
    length = program.max_positions if max_model_len is None else max_model_len
    for name, value, most in (
        ("max_model_len", length, program.max_positions),
        ("batch", batch, 1 << 20),
        ("prefill", prefill_tokens, program.max_positions),
    ):
        if not 1 <= value <= most:
            raise ConfigError(f"{name} must be between 1 and {most}, not {value}")
    if kv_dtype not in KV_TYPES:
        raise ConfigError(f"kv_dtype must be one of {', '.join(KV_TYPES)}, not {kv_dtype!r}")
    kv = KV_TYPES[kv_dtype]
    sizes = {w.name: _stored(dtypes[w.name], w.shape) for w in program.weights}
    weight_bytes = sum(sizes.values())
    per_token = program.kv_bytes_per_token(kv)
    groups = program.kv_groups
    blocks = Windows(BLOCK_SIZE, groups.windows).most_blocks(length, 1)
    needed = sum(
        layer.bytes_per_token(kv) * min(length, groups.windows[group] or length)
        for layer, (group, _) in zip(program.kv_layers, groups.places, strict=True)
    )
    limits = StepLimits(max(max_num_batched_tokens, batch), batch, length)
    use = _memory(backend or CpuBackend(threads=1), program, dtypes, kv_dtype, limits)

    def cost(shape: StepShape) -> StepCost:
        counts = total(count_step(program, shape, sizes.__getitem__, kv))
        return StepCost(
            counts.flops, counts.weight_bytes, counts.kv_read_bytes, counts.kv_write_bytes, counts.intensity
        )

    return Plan(
        parameters=program.num_parameters,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=per_token,
        kv_bytes_per_token_without_grouping=_ungrouped_bytes(program, kv),
        kv_bytes_per_sequence=per_token * length,
        kv_bytes_per_sequence_needed=needed,
        kv_bytes_total=needed * batch,
        kv_bytes_allocated=groups.block_bytes(kv, BLOCK_SIZE) * blocks * batch,
        batch=batch,
        max_model_len=length,
        kv_dtype=kv_dtype,
        activation_bytes=use.activations,
        packed_weight_bytes=use.weights,
        outgrow_tokens=weight_bytes // per_token + 1,
        prefill_tokens=prefill_tokens,
        prefill=cost(StepShape.prefill(prefill_tokens)),
        decode=cost(StepShape.decode(batch, length)),
    )


def _stored(dtype: DType, shape: tuple[int, ...]) -> int:
    rows = 1
    for extent in shape[:-1]:
        rows *= extent
    return rows * dtype.row_bytes(shape[-1])


def _ungrouped_bytes(program: Program, kv: KvType) -> int:
    """Cached bytes of one token were there as many KV heads as query heads."""
    heads = {op.layer: op.heads for op in program.ops if op.kind == "attention"}  # type: ignore[union-attr]
    return sum(layer.bytes_per_token(kv) // layer.heads * heads[i] for i, layer in enumerate(program.kv_layers))


def _memory(
    backend: Backend, program: Program, dtypes: Mapping[str, DType], kv_dtype: str, limits: StepLimits
) -> MemoryUse:
    # Activations beside a cache that the back-end does not have are those beside another one.
    held = kv_dtype if kv_dtype in CACHE_TYPES else "float16"
    return backend.memory_use(program, dtypes, KvCacheSpec(1, BLOCK_SIZE, held), limits)
