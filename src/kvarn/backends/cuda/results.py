"""What a step leaves on the card, as arrays on the host for those who ask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray


class StepResults(Mapping[str, NDArray[np.float32]]):
    """Buffers by name, each copied to the host when it is first looked at, which must be before the next step.

    Hidden states of all tokens are asked for at load, for the few who read them: copying them in every step would take
    longer than the step.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """tensors: on the device, of any float type."""
        self._tensors = tensors
        self._arrays: dict[str, NDArray[np.float32]] = {}

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        """float32 (rows, width). Raises KeyError."""
        if name not in self._arrays:
            self._arrays[name] = self._tensors[name].to("cpu", torch.float32, copy=True).numpy()
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
