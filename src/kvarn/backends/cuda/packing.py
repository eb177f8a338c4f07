"""The forms in which the card holds a linear's weight, and the layout of four-bit words.

A weight has `rows` outputs and `width` inputs. Every form is a record of contiguous tensors on one device.

Four-bit layout: a row is cut into chunks of 128 weights, and a chunk is 16 words of 32 bits. Nibble p of word w is
weight 16 p + w of its chunk. So the nibbles p of 16 neighbouring words are 16 neighbouring weights: a kernel takes a
plane (p) of a tile of words with one mask and multiplies it by neighbouring inputs, and nothing moves between lanes.
A plane lies in one group of any size from 16 up. Rows are filled up to whole chunks with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import torch

CHUNK = 128
"""Weights of a chunk."""
WORDS = 16
"""32-bit words of a chunk; also the number of neighbouring weights in one plane of a chunk."""
PLANES = 8
"""Nibbles of a word."""
INT4_GROUPS = (32, 64, 128)
"""Weights that share a scale in `Int4`."""
INT8_GROUPS = (16, 32, 64, 128)
"""Weights that share a scale in `Int8`, where not the whole row does."""
BYTES_ALIGNMENT = 16
"""Rows of one-byte weights are filled up to a multiple of this, so that each starts where 16-byte loads may."""


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """weight: [N, K] bf16, fp16 or fp32."""

    weight: torch.Tensor

    @property
    def rows(self) -> int:
        """N."""
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """K."""
        return self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes on the card."""
        return self.weight.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class _Packed:
    """What all forms but `Dense` have: codes, N rows of them, and scales."""

    packed: torch.Tensor
    scales: torch.Tensor

    @property
    def rows(self) -> int:
        """N."""
        return self.packed.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes on the card, of all tensors of the form."""
        values = (getattr(self, field.name) for field in fields(self))
        return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


@dataclass(frozen=True, slots=True, eq=False)
class Int4(_Packed):
    """scale * (q - 8), or scale * q + offset; q in 0 … 15.

    packed: int32 [N, 16 * chunks], the layout above. scales, offsets: fp16 or fp32 [N, chunks * 128 / group], those of
    groups past `width` zero. offsets None: symmetric.
    """

    offsets: torch.Tensor | None
    group: int
    width: int


@dataclass(frozen=True, slots=True, eq=False)
class Int8(_Packed):
    """scale * q (+ offset); q in -128 … 127.

    packed: int8 [N, K rounded up to 16], zeros past `width`. scales: fp16 or fp32 [N, 1] where group is None (one scale
    a row; then there are no offsets), else [N, K / group], as offsets.
    """

    offsets: torch.Tensor | None
    group: int | None
    width: int


@dataclass(frozen=True, slots=True, eq=False)
class Fp8(_Packed):
    """scale * e4m3(code) (Micikevicius et al. 2022), one scale a row.

    packed: uint8 [N, K rounded up to 16], the codes, zeros past `width`. scales: fp32 [N, 1].
    """

    width: int


Weight: TypeAlias = Dense | Int4 | Int8 | Fp8


def pack_nibbles(values: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K] of 0 … 15 to int32 [N, 16 * ceil(K / 128)]: the layout of `Int4.packed`."""
    rows, width = values.shape
    chunks = -(-width // CHUNK)
    filled = torch.nn.functional.pad(values, (0, chunks * CHUNK - width))
    planes = filled.view(rows, chunks, PLANES, WORDS)
    words = torch.zeros((rows, chunks, WORDS), dtype=torch.int32, device=values.device)
    for plane in range(PLANES):
        words |= planes[:, :, plane].to(torch.int32) << (4 * plane)
    return words.view(rows, chunks * WORDS)


def unpack_nibbles(packed: torch.Tensor, width: int) -> torch.Tensor:
    """The inverse of `pack_nibbles`: uint8 [N, width]."""
    rows = packed.shape[0]
    words = packed.view(rows, -1, WORDS)
    planes = [((words >> (4 * plane)) & 15).to(torch.uint8) for plane in range(PLANES)]
    return torch.stack(planes, dim=2).reshape(rows, -1)[:, :width]


def pad_columns(values: torch.Tensor, multiple: int) -> torch.Tensor:
    """Zeros after the last column up to a multiple; contiguous."""
    return torch.nn.functional.pad(values, (0, -values.shape[1] % multiple)).contiguous()


def dequantize(weight: Weight) -> torch.Tensor:
    """The values that a weight stands for: float32 [N, K]. For tests, and for what no kernel takes."""
    match weight:
        case Dense():
            return weight.weight.float()
        case Fp8():
            codes = weight.packed[:, : weight.width].contiguous()
            return codes.view(torch.float8_e4m3fn).float() * weight.scales
        case Int4():
            integers = unpack_nibbles(weight.packed, weight.width).float()
            if weight.offsets is None:
                integers -= 8
            return _affine(integers, weight.scales, weight.offsets, weight.group)
        case Int8():
            integers = weight.packed[:, : weight.width].float()
            return _affine(integers, weight.scales, weight.offsets, weight.group or weight.width)


def _affine(
    integers: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None, group: int
) -> torch.Tensor:
    width = integers.shape[1]
    values = integers * scales.float().repeat_interleave(group, dim=1)[:, :width]
    return values if offsets is None else values + offsets.float().repeat_interleave(group, dim=1)[:, :width]


def stack_rows(weights: Sequence[Weight]) -> Weight:
    """One weight with the rows of all, in order: q, k and v, or gate and up, in one product.

    Raises ValueError where forms, widths, groups or types of scales differ; `stackable` tells before.
    """
    if not stackable(weights):
        raise ValueError("only weights of one form, width, group and type of scale can be stacked")
    first = weights[0]
    match first:
        case Dense():
            return Dense(_rows([w.weight for w in weights if isinstance(w, Dense)]))
        case Fp8():
            same = [w for w in weights if isinstance(w, Fp8)]
            return Fp8(_rows([w.packed for w in same]), _rows([w.scales for w in same]), first.width)
        case Int4():
            four = [w for w in weights if isinstance(w, Int4)]
            offsets = [w.offsets for w in four if w.offsets is not None]
            return Int4(
                _rows([w.packed for w in four]),
                _rows([w.scales for w in four]),
                _rows(offsets) if offsets else None,
                first.group,
                first.width,
            )
        case Int8():
            eight = [w for w in weights if isinstance(w, Int8)]
            offsets = [w.offsets for w in eight if w.offsets is not None]
            return Int8(
                _rows([w.packed for w in eight]),
                _rows([w.scales for w in eight]),
                _rows(offsets) if offsets else None,
                first.group,
                first.width,
            )


def stackable(weights: Sequence[Weight]) -> bool:
    """Whether `stack_rows` can make one weight of these."""
    return len({_stacking_key(weight) for weight in weights}) == 1


def _stacking_key(weight: Weight) -> tuple[object, ...]:
    match weight:
        case Dense():
            return Dense, weight.width, weight.weight.dtype
        case Fp8():
            return Fp8, weight.width
        case Int4() | Int8():
            return type(weight), weight.width, weight.group, weight.scales.dtype, weight.offsets is None


def _rows(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts, dim=0)
