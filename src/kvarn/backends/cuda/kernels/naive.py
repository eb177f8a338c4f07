"""Attention as it is written, in plain torch: all scores in memory. The oracle of the kernels, and what they are
measured against: its memory grows with the product of queries and keys.
"""

from __future__ import annotations

import torch

from kvarn.backends.cuda.inputs import StepTensors
from kvarn.backends.cuda.kernels.kv_write import LayerKv


def naive_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """softmax(scale q kᵀ) v over the visible keys (Vaswani et al. 2017, eq. 1), float32 throughout.

    q: (T, heads, key_dim), k: (N, kv_heads, key_dim), v: (N, kv_heads, value_dim), visible: bool (T, N), of which each
    row has one at least. Returns float32 (T, heads, value_dim). Query head h reads KV head h // (heads / kv_heads).
    """
    shared = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(shared, dim=1) for x in (k, v))
    scores = torch.einsum("thd,nhd->htn", q.float(), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
    return torch.einsum("htn,nhd->thd", weights, values)


def naive_paged_attention(
    q: torch.Tensor,
    kv: LayerKv,
    step: StepTensors,
    group: int,
    block_size: int,
    out: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """`naive_attention` of each sequence of a step over its blocks of a KV group, drafts of trees among them.

    q: (T, heads, key_dim), any stride between rows; out: (T, heads, value_dim). Reads sizes back from the device.
    """
    bounds, lengths = step.query_start.tolist(), step.seq_lens.tolist()
    for sequence, length in enumerate(lengths):
        begin, end = bounds[sequence : sequence + 2]
        if begin == end:
            continue
        first = 0 if window is None else max(0, length - (end - begin) - window + 1)
        places = torch.arange(first, length, device=q.device)
        blocks = step.block_tables[sequence, group].long()[places // block_size]
        keys, values = _read(kv, blocks * block_size + places % block_size)
        visible = _visible(step, begin, end, length, places, window)
        mixed = naive_attention(q[begin:end], keys, values, visible, scale=scale, softcap=softcap)
        out[begin:end] = mixed.to(out.dtype)


def _read(kv: LayerKv, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = kv.keys[slots].float(), kv.values[slots].float()
    if kv.key_scales is not None and kv.value_scales is not None:
        keys, values = keys * kv.key_scales[slots][..., None], values * kv.value_scales[slots][..., None]
    return keys, values


def _visible(
    step: StepTensors, begin: int, end: int, length: int, places: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Which of a sequence's keys, at `places`, its rows see: bool (rows, keys)."""
    positions = step.positions[begin:end, None].long()
    parents = [-1] * (end - begin) if step.tree_parents is None else step.tree_parents[begin:end].tolist()
    known = length - sum(parent >= 0 for parent in parents)
    seen = places[None, :] <= positions
    if window is not None:
        seen &= places[None, :] > positions - window
    seen &= places[None, :] < known
    for row in range(end - begin):
        at = row
        while parents[at] >= 0:  # a draft's key is at its place behind the known tokens, its position is another
            place = length - (end - begin) + at
            near = window is None or int(step.positions[begin + at]) > int(step.positions[begin + row]) - window
            seen[row, place - int(places[0])] = near
            at = parents[at] - begin
    return seen
