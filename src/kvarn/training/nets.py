"""Medusa and EAGLE heads in torch, as `kvarn.spec` runs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from kvarn.spec.heads import HeadsShape, tensor_shapes
from kvarn.training.target import Target, last_layer_weights

Params = Mapping[str, NDArray[np.floating]]


class Net(Protocol):
    """Heads of one kind. Parameters go by the names that they have in a file of heads."""

    def guess(self, features: Tensor, tokens: Tensor, length: int, ahead: int) -> list[Tensor]:
        """Logits [S, length, draft_vocab] of each guess. features, tokens: as `Batch` has them, features normed by the
        target's last norm for Medusa and as they are for EAGLE."""
        ...


def beginning(kind: str, shape: HeadsShape, target: Target, ids: NDArray[np.int32], seed: int) -> dict[str, Tensor]:
    """Parameters before the first step: what the target has for the purpose, else small random numbers."""
    made = torch.Generator().manual_seed(seed)
    params: dict[str, Tensor] = {}
    known: dict[str, NDArray[np.float32]] = {} if kind == "medusa" else last_layer_weights(target)
    lm_head = target.rows(target.logits.weight, ids)
    hidden = shape.hidden_size
    for name, extents in tensor_shapes(kind, shape).items():
        if name.endswith("lm_head.weight"):
            value = torch.from_numpy(lm_head.copy())
        elif name in known and known[name].shape == extents:
            value = torch.from_numpy(np.array(known[name], np.float32))
        elif name == "norm.weight":
            value = torch.from_numpy(target.vector(target.norm.weight).copy())
        elif name in ("feature.weight", "token.weight"):
            value = torch.eye(hidden)
        elif len(extents) == 1 or "block" in name:
            value = torch.full(extents, 1.0 if name.endswith("norm.weight") else 0.0)
        else:
            value = torch.randn(extents, generator=made) * extents[1] ** -0.5
        params[name] = value
    return params


class MedusaNet:
    """Guess k at anchor i from the hidden state there alone."""

    def __init__(self, shape: HeadsShape, params: Mapping[str, Tensor]) -> None:
        self._heads = shape.num_heads
        self._params = params

    def guess(self, features: Tensor, tokens: Tensor, length: int, ahead: int) -> list[Tensor]:
        """See `Net`."""
        del tokens
        p, hidden = self._params, features[:, :length]
        found = []
        for k in range(min(self._heads, ahead)):
            block = F.linear(hidden, p[f"heads.{k}.block.weight"], p[f"heads.{k}.block.bias"])
            found.append(F.linear(hidden + F.silu(block), p[f"heads.{k}.lm_head.weight"]))
        return found


class EagleNet:
    """One decoder layer over token and feature; each guess goes on from the feature that the one before it made.

    Guess 0 at anchor i reads the true feature of i and token i + 1. Guess k reads what guess k - 1 made at the same
    anchor, and token i + 1 + k; it sees the true keys up to i and its own forerunners', as when it runs: "training-time
    test" (Li et al. 2025, EAGLE-3, section 3.1).
    """

    def __init__(self, shape: HeadsShape, params: Mapping[str, Tensor], embedding: Tensor) -> None:
        """embedding: the target's, [vocab, hidden], in any float type; not trained."""
        self._shape = shape
        self._params = params
        self._embedding = embedding

    def guess(self, features: Tensor, tokens: Tensor, length: int, ahead: int) -> list[Tensor]:
        """See `Net`."""
        p, eps = self._params, self._shape.norm_eps
        found: list[Tensor] = []
        keys: list[Tensor] = []
        values: list[Tensor] = []
        x = features[:, :length]
        for k in range(ahead):
            said = self._embedding[tokens[:, 1 + k : 1 + k + length]].float()
            x = F.linear(_norm(said, p["token_norm.weight"], eps), p["token.weight"]) + F.linear(
                _norm(x, p["feature_norm.weight"], eps), p["feature.weight"]
            )
            x = x + self._attention(_norm(x, p["attn_norm.weight"], eps), k, keys, values)
            h = _norm(x, p["mlp_norm.weight"], eps)
            gate = F.silu(F.linear(h, p["mlp.gate.weight"])) * F.linear(h, p["mlp.up.weight"])
            x = x + F.linear(gate, p["mlp.down.weight"])
            found.append(F.linear(_norm(x, p["norm.weight"], eps), p["lm_head.weight"]))
        return found

    def _attention(self, h: Tensor, k: int, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """Of guess k at each anchor i, at position i + k. Appends its keys and values."""
        shape, p = self._shape, self._params
        batch, length, _ = h.shape
        positions = torch.arange(length) + k
        q = _rotated(_heads(F.linear(h, p["attn.q.weight"]), shape.num_heads), positions, shape.rope_theta)
        keys.append(_rotated(_heads(F.linear(h, p["attn.k.weight"]), shape.num_kv_heads), positions, shape.rope_theta))
        values.append(_heads(F.linear(h, p["attn.v.weight"]), shape.num_kv_heads))
        group = shape.num_heads // shape.num_kv_heads
        spread_k = [key.repeat_interleave(group, 1) for key in keys]
        spread_v = [value.repeat_interleave(group, 1) for value in values]
        scores = q @ spread_k[0].transpose(2, 3)
        anchors = torch.arange(length)
        behind = anchors[:, None] - anchors[None, :]
        seen = (behind >= 0) & (behind + k < shape.window)
        parts = [scores.masked_fill(~seen, -torch.inf)]
        parts += [(q * key).sum(-1, keepdim=True) for key in spread_k[1:]]
        weights = (torch.cat(parts, -1) * shape.head_dim**-0.5).softmax(-1)
        out = weights[..., :length] @ spread_v[0]
        for r, value in enumerate(spread_v[1:]):
            out = out + weights[..., length + r : length + r + 1] * value
        return F.linear(out.transpose(1, 2).reshape(batch, length, -1), p["attn.o.weight"])


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _heads(x: Tensor, heads: int) -> Tensor:
    """[S, L, heads * dim] to [S, heads, L, dim]."""
    return x.reshape(*x.shape[:-1], heads, -1).transpose(1, 2)


def _rotated(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary positions, halves of heads as pairs (Su et al. 2021)."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-torch.arange(half) / half)[None, :]
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def make_net(kind: str, shape: HeadsShape, params: Mapping[str, Tensor], target: Target) -> Net:
    """The heads over some parameters, of which it makes no copy."""
    if kind == "medusa":
        return MedusaNet(shape, params)
    vocabulary = np.arange(shape.vocab_size, dtype=np.int32)
    embedding = torch.from_numpy(target.rows(target.embed.weight, vocabulary).astype(np.float16))
    return EagleNet(shape, params, embedding)


def trained(params: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The same values as parameters to train."""
    return {name: nn.Parameter(value.clone()) for name, value in params.items()}
