"""Rotary embedding, alone and with the cache's write: queries, keys and values of a layer in one launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kvarn.backends.cuda.kernels.kv_write import LayerKv, store_vectors


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """How heads are rotated (Su et al. 2021, eq. 34).

    table: float32 (positions, 2, pairs), cosines and sines. The first 2 * pairs elements of a head are rotated: element
    i with i + pairs where `halves` is set, else 2 i with 2 i + 1; the rest passes unchanged.
    """

    table: torch.Tensor
    halves: bool

    @property
    def pairs(self) -> int:
        """Of a head."""
        return self.table.shape[2]


def rope(x: torch.Tensor, out: torch.Tensor, head_dim: int, positions: torch.Tensor, rotation: Rotation) -> None:
    """Rotates each head of x[t] by positions[t], in place allowed (x and out the same, or apart).

    x, out: (T, heads * head_dim), any stride between rows. positions: int32[T].
    """
    heads = x.shape[1] // head_dim
    _rope[(x.shape[0], heads)](
        x, out, x, x, positions, rotation.table, positions, x, x, x, x,
        heads, x.stride(0), out.stride(0), 0, 0, 0,
        HEAD=head_dim, KV_HEADS=0, KEY=1, VALUE=1, SCALED=False, **_constants(rotation, head_dim, x, out),
    )  # fmt: skip


def rope_kv_write(
    x: torch.Tensor | None,
    out: torch.Tensor | None,
    head_dim: int,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: LayerKv,
    slots: torch.Tensor,
    positions: torch.Tensor,
    rotation: Rotation,
) -> None:
    """Rotates keys and writes them, and their values, to the cache; and rotates x into out as `rope` does.

    k: (T, kv_heads * key_dim), v: (T, kv_heads * value_dim), any stride between rows; neither is changed. x and out:
    None, or as in `rope`. slots: int64[T] of any stride; at -1 nothing is written. How vectors are stored:
    `store_vectors`. Without a rotation: `kv_write`.
    """
    heads = 0 if x is None else x.shape[1] // head_dim
    kv_heads, key_dim, value_dim = kv.keys.shape[1], kv.keys.shape[2], kv.values.shape[2]
    x, out = (k, k) if x is None or out is None else (x, out)
    _rope[(k.shape[0], heads + kv_heads)](
        x, out, k, v, positions, rotation.table, slots, kv.keys, kv.values,
        kv.keys if kv.key_scales is None else kv.key_scales, kv.values if kv.value_scales is None else kv.value_scales,
        heads, x.stride(0), out.stride(0), k.stride(0), v.stride(0), slots.stride(0),
        HEAD=head_dim, KV_HEADS=kv_heads, KEY=key_dim, VALUE=value_dim, SCALED=kv.key_scales is not None,
        **_constants(rotation, head_dim, x, out),
    )  # fmt: skip


def _constants(rotation: Rotation, head_dim: int, x: torch.Tensor, out: torch.Tensor) -> dict[str, object]:
    rest = head_dim - 2 * rotation.pairs
    return {
        "PAIRS": rotation.pairs,
        "HALVES": rotation.halves,
        "COPY": rest > 0 and x.data_ptr() != out.data_ptr(),
        "PAIR_BLOCK": triton.next_power_of_2(rotation.pairs),
        "REST_BLOCK": triton.next_power_of_2(max(1, rest)),
        "num_warps": 1 if head_dim <= 128 else 2,
    }


@triton.jit
def _rope(
    x, out, k, v, positions, table, slots, keys, values, key_scales, value_scales,
    heads, x_stride, out_stride, k_stride, v_stride, slot_stride,
    HEAD: tl.constexpr, KV_HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, SCALED: tl.constexpr,
    PAIRS: tl.constexpr, HALVES: tl.constexpr, COPY: tl.constexpr, PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """A token's head of x, or its key and value of a KV head, a program."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    angles = table + tl.load(positions + row).to(tl.int64) * (2 * PAIRS)
    if head < heads:
        source = x + row * x_stride + head * HEAD
        target = out + row * out_stride + head * HEAD
        # A thread has both elements of a pair, so that in place nobody reads what another one has overwritten.
        pair = tl.arange(0, PAIR_BLOCK)
        paired = pair < PAIRS
        first = pair if HALVES else 2 * pair
        second = first + (PAIRS if HALVES else 1)
        cosine = tl.load(angles + pair, mask=paired, other=0.0)
        sine = tl.load(angles + PAIRS + pair, mask=paired, other=0.0)
        a = tl.load(source + first, mask=paired, other=0.0).to(tl.float32)
        b = tl.load(source + second, mask=paired, other=0.0).to(tl.float32)
        tl.store(target + first, (a * cosine - b * sine).to(out.dtype.element_ty), mask=paired)
        tl.store(target + second, (b * cosine + a * sine).to(out.dtype.element_ty), mask=paired)
        if COPY:
            rest = 2 * PAIRS + tl.arange(0, REST_BLOCK)
            tl.store(target + rest, tl.load(source + rest, mask=rest < HEAD, other=0.0), mask=rest < HEAD)
    elif KV_HEADS > 0:
        slot = tl.load(slots + row * slot_stride)
        if slot >= 0:
            kv_head = head - heads
            _write_key(
                k + row * k_stride + kv_head * KEY, angles, keys, key_scales, slot * KV_HEADS + kv_head,
                KEY, PAIRS, HALVES, SCALED,
            )  # fmt: skip
            _write_value(
                v + row * v_stride + kv_head * VALUE, values, value_scales, slot * KV_HEADS + kv_head, VALUE, SCALED
            )


@triton.jit
def _write_key(
    source, angles, keys, scales, vector,
    DIM: tl.constexpr, PAIRS: tl.constexpr, HALVES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = triton.next_power_of_2(DIM)
    element = tl.arange(0, BLOCK)
    inside = element < DIM
    rotated = element < 2 * PAIRS
    if HALVES:
        pair = element % PAIRS
        leads = element < PAIRS
        partner = tl.where(leads, element + PAIRS, element - PAIRS)
    else:
        pair = element // 2
        leads = element % 2 == 0
        partner = tl.where(leads, element + 1, element - 1)
    own = tl.load(source + element, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(source + partner, mask=rotated, other=0.0).to(tl.float32)
    cosine = tl.load(angles + pair, mask=rotated, other=1.0)
    sine = tl.load(angles + PAIRS + pair, mask=rotated, other=0.0)
    turned = own * cosine + tl.where(leads, -other, other) * sine
    # Rounded as a row of activations is: the same key whether it is rotated here or in a launch of its own.
    turned = turned.to(source.dtype.element_ty).to(tl.float32)
    _store(turned, keys, scales, vector, element, inside, DIM, SCALED)


@triton.jit
def _write_value(source, values, scales, vector, DIM: tl.constexpr, SCALED: tl.constexpr):
    BLOCK: tl.constexpr = triton.next_power_of_2(DIM)
    element = tl.arange(0, BLOCK)
    inside = element < DIM
    own = tl.load(source + element, mask=inside, other=0.0).to(tl.float32)
    _store(own, values, scales, vector, element, inside, DIM, SCALED)


@triton.jit
def _store(x, cache, scales, vector, element, inside, DIM: tl.constexpr, SCALED: tl.constexpr):
    """One vector as `store_vectors` stores many."""
    one = tl.arange(0, 1)
    place = vector + one
    store_vectors(
        x[None, :], cache + place[:, None] * DIM + element[None, :], scales + place, one == 0, inside[None, :], SCALED
    )
