"""The activations of an executable: one allocation, in which places have fixed offsets."""

from __future__ import annotations

import torch

from kvarn.backends.cuda.launches import View
from kvarn.backends.cuda.memory import Layout
from kvarn.program import Rows

MOST_KEPT = 32
"""Sizes of steps whose views are kept: making the views of a large model takes a millisecond."""


class Frame:
    """Owns the memory. Views are of the rows that the current step has (`begin`); addresses never change."""

    def __init__(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        self._arena = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
        self._offsets = layout.offsets
        self._dtype = dtype
        self._rows = {Rows.TOKENS: 0, Rows.OUTPUTS: 0}
        self._views: dict[View, torch.Tensor] = {}
        self._kept: dict[tuple[int, int], dict[View, torch.Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Of the memory."""
        return self._arena.numel()

    def begin(self, tokens: int, outputs: int) -> None:
        """Says how many rows the views of the next step have."""
        self._rows = {Rows.TOKENS: tokens, Rows.OUTPUTS: outputs}
        if len(self._kept) >= MOST_KEPT and (tokens, outputs) not in self._kept:
            self._kept.clear()
        self._views = self._kept.setdefault((tokens, outputs), {})

    def at(self, view: View) -> torch.Tensor:
        """(rows, width) of the step, of which rows lie as far apart as the place is wide."""
        found = self._views.get(view)
        if found is None:
            place = view.place
            dtype = torch.float32 if place.float32 else self._dtype
            rows, offset = self._rows[place.rows], self._offsets[place]
            size = rows * place.width * dtype.itemsize
            whole = self._arena[offset : offset + size].view(dtype).view(rows, place.width)
            found = whole[:, view.start : view.start + view.width]
            self._views[view] = found
        return found
