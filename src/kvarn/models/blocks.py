"""The blocks that decoder families are made of: attention and MLP, as ops. Weight names here are the program's own."""

from __future__ import annotations

from dataclasses import dataclass

from kvarn.models.builder import Function, ProgramBuilder
from kvarn.program import RopeTable


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """One layer's attention. qk_norm_eps: RMS norm of each query and key head (Qwen3, Gemma 3); None: none."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: RopeTable | None = None
    window: int | None = None
    softcap: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm_eps: float | None = None


def attention(b: ProgramBuilder, layer: int, x: str, spec: AttentionSpec) -> str:
    """Self-attention over the normed buffer `x`; returns the buffer of its output, before the residual."""
    name = f"layers.{layer}.attn"
    width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    b.linear("q", x, f"{name}.q", width, spec.qkv_bias)
    b.linear("k", x, f"{name}.k", kv_width, spec.qkv_bias)
    b.linear("v", x, f"{name}.v", kv_width, spec.qkv_bias)
    if spec.qk_norm_eps is not None:
        b.rms_norm("q", "q", f"{name}.q_norm", spec.qk_norm_eps, spec.heads)
        b.rms_norm("k", "k", f"{name}.k_norm", spec.qk_norm_eps, spec.kv_heads)
    if spec.rope is not None:
        b.rope("q", spec.heads, spec.head_dim, spec.rope)
        b.rope("k", spec.kv_heads, spec.head_dim, spec.rope)
    b.attention(
        "attn", "q", "k", "v",
        heads=spec.heads, kv_heads=spec.kv_heads, head_dim=spec.head_dim, scale=spec.scale, window=spec.window,
        softcap=spec.softcap,
    )  # fmt: skip
    b.linear("branch", "attn", f"{name}.o", b.hidden_size, spec.out_bias)
    return "branch"


def gated_mlp(b: ProgramBuilder, layer: int, x: str, width: int, function: Function, bias: bool = False) -> str:
    """down(function(gate(x)) * up(x)) (Shazeer 2020); returns the buffer of its output, before the residual."""
    name = f"layers.{layer}.mlp"
    b.linear("gate", x, f"{name}.gate", width, bias)
    b.linear("up", x, f"{name}.up", width, bias)
    b.gated_activation("gate", "up", function)
    b.linear("branch", "gate", f"{name}.down", b.hidden_size, bias)
    return "branch"


def plain_mlp(b: ProgramBuilder, layer: int, x: str, width: int, function: Function) -> str:
    """down(function(up(x))) with biases (Vaswani et al. 2017, eq. 2); returns the buffer of its output."""
    name = f"layers.{layer}.mlp"
    b.linear("up", x, f"{name}.up", width, bias=True)
    b.activation("up", function)
    b.linear("branch", "up", f"{name}.down", b.hidden_size, bias=True)
    return "branch"
