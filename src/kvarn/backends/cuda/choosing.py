"""`TokenChooser`: tokens from a step's logits by the rules of their rows, chosen on the card."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvarn.backends.cuda import parts
from kvarn.backends.cuda.inputs import sendable
from kvarn.backends.cuda.kernels.sampling import Survey, adjust, sample
from kvarn.backends.cuda.sampling_layout import UNDER_WAY, SamplingLayout
from kvarn.backends.row_rules import RowRules

_FLOATS = {"sums": torch.float64, "tops": torch.float32}


class TokenChooser:
    """Owns the tokens of the last steps on the card, and all that choosing them needs there beside the logits."""

    def __init__(self, layout: SamplingLayout, device: torch.device) -> None:
        self._layout = layout
        self._device = device
        self._memory = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
        self._arrays = {
            name: self._memory[offset : offset + int(np.prod(shape)) * size]
            .view(_FLOATS.get(name, torch.int32))
            .view(shape)
            for name, shape, size, offset in parts.offsets(layout.arrays())
        }
        self.tokens = tuple(self._arrays["ids"][place] for place in range(UNDER_WAY))
        """int32, of each step that may be under way."""

    @property
    def nbytes(self) -> int:
        """On the card."""
        return self._memory.numel()

    def choose(self, logits: torch.Tensor, rules: RowRules, before: torch.Tensor, out: torch.Tensor) -> None:
        """Queues the choice of a token from each row of logits, which are changed. before: the tokens of the step
        before, int32; out: int32[R], written. See `kernels.sampling`."""
        adjusted = rules.edits.size or (rules.rows["pending"] >= 0).any()
        spans = list(rows_at_once(rules.rows["num_edits"], self._layout.edits)) if adjusted else []
        rows = self.taken("rows", _within_spans(rules.rows, spans))
        for begin, end, edits in spans:
            adjust(logits[begin:end], rows[begin:end], self.taken("edits", rules.edits[edits]), before)
        masks = self.taken("masks", rules.masks) if len(rules.masks) > 1 else self._arrays["masks"][:1]
        tops, best, sums = (self._arrays[name][: len(rows)] for name in ("tops", "best", "sums"))
        sample(logits, rows, masks, out, survey=Survey(tops, best, sums))

    def taken(self, name: str, array: NDArray[np.generic]) -> torch.Tensor:
        """The 32-bit words of each row, or record, on the card, until others of that name are taken there."""
        width = array.itemsize // 4 if array.ndim == 1 else array.shape[1]
        words = torch.from_numpy(np.ascontiguousarray(array).view(np.int32).reshape(len(array), width))
        return self._arrays[name][: len(array)].copy_(sendable(words, self._device), non_blocking=True)


def rows_at_once(num_edits: NDArray[np.int32], room: int) -> Iterator[tuple[int, int, slice]]:
    """Spans of rows, begin and end, whose edits are at most `room` together, and which edits these are.

    num_edits: of each row, none more than `room`. Edits lie in the order of the rows.
    """
    begin = start = stop = 0
    for row, count in enumerate(num_edits.tolist()):
        if stop + count - start > room:
            yield begin, row, slice(start, stop)
            begin, start = row, stop
        stop += count
    yield begin, len(num_edits), slice(start, stop)


def _within_spans(records: NDArray[np.void], spans: Sequence[tuple[int, int, slice]]) -> NDArray[np.void]:
    """The records with places of edits counted from the first of their span."""
    if len(spans) < 2:
        return records
    counted = records.copy()
    for begin, end, edits in spans:
        counted["first_edit"][begin:end] -= edits.start
    return counted
