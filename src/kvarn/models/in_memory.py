"""A model whose weights are arrays in memory: made, not read from files."""

from __future__ import annotations

from dataclasses import dataclass

from kvarn.models.config import ModelConfig
from kvarn.program import Program
from kvarn.tensors import Tensor


@dataclass(frozen=True)
class InMemoryModel:
    """Sizes, program and weights. It is its own `TensorSource`."""

    config: ModelConfig
    program: Program
    tensors: dict[str, Tensor]

    @property
    def weights(self) -> InMemoryModel:
        """The model as a source of its tensors (what `Model.weights` is for files)."""
        return self

    def tensor(self, name: str) -> Tensor:
        """The weight of that name."""
        return self.tensors[name]

    def release(self) -> None:
        """Nothing to let go: the weights are in memory."""
