"""`ProgramBuilder`: emits ops one after another and keeps the books of buffers and weights."""

from __future__ import annotations

from typing import Literal

from kvarn.program import (
    Activation,
    Add,
    Attention,
    Buffer,
    Embed,
    GatedActivation,
    KvLayer,
    KvWrite,
    Linear,
    Logits,
    Norm,
    Op,
    PositionEmbed,
    Program,
    Rope,
    RopeTable,
    Rows,
    SelectRows,
    Weight,
)

Function = Literal["silu", "gelu", "gelu_tanh", "relu"]


class ProgramBuilder:
    """Collects ops. Buffers are reused by name from layer to layer, so a step needs the widest layer's only."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, max_positions: int) -> None:
        self.name = name
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.max_positions = max_positions
        self._ops: list[Op] = []
        self._buffers: dict[str, Buffer] = {}
        self._weights: dict[str, Weight] = {}
        self._kv_layers: list[KvLayer] = []

    def _buffer(self, name: str, width: int, rows: Rows = Rows.TOKENS) -> str:
        known = self._buffers.setdefault(name, Buffer(name, rows, width))
        if known.width != width or known.rows is not rows:
            raise ValueError(f"buffer {name} is {known}, wanted width {width}")
        return name

    def _weight(self, name: str, *shape: int) -> str:
        known = self._weights.setdefault(name, Weight(name, shape))
        if known.shape != shape:
            raise ValueError(f"weight {name} is {known}, wanted {shape}")
        return name

    def width(self, buffer: str) -> int:
        """Width of a buffer."""
        return self._buffers[buffer].width

    def embed(self, out: str, scale: float = 1.0) -> None:
        """Token embedding."""
        weight = self._weight("embed.weight", self.vocab_size, self.hidden_size)
        self._ops.append(Embed(self._buffer(out, self.hidden_size), weight, scale))

    def position_embed(self, x: str) -> None:
        """Learned positions, in place."""
        weight = self._weight("position_embed.weight", self.max_positions, self.hidden_size)
        self._ops.append(PositionEmbed(x, x, weight))

    def rms_norm(self, out: str, x: str, name: str, eps: float, groups: int = 1) -> None:
        """RMS norm, of each of `groups` equal spans by itself."""
        width, rows = self.width(x), self._buffers[x].rows
        weight = self._weight(f"{name}.weight", width // groups)
        self._ops.append(Norm(self._buffer(out, width, rows), x, weight, None, eps, "rms", groups))

    def layer_norm(self, out: str, x: str, name: str, eps: float) -> None:
        """Layer norm with bias."""
        width, rows = self.width(x), self._buffers[x].rows
        weight, bias = self._weight(f"{name}.weight", width), self._weight(f"{name}.bias", width)
        self._ops.append(Norm(self._buffer(out, width, rows), x, weight, bias, eps, "layer"))

    def linear(self, out: str, x: str, name: str, width: int, bias: bool = False) -> None:
        """weight @ x (+ bias)."""
        weight = self._weight(f"{name}.weight", width, self.width(x))
        vector = self._weight(f"{name}.bias", width) if bias else None
        self._ops.append(Linear(self._buffer(out, width), x, weight, vector))

    def rope(self, x: str, heads: int, head_dim: int, table: RopeTable) -> None:
        """Rotation in place."""
        self._ops.append(Rope(x, x, heads, head_dim, table))

    def attention(
        self,
        out: str,
        q: str,
        k: str,
        v: str,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        """KV write and attention over a new cache layer."""
        layer = len(self._kv_layers)
        self._kv_layers.append(KvLayer(kv_heads, head_dim, head_dim, window))
        self._ops.append(KvWrite(layer, k, v))
        self._buffer(out, heads * head_dim)
        self._ops.append(Attention(layer, out, q, heads, kv_heads, head_dim, scale, window, softcap))

    def activation(self, x: str, function: Function) -> None:
        """Activation in place."""
        self._ops.append(Activation(x, x, function))

    def gated_activation(self, gate: str, up: str, function: Function) -> None:
        """function(gate) * up, into gate."""
        self._ops.append(GatedActivation(gate, gate, up, function))

    def add(self, x: str, y: str) -> None:
        """x += y."""
        self._ops.append(Add(x, x, y))

    def select_rows(self, out: str, x: str) -> None:
        """From token rows to output rows."""
        self._ops.append(SelectRows(self._buffer(out, self.width(x), Rows.OUTPUTS), x))

    def logits(self, x: str, *, tied: bool, softcap: float | None = None) -> None:
        """The LM head; `tied` reads the embedding table."""
        weight = self._weight("embed.weight" if tied else "lm_head.weight", self.vocab_size, self.width(x))
        out = self._buffer("logits", self.vocab_size, Rows.OUTPUTS)
        self._ops.append(Logits(out, x, weight, 1.0, softcap))

    def build(self) -> Program:
        """The program; its shape rules have been checked."""
        return Program(
            self.name,
            tuple(self._ops),
            tuple(self._buffers.values()),
            tuple(self._weights.values()),
            tuple(self._kv_layers),
            self.vocab_size,
            self.max_positions,
        )
