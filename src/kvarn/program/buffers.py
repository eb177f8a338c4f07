"""What ops read and write: activations with a symbolic row count, weights by name, and the KV cache's layers."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kvarn.kv_types import KvType


class Rows(enum.Enum):
    """The symbolic first dimension of a buffer; a step binds it."""

    TOKENS = "T"
    """All tokens of the step, sequence after sequence."""
    OUTPUTS = "R"
    """Only the rows whose logits the step needs (`InputBatch.output_rows`)."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """An activation: float32 (rows, width) in the reference; a back-end may hold it otherwise, or not at all."""

    name: str
    rows: Rows
    width: int


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter the program reads. Matrices of linears are (out, in), tables (entries, width), vectors (n,)."""

    name: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Number of parameters."""
        n = 1
        for extent in self.shape:
            n *= extent
        return n


@dataclass(frozen=True, slots=True)
class KvLayer:
    """What one attention layer keeps for each token: `heads` keys of `key_dim` and values of `value_dim`.

    window: the layer attends to the last `window` positions only (the current one included); None: to all.
    An MLA layer will be heads=1 with key_dim the latent's width and value_dim 0.
    """

    heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    def bytes_per_token(self, kv: KvType) -> int:
        """Bytes that one token takes in this layer's cache."""
        return self.heads * kv.vector_bytes(self.key_dim, self.value_dim)
