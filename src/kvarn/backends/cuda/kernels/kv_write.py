"""Keys and values into the cache: what a layer's cache is, and how a vector is stored in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.errors import ConfigError

KV_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
    "fp8_e4m3": torch.float8_e4m3fn,
}
"""Stored types of keys and values by name (`kvarn.kv_types`)."""


def kv_torch_dtype(name: str) -> torch.dtype:
    """The type of a cache's tensors. Raises ConfigError for one that this back-end does not have."""
    if name not in KV_DTYPES:
        raise ConfigError(f"kv_cache_dtype must be one of {', '.join(KV_DTYPES)} on cuda, not {name!r}")
    return KV_DTYPES[name]


@dataclass(frozen=True, slots=True, eq=False)
class LayerKv:
    """Keys and values of one layer, contiguous: keys [slots, kv_heads, key_dim], values [slots, kv_heads, value_dim].

    slot = block * block_size + offset. Scales are float32 [slots, kv_heads] for int8, None for other types: an element
    is its code times its vector's scale.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @classmethod
    def empty(cls, slots: int, kv_heads: int, key_dim: int, value_dim: int, dtype: str, device: str) -> LayerKv:
        """A layer's cache of zeros. dtype: a name of `KV_DTYPES`; raises ConfigError for others."""
        stored = kv_torch_dtype(dtype)
        scales: list[Tensor | None] = [None, None]
        if dtype == "int8":
            scales = [torch.zeros((slots, kv_heads), dtype=torch.float32, device=device) for _ in range(2)]
        keys, values = (
            torch.zeros((slots, kv_heads, dim), dtype=stored, device=device) for dim in (key_dim, value_dim)
        )
        return cls(keys, values, *scales)


@triton.jit
def store_vectors(x, pointers, scale_pointers, row_mask, mask, SCALED: tl.constexpr):
    """Stores float32 vectors x [R, D] at pointers [R, D] in the pointers' type, where mask [R, D] holds.

    SCALED (int8): symmetric, code = rint(x * 127 / max|x|), and the scale max|x| / 127 at scale_pointers [R] where
    row_mask [R] holds; elements of x beyond the vector must be 0. Other types: what they cannot hold becomes the
    largest that they can; NaN stays NaN. To be called from other kernels, on what they have in registers.
    """
    stored: tl.constexpr = pointers.dtype.element_ty
    if SCALED:
        largest = tl.max(tl.abs(x), axis=1)
        most = tl.full(largest.shape, 127.0, tl.float32)
        scale = tl.div_rn(largest, most)
        inverse = tl.where(scale > 1.2e-38, tl.div_rn(most, tl.maximum(largest, 1e-36)), 0.0)
        # Adding 1.5 * 2²³ leaves no room for a fraction: rounds to nearest, ties to even.
        codes = (x * inverse[:, None] + 12582912.0) - 12582912.0
        tl.store(scale_pointers, scale, mask=row_mask)
        tl.store(pointers, codes.to(tl.int8), mask=mask)
    else:
        if stored == tl.float16:
            x = tl.clamp(x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
        elif stored == tl.bfloat16:
            x = tl.clamp(x, -3.3895313892515355e38, 3.3895313892515355e38, propagate_nan=tl.PropagateNan.ALL)
        elif stored == tl.float8e4nv:
            x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(pointers, x.to(stored), mask=mask)


@triton.jit
def _write_kernel(
    given, slots, slot_stride, cache, scales,
    token_stride, HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One token's vectors of BLOCK_HEADS heads a program."""
    token = tl.program_id(0)
    slot = tl.load(slots + token * slot_stride)
    if slot >= 0:
        heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        dims = tl.arange(0, BLOCK_DIM)
        row_mask = heads < HEADS
        mask = row_mask[:, None] & (dims < DIM)[None, :]
        source = given + token.to(tl.int64) * token_stride + heads[:, None] * DIM + dims[None, :]
        x = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        vectors = slot * HEADS + heads
        store_vectors(x, cache + vectors[:, None] * DIM + dims[None, :], scales + vectors, row_mask, mask, SCALED)


def kv_write(keys: Tensor, values: Tensor, slots: Tensor, kv: LayerKv) -> None:
    """Stores keys [T, kv_heads, key_dim] and values [T, kv_heads, value_dim] at slots int64[T] of `kv`.

    Heads must be contiguous within a token, tokens need not be (a slice of a fused projection), and slots may be a
    column of [T, G]. A negative slot stands for a row that fills up a batch: nothing is stored. Slots must be distinct.
    See `store_vectors` for rounding.
    """
    for given, cache, scales in ((keys, kv.keys, kv.key_scales), (values, kv.values, kv.value_scales)):
        tokens, heads, dim = given.shape
        if cache.shape[1:] != (heads, dim) or given.stride()[1:] != (dim, 1):
            raise ValueError(f"{heads} vectors of {dim} elements a token do not fit a cache of {tuple(cache.shape)}")
        block_dim = triton.next_power_of_2(dim)
        block_heads = min(triton.next_power_of_2(heads), max(1, 2048 // block_dim))
        _write_kernel[(tokens, triton.cdiv(heads, block_heads))](
            given, slots, slots.stride(0), cache, cache if scales is None else scales,
            given.stride(0), heads, dim, block_heads, block_dim, scales is not None, num_warps=4,
        )  # fmt: skip
