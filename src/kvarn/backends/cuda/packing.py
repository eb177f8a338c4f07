"""The forms in which the card holds a linear's weight, and the layout of four-bit words.

A weight has `rows` outputs and `width` inputs. Every form is a record of contiguous tensors on one device.

Four-bit layout: a row is cut into chunks of 128 weights, and a chunk is 16 words of 32 bits. Nibble p of word w is
weight 16 p + w of its chunk. So the nibbles p of 16 neighbouring words are 16 neighbouring weights: a kernel takes a
plane (p) of a tile of words with one mask and multiplies it by neighbouring inputs, and nothing moves between lanes.
A plane lies in one group of any size from 16 up. Rows are filled up to whole chunks with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
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


def room_for(like: Weight, rows: int) -> Weight:
    """A weight of `rows` rows, not set yet, of the form, width, group and types that another has."""

    def room(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)

    match like:
        case Dense():
            return Dense(room(like.weight))
        case Fp8():
            return replace(like, packed=room(like.packed), scales=room(like.scales))
        case Int4() | Int8():
            offsets = None if like.offsets is None else room(like.offsets)
            return replace(like, packed=room(like.packed), scales=room(like.scales), offsets=offsets)


def put_rows(whole: Weight, start: int, part: Weight) -> None:
    """Sets the rows from `start` on: of a matrix that is packed piece by piece, or of q, k and v, in one product.

    Raises ValueError where forms, widths, groups or types of scales differ.
    """
    if _form(whole) != _form(part):
        raise ValueError("only weights of one form, width, group and type of scale can be one")
    for (_, target), (_, source) in zip(_tensors(whole), _tensors(part), strict=True):
        target[start : start + source.shape[0]].copy_(source)


def _form(weight: Weight) -> tuple[object, ...]:
    """What rows of one weight have in common."""
    same = (getattr(weight, name, None) for name in ("width", "group"))
    return type(weight), *same, *((name, tensor.shape[1:], tensor.dtype) for name, tensor in _tensors(weight))


def _tensors(weight: Weight) -> list[tuple[str, torch.Tensor]]:
    found = ((field.name, getattr(weight, field.name)) for field in fields(weight))
    return [(name, value) for name, value in found if isinstance(value, torch.Tensor)]
