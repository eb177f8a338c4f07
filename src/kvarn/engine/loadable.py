"""What engines are built from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from kvarn.models import ModelConfig
from kvarn.program import Program
from kvarn.tensors import DType, TensorSource


class LoadableModel(Protocol):
    """What an engine is built from: `kvarn.models.Model`, or a model that a test made in memory."""

    @property
    def config(self) -> ModelConfig:
        """Sizes and ids."""
        ...

    @property
    def program(self) -> Program:
        """What runs."""
        ...

    @property
    def weights(self) -> TensorSource:
        """Where its weights come from."""
        ...


def stored_types(program: Program, weights: TensorSource) -> Mapping[str, DType]:
    """How each of the program's weights is stored."""
    return {weight.name: weights.tensor(weight.name).dtype for weight in program.weights}
