"""`RowRules`: how a back-end that samples by itself chooses a token from each row of a step's logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROW = np.dtype(
    [
        ("temperature", "<f4"),
        ("top_p", "<f4"),
        ("min_p", "<f4"),
        ("top_k", "<i4"),
        ("seed", "<u8"),
        ("position", "<i8"),
        ("stream", "<u4"),
        ("mask", "<i4"),
    ]
)
"""One row of logits, `WORDS` words of 32 bits. temperature: 0: greedy. top_k: at most 0: off. seed, stream, position:
key and counter of the random number. mask: the row of `RowRules.masks`."""
WORDS = ROW.itemsize // 4
BIAS = np.dtype([("row", "<i4"), ("token", "<i4"), ("bias", "<f4")])
"""What is added to one logit."""
NOTHING_LEFT, NOT_FINITE = -1, -2
"""In place of a token id: the rules leave none; the logits hold NaN or infinity."""


@dataclass(frozen=True, slots=True, eq=False)
class RowRules:
    """The rules of R rows, in `SamplingParams`' order: biases, masks, temperature, min_p, top_k, top_p.

    rows: `ROW`[R]. masks: uint32[M, ceil(vocab / 32)], bit i of word w set: token 32 w + i is allowed; the first, which
    is always there, allows all. biases: `BIAS`[B], no token of a row twice.

    There are no penalties, nor whatever else depends on what a sequence has said: a row's rules are known before the
    token is that it follows.
    """

    rows: NDArray[np.void]
    masks: NDArray[np.uint32]
    biases: NDArray[np.void]
