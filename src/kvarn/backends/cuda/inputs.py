"""The arrays of a step on the card: packed on the host, taken there in one copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from kvarn.backends.base import InputBatch
from kvarn.backends.cuda.step_layout import StepLayout

HOST_BUFFERS = 2
"""Steps whose copies may be under way at a time."""
PADDING = {"slot_mapping": -1, "block_tables": -1, "tree_parents": -1}
"""What fills up arrays that are laid out for more than the batch has; all others are filled with zeros."""


@dataclass(frozen=True, slots=True, eq=False)
class StepTensors:
    """A step's arrays on the device: T tokens of S sequences, R rows with logits; see `InputBatch` for what they mean.

    Where a step is laid out for more tokens, sequences or outputs than it has, those beyond have the slot -1, which
    nothing is written to, the length 0 and no rows; `output_rows` beyond point to row 0.
    """

    token_ids: torch.Tensor
    """int32[T]."""
    positions: torch.Tensor
    """int32[T]."""
    slot_mapping: torch.Tensor
    """int64[T, G]."""
    query_start: torch.Tensor
    """int32[S+1]."""
    seq_lens: torch.Tensor
    """int32[S]."""
    block_tables: torch.Tensor
    """int32[S, G, B]; -1, and whatever lies before a window, is not looked at."""
    output_rows: torch.Tensor
    """int32[R]."""
    max_query: int
    """Most rows of a sequence, known on the host: sizes of grids depend on it."""
    max_context: int
    """Most tokens of a sequence after the step."""
    tree_parents: torch.Tensor | None = None
    """int32[T], None where no sequence has a tree of drafts."""
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """float32[T, width] of each buffer that the caller gives."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.token_ids.shape[0]

    @property
    def num_outputs(self) -> int:
        """R."""
        return self.output_rows.shape[0]


class StepBuffers:
    """Owns memory for a step's arrays, on the device and, to copy from, on the host (pinned where there is a card).

    What `fill` returns is views of it, valid until the next `fill`.
    """

    def __init__(self, largest: StepLayout, inputs: Mapping[str, int], device: torch.device) -> None:
        """inputs: widths of the rows that the caller gives, by name."""
        pinned = device.type == "cuda"
        self._largest = largest
        self._device = torch.zeros(largest.nbytes, dtype=torch.uint8, device=device)
        self._hosts = [
            torch.zeros(largest.nbytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(HOST_BUFFERS)
        ]
        self._copied = [_event() if pinned else None for _ in range(HOST_BUFFERS)]
        self._turn = 0
        rows = torch.zeros(largest.tokens * sum(inputs.values()), dtype=torch.float32, device=device)
        sizes = [largest.tokens * width for width in inputs.values()]
        parts = torch.split(rows, sizes) if sizes else ()
        self._inputs = {
            name: part.view(largest.tokens, width) for (name, width), part in zip(inputs.items(), parts, strict=True)
        }

    @property
    def nbytes(self) -> int:
        """On the device."""
        return self._device.numel() + sum(rows.numel() * 4 for rows in self._inputs.values())

    def fill(self, batch: InputBatch, layout: StepLayout | None = None) -> StepTensors:
        """Copies a checked batch to the device. layout: what it is laid out for; None: for itself."""
        layout = StepLayout.of(batch, self._largest) if layout is None else layout
        self._turn = (self._turn + 1) % HOST_BUFFERS
        host, copied = self._hosts[self._turn], self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        _pack(batch, layout, host.numpy())
        size = layout.nbytes
        self._device[:size].copy_(host[:size], non_blocking=True)
        if copied is not None:
            copied.record()
        for name, rows in batch.inputs.items():
            self._inputs[name][: len(rows)].copy_(torch.from_numpy(np.ascontiguousarray(rows)))
        max_query, max_context = np.diff(batch.query_start).max(initial=0), batch.seq_lens.max(initial=0)
        return self.views(layout, int(max_query), int(max_context))

    def views(self, layout: StepLayout, max_query: int, max_context: int) -> StepTensors:
        """The arrays as they lie there now. max_query, max_context: see `StepTensors`."""
        arrays: dict[str, torch.Tensor] = {}
        for name, shape, size, offset in layout.offsets():
            count = int(np.prod(shape)) * size
            dtype = torch.int64 if size == 8 else torch.int32
            arrays[name] = self._device[offset : offset + count].view(dtype).view(shape)
        inputs = {name: rows[: layout.tokens] for name, rows in self._inputs.items()}
        return StepTensors(**arrays, max_query=max_query, max_context=max_context, inputs=inputs)


def sendable(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor from which a copy to the device need not be waited for: in pinned memory, which torch keeps from
    others until copies that were queued from it are done. Without a card it is the tensor itself."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.numel() else tensor


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _pack(batch: InputBatch, layout: StepLayout, host: np.ndarray) -> None:
    for name, shape, size, offset in layout.offsets():
        values = getattr(batch, name)
        flat = host[offset : offset + int(np.prod(shape)) * size].view(np.int64 if size == 8 else np.int32)
        array = flat.reshape(shape)
        if values is not None and values.shape == shape:
            array[...] = values
            continue
        array[...] = PADDING.get(name, 0) if name != "query_start" else batch.num_tokens
        if values is not None:  # a table may be wider than any sequence needs it
            part = tuple(slice(0, min(extents)) for extents in zip(values.shape, shape, strict=True))
            array[part] = values[part]
