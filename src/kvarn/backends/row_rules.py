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
        ("repetition", "<f4"),
        ("presence", "<f4"),
        ("frequency", "<f4"),
        ("first_edit", "<i4"),
        ("num_edits", "<i4"),
        ("pending", "<i4"),
    ]
)
"""One row of logits, `WORDS` words of 32 bits. temperature: 0: greedy. top_k: at most 0: off. seed, stream, position:
key and counter of the random number. mask: the row of `RowRules.masks`. repetition, presence, frequency: penalties.
first_edit, num_edits: its part of `RowRules.edits`. pending: where among the tokens of the step before the one is that
the sequence said last, which its edits do not know of; -1: they know of all, or there are no penalties."""
WORDS = ROW.itemsize // 4
EDIT = np.dtype([("token", "<i4"), ("bias", "<f4"), ("seen", "<i4"), ("count", "<i4")])
"""What is known of one token. bias: added to its logit. seen: 1 where prompt or output have it, else 0. count: times
that the output has it."""
NOTHING_LEFT, NOT_FINITE = -1, -2
"""In place of a token id: the rules leave none; the logits hold NaN or infinity, or nothing but minus infinity."""


@dataclass(frozen=True, slots=True, eq=False)
class RowRules:
    """The rules of R rows, in `SamplingParams`' order: biases, masks, penalties, temperature, min_p, top_k, top_p.

    rows: `ROW`[R]. masks: uint32[M, ceil(vocab / 32)], bit i of word w set: token 32 w + i is allowed; the first, which
    is always there, allows all. edits: `EDIT`[E], no token of a row twice.
    """

    rows: NDArray[np.void]
    masks: NDArray[np.uint32]
    edits: NDArray[np.void]
