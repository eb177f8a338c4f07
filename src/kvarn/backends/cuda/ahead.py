"""`StepsOnCard`: steps whose tokens are chosen on the card and read by the next step there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from kvarn.backends.base import InputBatch
from kvarn.backends.cuda.graphs import StepGraphs
from kvarn.backends.cuda.kernels.sampling import adjust, feed, sample
from kvarn.backends.row_rules import RowRules

UNDER_WAY = 2
"""Steps that may be submitted and not collected."""


class StepsOnCard:
    """Queues steps, with the choice of their tokens, on the current stream. See `kvarn.backends.ahead`.

    Tokens of the last two steps stay on the card. Nothing waits for the card but `collect`, for the event after the
    copy of its tokens, and `submit`, for the copy of the arrays of the step before the last.
    """

    def __init__(
        self, graphs: StepGraphs, check: Callable[[InputBatch], None], max_num_outputs: int, device: torch.device
    ) -> None:
        """check: raises ValueError for a batch that must not run."""
        self._graphs = graphs
        self._check = check
        self._device = device
        self._on_card = device.type == "cuda"
        self._ids = [torch.zeros(max_num_outputs, dtype=torch.int32, device=device) for _ in range(UNDER_WAY)]
        self._read = [torch.zeros(max_num_outputs, dtype=torch.int32, pin_memory=self._on_card) for _ in self._ids]
        self._events = [torch.cuda.Event() if self._on_card else None for _ in self._ids]  # type: ignore[no-untyped-call]
        self._no_masks = torch.zeros((1, 1), dtype=torch.int32, device=device)
        self._begun: deque[tuple[int, int]] = deque()
        """Place and number of the tokens of each step that was not collected."""
        self._last = 0

    def submit(self, batch: InputBatch, rules: RowRules, previous: NDArray[np.int32]) -> None:
        """See `AheadExecutable.submit`."""
        if len(self._begun) >= UNDER_WAY:
            raise ValueError(f"{UNDER_WAY} steps are under way; collect one first")
        self._check(batch)
        place, count = (self._last + 1) % UNDER_WAY, int(batch.output_rows.size)
        ids = self._ids[place][:count]
        with torch.inference_mode():
            laid_out = self._graphs.lay_out(batch)
            if (previous >= 0).any():
                feed(laid_out.step.token_ids, self._taken(previous[:, None]), self._ids[self._last])
            logits = self._graphs.run(laid_out)
            rows = self._taken(rules.rows)
            if rules.edits.size or (rules.rows["pending"] >= 0).any():
                adjust(logits, rows, self._taken(rules.edits), self._ids[self._last])
            masks = self._taken(rules.masks) if len(rules.masks) > 1 else self._no_masks
            sample(logits, rows, masks, ids)
            self._read[place][:count].copy_(ids, non_blocking=True)
        event = self._events[place]
        if event is not None:
            event.record()
        self._last = place
        self._begun.append((place, count))

    def collect(self) -> NDArray[np.int32]:
        """See `AheadExecutable.collect`."""
        place, count = self._begun.popleft()
        event = self._events[place]
        if event is not None:
            event.synchronize()
        ids: NDArray[np.int32] = self._read[place][:count].numpy().copy()
        return ids

    def discard(self) -> None:
        """See `AheadExecutable.discard`."""
        while self._begun:
            try:
                self.collect()
            except RuntimeError:  # of a kernel: whoever runs the next one will hear of it
                continue

    def _taken(self, array: NDArray[np.generic]) -> torch.Tensor:
        """The 32-bit words of each row, or record, on the card."""
        width = array.itemsize // 4 if array.ndim == 1 else array.shape[1]
        words = torch.from_numpy(np.ascontiguousarray(array).view(np.int32).reshape(len(array), width))
        # Pinned memory is kept from others until the copy is done.
        return words.pin_memory().to(self._device, non_blocking=True) if self._on_card else words.clone()
