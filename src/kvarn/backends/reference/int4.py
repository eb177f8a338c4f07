"""Keys and values in 4 bits: the definition.

A vector is filled up with zeros to groups of 32 elements. A group has a float16 scale and a float16 minimum; an element
is a code from 0 to 15: scale * code + minimum. Values are stored so. Keys are prepared in two steps, since a few of
their channels are far from zero in every token and would coarsen the scale of their group:

- A Hadamard rotation spreads a large element over the vector (QuaRot, Ashkboos et al. 2024, section 4). Queries are
  rotated alike, so that dot products stay what they were.
- Stored is the difference from the reference of 16 tokens, which is the first one's key in float16: what all tokens
  have in common is in the reference. (KIVI, Liu et al. 2024, section 3, has the same aim with scales by channel, which
  a cache that is written token by token cannot have.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvarn.kv_types import INT4_GROUP as GROUP

Floats = NDArray[np.float32]

LARGEST = np.float32(np.finfo(np.float16).max)
MOST_ROTATED = 256


def rotate(x: Floats, *, query: bool = False) -> Floats:
    """The last axis, a multiple of 32, by Hadamard matrices: of the largest power of two up to 256 that fits, then of
    what fits the rest.

    log2(n) times, the sums of neighbours go before their differences. Half of these halve the keys, the others the
    queries: factors of two round nothing, and dot products of rotated keys and queries are those of the given ones.
    """
    parts, start = [], 0
    while start < x.shape[-1]:
        stages = min(MOST_ROTATED, x.shape[-1] - start).bit_length() - 1
        part = x[..., start : start + 2**stages]
        for _ in range(stages):
            even, odd = part[..., 0::2], part[..., 1::2]
            part = np.concatenate([even + odd, even - odd], axis=-1)
        parts.append(part * np.float32(0.5 ** (stages - stages // 2 if query else stages // 2)))
        start += 2**stages
    return np.concatenate(parts, axis=-1)


def filled(x: Floats) -> Floats:
    """The last axis filled up with zeros to groups; what float16 cannot hold becomes the largest that it can."""
    missing = -x.shape[-1] % GROUP
    return np.pad(_bounded(x), [(0, 0)] * (x.ndim - 1) + [(0, missing)])


def as_half(x: Floats) -> Floats:
    """x as float16 gives it back."""
    return _bounded(x).astype(np.float16).astype(np.float32)


def as_codes(x: Floats) -> Floats:
    """Whole groups (the last axis) as scales, minima and codes give them back."""
    groups = _bounded(x).reshape(*x.shape[:-1], -1, GROUP)
    least = as_half(groups.min(axis=-1, keepdims=True))
    scale = as_half((groups.max(axis=-1, keepdims=True) - least) / np.float32(15))
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    codes = np.rint(np.clip((groups - least) * inverse, 0, 15))
    restored: Floats = (codes * scale + least).reshape(x.shape)
    return restored


def _bounded(x: Floats) -> Floats:
    return np.clip(x, -LARGEST, LARGEST)
