"""The op set. Each op names the buffers and weights it uses; its docstring is its definition.

Notation: T tokens in a step, x[t] a row of a buffer. All arithmetic is defined in real numbers; the reference
back-end fixes float32 rounding. Fields named `out` are written, all other buffer fields are read; `out` may equal an
input where the docstring says "in place".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Rotary frequencies of a model, fixed when the program is built (all scaling kinds end here).

    inv_freq: radians per position of each of the rotary_dim/2 pairs. style "halves" pairs element i with
    i + rotary_dim/2 (GPT-NeoX); "interleaved" pairs 2i with 2i+1 (the original RoFormer, Su et al. 2021, eq. 34).
    attention_factor multiplies sine and cosine (YaRN, Peng et al. 2023, section 3.4).
    """

    inv_freq: tuple[float, ...]
    style: Literal["halves", "interleaved"]
    attention_factor: float = 1.0

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that are rotated; the rest pass unchanged."""
        return 2 * len(self.inv_freq)


@dataclass(frozen=True, slots=True)
class Input:
    """out[t] = the rows that the caller gives (`InputBatch.inputs`). Before all other ops.

    For programs that go on from what another one computed: heads over hidden states.
    """

    out: str
    kind: ClassVar[str] = "input"


@dataclass(frozen=True, slots=True)
class Embed:
    """out[t] = scale * weight[token_ids[t]]."""

    out: str
    weight: str
    scale: float = 1.0
    kind: ClassVar[str] = "embed"


@dataclass(frozen=True, slots=True)
class PositionEmbed:
    """out[t] = x[t] + weight[positions[t]]; in place allowed. Learned positions (GPT-2)."""

    out: str
    x: str
    weight: str
    kind: ClassVar[str] = "position_embed"


@dataclass(frozen=True, slots=True)
class Norm:
    """Normalizes each of `groups` equal spans of the row by itself; in place allowed.

    "rms": out = x / sqrt(mean(x²) + eps) * weight (Zhang & Sennrich 2019). "layer": (x - mean) / sqrt(var + eps) *
    weight + bias (Ba et al. 2016). weight and bias have width/groups elements, shared by all groups (QK-norm).
    """

    out: str
    x: str
    weight: str
    bias: str | None
    eps: float
    norm: Literal["rms", "layer"]
    groups: int = 1
    kind: ClassVar[str] = "norm"


@dataclass(frozen=True, slots=True)
class Linear:
    """out[t] = weight @ x[t] (+ bias). weight: (out width, x width)."""

    out: str
    x: str
    weight: str
    bias: str | None = None
    kind: ClassVar[str] = "linear"


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotates each head of x[t] by positions[t] * table.inv_freq; in place allowed."""

    out: str
    x: str
    heads: int
    head_dim: int
    table: RopeTable
    kind: ClassVar[str] = "rope"


@dataclass(frozen=True, slots=True)
class KvWrite:
    """Stores k[t] and v[t] in layer `layer` of the cache at slot_mapping[t]."""

    layer: int
    k: str
    v: str
    kind: ClassVar[str] = "kv_write"


@dataclass(frozen=True, slots=True)
class Attention:
    """Causal attention of q over the cache's layer, for the sequence each row belongs to (Vaswani et al. 2017, eq. 1).

    Row at position p attends to positions max(0, p - window + 1) … p of its own sequence (all up to p without a
    window). Query head h reads KV head h // (heads / kv_heads). scores = scale * q·k, then
    softcap * tanh(scores / softcap) where softcap is set; out has heads * value_dim elements.
    """

    layer: int
    out: str
    q: str
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    kind: ClassVar[str] = "attention"


@dataclass(frozen=True, slots=True)
class Activation:
    """out = f(x), in place allowed. "silu": x·sigmoid(x); "gelu": exact (erf); "gelu_tanh": its tanh approximation
    (Hendrycks & Gimpel 2016); "relu"."""

    out: str
    x: str
    function: Literal["silu", "gelu", "gelu_tanh", "relu"]
    kind: ClassVar[str] = "activation"


@dataclass(frozen=True, slots=True)
class GatedActivation:
    """out = f(gate) * up (Shazeer 2020); functions as in `Activation`; in place allowed on either input."""

    out: str
    gate: str
    up: str
    function: Literal["silu", "gelu", "gelu_tanh", "relu"]
    kind: ClassVar[str] = "gated_activation"


@dataclass(frozen=True, slots=True)
class Add:
    """out = a + b; in place allowed on either."""

    out: str
    a: str
    b: str
    kind: ClassVar[str] = "add"


@dataclass(frozen=True, slots=True)
class SelectRows:
    """out[r] = x[output_rows[r]]: from here on only the rows whose logits are needed."""

    out: str
    x: str
    kind: ClassVar[str] = "select_rows"


@dataclass(frozen=True, slots=True)
class Logits:
    """out[r] = scale * (weight @ x[r]), then softcap * tanh(out / softcap) where softcap is set."""

    out: str
    x: str
    weight: str
    scale: float = 1.0
    softcap: float | None = None
    bias: str | None = None
    kind: ClassVar[str] = "logits"


Op = (
    Input
    | Embed
    | PositionEmbed
    | Norm
    | Linear
    | Rope
    | KvWrite
    | Attention
    | Activation
    | GatedActivation
    | Add
    | SelectRows
    | Logits
)
