"""A step's attention over a paged cache of random keys and values, its blocks anywhere, as after hours of serving."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gpu_parts.shapes import Heads
from kvarn.backends.cuda.kernels.attention import AttentionWorkspace, attention
from kvarn.backends.cuda.kernels.attention_plan import AttentionPlan
from kvarn.backends.cuda.kernels.kv_write import LayerKv

BLOCK_SIZE = 16
FILLED_AT_ONCE = 1 << 26
INT8_MOST = 127.0


@dataclass(frozen=True, slots=True)
class PagedStep:
    """Rows of some sequences and the cache that they read: one layer's."""

    heads: Heads
    q: torch.Tensor
    """[T, query heads, dim]."""
    out: torch.Tensor
    kv: LayerKv
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    tables: torch.Tensor
    """int32[S, blocks]."""
    plan: AttentionPlan
    workspace: AttentionWorkspace

    def run(self) -> torch.Tensor:
        """Launches kvarn's kernels; the result is valid until the next call."""
        return self._run(self.out, self.workspace)

    def run_allocating(self) -> torch.Tensor:
        """The same with memory of its own, as those have to whom a result is returned."""
        longest = int(self.seq_lens.max())
        return self._run(torch.empty_like(self.out), _workspace(self.plan, self.heads, longest, self.out.device))

    def _run(self, out: torch.Tensor, workspace: AttentionWorkspace) -> torch.Tensor:
        attention(
            self.q, self.kv, self.query_start, self.seq_lens, self.tables, self.plan, workspace,
            block_size=BLOCK_SIZE, scale=self.heads.dim**-0.5, out=out,
        )  # fmt: skip
        return out

    @property
    def cache_bytes(self) -> int:
        """Of the keys, values and scales that the step reads, each once."""
        tokens = int(self.seq_lens.sum())
        tensors = (self.kv.keys, self.kv.values, self.kv.key_scales, self.kv.value_scales)
        return sum(tokens * part[0].numel() * part.element_size() for part in tensors if part is not None)

    def gathered(self, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A sequence's keys and values in order of position, [tokens, KV heads, dim], of the queries' type."""
        length = int(self.seq_lens[sequence])
        places = torch.arange(length, device=self.q.device)
        slots = self.tables[sequence].long()[places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE
        both = ((self.kv.keys, self.kv.key_scales), (self.kv.values, self.kv.value_scales))
        keys, values = (
            (stored[slots].float() * (1.0 if scales is None else scales[slots][..., None])).to(self.q.dtype)
            for stored, scales in both
        )
        return keys, values

    def dense(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of the only sequence as others take them: (1, heads, N, dim), contiguous."""
        keys, values = self.gathered(0)
        q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (self.q, keys, values))
        return q, k, v

    def expected(self) -> torch.Tensor:
        """What one row for each sequence must give, [S, query heads, dim]: plain attention in float32."""
        rows = []
        for sequence in range(self.q.shape[0]):
            keys, values = (x.float() for x in self.gathered(sequence))
            q = self.q[sequence].float().view(self.heads.kv, -1, self.heads.dim)
            weights = torch.softmax(torch.einsum("hgd,nhd->hgn", q, keys) * self.heads.dim**-0.5, -1)
            rows.append(torch.einsum("hgn,nhd->hgd", weights, values).reshape(self.heads.query, -1))
        return torch.stack(rows)


def make_step(
    heads: Heads, dtype: str, kv_type: str, spans: tuple[tuple[int, int], ...], device: torch.device
) -> PagedStep:
    """spans: of each sequence the rows in the step and its tokens after it. kv_type: as in `kvarn.kv_types`."""
    counts, lengths = (np.array(column, np.int32) for column in zip(*spans, strict=True))
    blocks = -(-lengths // BLOCK_SIZE)
    tables = torch.full((len(spans), int(blocks.max())), -1, dtype=torch.int32)
    shuffled = torch.randperm(int(blocks.sum()), dtype=torch.int32)
    for sequence, own in enumerate(torch.split(shuffled, blocks.tolist())):
        tables[sequence, : own.numel()] = own
    query_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    rows, kind = (int(query_start[-1]), heads.query, heads.dim), getattr(torch, dtype)
    cut = AttentionPlan(len(spans), rows[0], int(counts.max()))
    return PagedStep(
        heads=heads,
        q=torch.randn(rows, device=device).to(kind),
        out=torch.full(rows, torch.nan, dtype=kind, device=device),
        kv=_random_cache(int(blocks.sum()) * BLOCK_SIZE, heads, kv_type, device),
        query_start=torch.from_numpy(query_start).to(device),
        seq_lens=torch.from_numpy(lengths).to(device),
        tables=tables.to(device),
        plan=cut,
        workspace=_workspace(cut, heads, int(lengths.max()), device),
    )


def _workspace(cut: AttentionPlan, heads: Heads, longest: int, device: torch.device) -> AttentionWorkspace:
    return AttentionWorkspace.empty(cut.sequences, heads.query, heads.dim, longest, device)


def _random_cache(slots: int, heads: Heads, kv_type: str, device: torch.device) -> LayerKv:
    cache = LayerKv.empty(slots, heads.kv, heads.dim, heads.dim, kv_type, str(device))
    fill_randomly(cache)
    return cache


def fill_randomly(cache: LayerKv) -> None:
    """Normal keys and values, as the cache's type has them. In place."""
    for stored, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales)):
        step = max(1, FILLED_AT_ONCE // stored[0].numel())
        for first in range(0, stored.shape[0], step):
            part = slice(first, first + step)
            drawn = torch.randn(stored[part].shape, device=stored.device)
            if scales is not None:
                scales[part] = drawn.abs().amax(-1) / INT8_MOST
                drawn = (drawn / scales[part][..., None]).round_()
            stored[part] = drawn.to(stored.dtype)
