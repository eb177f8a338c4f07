"""`StepsOnCard`: steps whose tokens are chosen on the card and read by the next step there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from kvarn.backends.base import InputBatch
from kvarn.backends.cuda.choosing import TokenChooser
from kvarn.backends.cuda.graphs import StepGraphs
from kvarn.backends.cuda.kernels.sampling import feed
from kvarn.backends.cuda.sampling_layout import UNDER_WAY, SamplingLayout
from kvarn.backends.row_rules import RowRules


class StepsOnCard:
    """Queues steps, with the choice of their tokens, on the current stream. See `kvarn.backends.ahead`.

    Tokens of the last two steps stay on the card. Nothing waits for the card but `collect`, for the event after the
    copy of its tokens, and `submit`, for the copy of the arrays of the step before the last.
    """

    def __init__(
        self, graphs: StepGraphs, check: Callable[[InputBatch], None], layout: SamplingLayout, device: torch.device
    ) -> None:
        """check: raises ValueError for a batch that must not run. layout: of the largest step."""
        self._graphs = graphs
        self._check = check
        on_card = device.type == "cuda"
        self.chooser = TokenChooser(layout, device)
        self._read = [torch.zeros(layout.rows, dtype=torch.int32, pin_memory=on_card) for _ in range(UNDER_WAY)]
        self._events = [torch.cuda.Event() if on_card else None for _ in range(UNDER_WAY)]  # type: ignore[no-untyped-call]
        self._begun: deque[tuple[int, int]] = deque()
        """Place and number of the tokens of each step that was not collected."""
        self._last = 0

    def submit(self, batch: InputBatch, rules: RowRules, previous: NDArray[np.int32]) -> None:
        """See `AheadExecutable.submit`."""
        if len(self._begun) >= UNDER_WAY:
            raise ValueError(f"{UNDER_WAY} steps are under way; collect one first")
        self._check(batch)
        place, count = (self._last + 1) % UNDER_WAY, int(batch.output_rows.size)
        before, ids = self.chooser.tokens[self._last], self.chooser.tokens[place][:count]
        with torch.inference_mode():
            laid_out = self._graphs.lay_out(batch)
            if (previous >= 0).any():
                feed(laid_out.step.token_ids, self.chooser.taken("previous", previous[:, None]), before)
            logits = self._graphs.run(laid_out)
            self.chooser.choose(logits, rules, before, ids)
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
