"""`Target`: what heads are measured by and begin from, of a model's program and weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvarn.errors import UnsupportedModelError
from kvarn.models import content_key
from kvarn.program import Attention, Embed, Logits, Norm, Program, Rope
from kvarn.tensors import TensorSource
from kvarn.tensors.dequantize import dequantize

ROWS_AT_ONCE = 4096
DEFAULT_THETA = 10_000.0
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Target:
    """A model as the training sees it. Reads weights when asked."""

    program: Program
    weights: TensorSource

    def __post_init__(self) -> None:
        self.norm, self.embed  # noqa: B018  (raise early)

    @property
    def key(self) -> str:
        """The model's `content_key`."""
        return content_key(self.program, self.weights)

    @property
    def logits(self) -> Logits:
        """The op of the LM head."""
        return next(op for op in self.program.ops if isinstance(op, Logits) and op.out == self.program.output)

    @property
    def norm(self) -> Norm:
        """The norm before it. Raises UnsupportedModelError where there is none."""
        made = [op for op in self.program.ops if isinstance(op, Norm) and op.out == self.logits.x]
        if not made or self.logits.bias is not None:
            raise UnsupportedModelError(f"{self.program.name}: heads need an LM head without bias after a norm")
        return made[-1]

    @property
    def embed(self) -> Embed:
        """The token embedding."""
        return next(op for op in self.program.ops if isinstance(op, Embed))

    @property
    def hidden_size(self) -> int:
        """Width of hidden states."""
        return self.program.buffer(self.logits.x).width

    def vector(self, name: str) -> Floats:
        """A whole weight."""
        return dequantize(self.weights.tensor(name))

    def rows(self, name: str, ids: Sequence[int] | NDArray[np.int32]) -> Floats:
        """Rows of a matrix, float32[len(ids), width]. Little more than those is in memory."""
        wanted = np.asarray(ids, np.int64)
        tensor = self.weights.tensor(name)
        out = np.empty((wanted.size, tensor.shape[1]), np.float32)
        for start in range(0, tensor.shape[0], ROWS_AT_ONCE):
            end = min(start + ROWS_AT_ONCE, tensor.shape[0])
            here = np.flatnonzero((wanted >= start) & (wanted < end))
            if here.size:
                out[here] = dequantize(tensor.row_slice(start, end))[wanted[here] - start]
        return out

    def normed(self, features: Floats) -> Floats:
        """The last norm of rows that the store has: what the LM head reads, in float32."""
        norm, weight = self.norm, self.vector(self.norm.weight)
        if norm.norm == "layer":
            features = features - features.mean(-1, keepdims=True)
        scales: Floats = np.sqrt(np.mean(np.square(features), -1, keepdims=True) + norm.eps)
        out: Floats = features / scales * weight
        return out if norm.bias is None else out + self.vector(norm.bias)


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """Of the target's last layer, which EAGLE's is like."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float


def layer_sizes(target: Target) -> LayerSizes:
    """Sizes of the last layer. Raises UnsupportedModelError where heads have an odd number of elements."""
    program = target.program
    attention = [op for op in program.ops if isinstance(op, Attention)][-1]
    wide = max((w.shape[0] for w in program.weights if ".mlp." in w.name and len(w.shape) == 2), default=0)
    ropes = [op for op in program.ops if isinstance(op, Rope)]
    theta = DEFAULT_THETA
    if ropes and len(ropes[-1].table.inv_freq) > 1:
        table = ropes[-1].table
        theta = float(max(table.inv_freq[1], 1e-9) ** (-len(table.inv_freq)))
    if attention.head_dim % 2:
        raise UnsupportedModelError(f"{program.name}: EAGLE's layer needs heads of an even size")
    return LayerSizes(attention.heads, attention.kv_heads, attention.head_dim, wide or 4 * target.hidden_size, theta)


NAMES = {
    "attn_norm.weight": "attn_norm.weight", "attn.q.weight": "attn.q.weight", "attn.k.weight": "attn.k.weight",
    "attn.v.weight": "attn.v.weight", "attn.o.weight": "attn.o.weight", "mlp_norm.weight": "mlp_norm.weight",
    "mlp.gate.weight": "mlp.gate.weight", "mlp.up.weight": "mlp.up.weight", "mlp.down.weight": "mlp.down.weight",
}  # fmt: skip


def last_layer_weights(target: Target) -> dict[str, Floats]:
    """The last layer's weights under the names that EAGLE's layer has, as far as it has such: where training begins.

    Queries and keys are turned to the order in which halves of heads are rotated, if they have another.
    """
    program = target.program
    layers = [int(w.name.split(".")[1]) for w in program.weights if w.name.startswith("layers.")]
    if not layers:
        return {}
    prefix = f"layers.{max(layers)}."
    present = {weight.name for weight in program.weights}
    found = {ours: target.vector(prefix + theirs) for ours, theirs in NAMES.items() if prefix + theirs in present}
    ropes = [op for op in program.ops if isinstance(op, Rope)]
    if ropes and ropes[-1].table.style == "interleaved":
        for name in {"attn.q.weight", "attn.k.weight"} & found.keys():
            rows, width = found[name].shape
            head_dim = ropes[-1].head_dim
            pairs = found[name].reshape(rows // head_dim, head_dim // 2, 2, width)
            found[name] = np.ascontiguousarray(pairs.transpose(0, 2, 1, 3)).reshape(rows, width)
    return found
