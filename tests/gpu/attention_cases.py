"""Ragged batches over a paged cache, and what attention makes of them by the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from kvarn.backends.base import InputBatch
from kvarn.backends.checks import first_blocks
from kvarn.backends.cuda.kernels.attention import AttentionWorkspace, attention
from kvarn.backends.cuda.kernels.attention_plan import AttentionPlan
from kvarn.backends.cuda.kernels.kv_write import LayerKv, kv_write
from kvarn.backends.reference import functions as f
from kvarn.backends.trees import contexts, with_trees

MAX_LEN = 2048
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
GROUP, GROUPS = 1, 2
"""The KV group that the layer is of, and how many there are."""


@dataclass(frozen=True)
class Case:
    """rows: (rows in the step, tokens after it) of each sequence; drafts: parents of its last rows, by sequence."""

    rows: Sequence[tuple[int, int]]
    dtype: str = "float32"
    stored: str = "float32"
    heads: int = 2
    kv_heads: int = 1
    key_dim: int = 16
    value_dim: int = 16
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    scale: float = 0.4
    drafts: dict[int, Sequence[int]] = field(default_factory=dict)

    def alone(self, sequence: int) -> Case:
        """One of its sequences."""
        drafts = {0: self.drafts[sequence]} if sequence in self.drafts else {}
        return replace(self, rows=[self.rows[sequence]], drafts=drafts)


class Step:
    """A case's arrays, random but for what nobody may look at, which is NaN."""

    def __init__(self, case: Case, device: str, seed: int = 0) -> None:
        self.case, self.device = case, device
        generator = np.random.default_rng(seed)
        self.batch = _batch(case, generator)
        blocks = int(self.batch.block_tables.max()) + 2
        self.kv = LayerKv.empty(
            blocks * case.block_size, case.kv_heads, case.key_dim, case.value_dim, case.stored, device
        )
        self._fill(generator)
        q = generator.standard_normal((self.batch.num_tokens, case.heads, case.key_dim)) * 2
        self.q = torch.from_numpy(q).to(TYPES[case.dtype]).to(device)

    def _fill(self, generator: np.random.Generator) -> None:
        """Writes all that a sequence may see; the rest is poison: other blocks, and what lies before windows."""
        case, batch = self.case, self.batch
        if self.kv.keys.dtype.is_floating_point:
            self.kv.keys.fill_(float("nan"))
            self.kv.values.fill_(float("nan"))
        else:
            assert self.kv.key_scales is not None and self.kv.value_scales is not None
            self.kv.key_scales.fill_(float("nan"))
            self.kv.value_scales.fill_(float("nan"))
        begins = first_blocks(batch, case.window, case.block_size) * case.block_size
        for sequence, begin in enumerate(begins):
            places = np.arange(begin, batch.seq_lens[sequence])
            table = batch.block_tables[sequence, GROUP].astype(np.int64)
            slots = torch.from_numpy(table[places // case.block_size] * case.block_size + places % case.block_size)
            keys, values = (
                torch.from_numpy(generator.standard_normal((places.size, case.kv_heads, dim)).astype(np.float32))
                for dim in (case.key_dim, case.value_dim)
            )
            kv_write(keys.to(self.device), values.to(self.device), slots.to(self.device), self.kv)
            batch.block_tables[sequence, GROUP, : begin // case.block_size] = 0  # block 0 is poison

    def run(self, plan: AttentionPlan | None = None, extra: int = 0, idle: int = 0) -> torch.Tensor:
        """float32 [T + extra, heads, value_dim] on the CPU: what the kernels write into rows of NaN.

        extra: rows that fill up a bucket; idle: as many of them as each sequence without tokens has, which fills it up.
        """
        case, batch = self.case, self.batch
        sequences, tokens = batch.num_sequences, batch.num_tokens
        plan = plan or AttentionPlan(sequences, tokens, int(np.diff(batch.query_start).max()), programs=4)
        out = torch.full((tokens + extra, case.heads, case.value_dim), float("nan"), dtype=TYPES[case.dtype])
        out, q = (
            out.to(self.device),
            torch.cat([self.q, torch.full_like(self.q[:1], float("nan")).expand(extra, -1, -1)]),
        )
        padding = plan.sequences - sequences
        start = np.concatenate([batch.query_start, batch.query_start[-1] + idle * np.arange(1, padding + 1)])
        start = start.astype(np.int32)
        lengths = np.pad(batch.seq_lens, (0, padding))
        tables = np.pad(batch.block_tables, ((0, padding), (0, 0), (0, 0)), constant_values=-1)
        workspace = AttentionWorkspace.empty(plan.sequences, case.heads, case.value_dim, MAX_LEN, self.device)
        workspace.mixed.fill_(float("nan"))
        workspace.stats.fill_(float("nan"))
        parents = batch.tree_parents
        attention(
            q, self.kv, self._tensor(start), self._tensor(lengths), self._tensor(tables)[:, GROUP], plan, workspace,
            block_size=case.block_size, scale=case.scale, out=out, window=case.window, softcap=case.softcap,
            tree=None if parents is None else (self._tensor(parents), self._tensor(batch.positions)),
        )  # fmt: skip
        return out.float().cpu()

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def expected(self) -> torch.Tensor:
        """float32 [T, heads, value_dim] by `functions.attention`, of the keys and values that the cache gives back."""
        case, batch = self.case, self.batch
        keys, values = self.kv.keys.float(), self.kv.values.float()
        if self.kv.key_scales is not None and self.kv.value_scales is not None:
            keys, values = keys * self.kv.key_scales[..., None], values * self.kv.value_scales[..., None]
        keys, values, q = (x.cpu().numpy() for x in (keys, values, self.q.float()))
        out = np.empty((batch.num_tokens, case.heads, case.value_dim), np.float32)
        begins = first_blocks(batch, case.window, case.block_size) * case.block_size
        for sequence, start in enumerate(begins):
            for rows, begin, slots in contexts(batch, sequence, GROUP, case.block_size, int(start)):
                k, v = (np.pad(x[slots], ((begin, 0), (0, 0), (0, 0))) for x in (keys, values))
                out[rows] = f.attention(
                    q[rows], k, v, batch.positions[rows], scale=case.scale, window=case.window, softcap=case.softcap
                )
        return torch.from_numpy(out)


def _batch(case: Case, generator: np.random.Generator) -> InputBatch:
    """Blocks of all sequences are shuffled; block 0 of the group is nobody's."""
    counts = np.array([count for count, _ in case.rows])
    lengths = np.array([length for _, length in case.rows], np.int32)
    needed = -(-lengths // case.block_size)
    free = list(generator.permutation(np.arange(1, needed.sum() + 1)))
    tables = np.full((lengths.size, int(needed.max())), -1, np.int32)
    for sequence, blocks in enumerate(needed):
        tables[sequence, :blocks] = [free.pop() for _ in range(blocks)]
    start = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
    positions = [np.arange(length - count, length) for count, length in case.rows]
    batch = InputBatch.of_tables(
        np.zeros(start[-1], np.int32), np.concatenate(positions).astype(np.int32), start, lengths, tables,
        np.arange(1, dtype=np.int32), block_size=case.block_size, num_groups=GROUPS,
    )  # fmt: skip
    return with_trees(batch, [case.drafts.get(sequence, ()) for sequence in range(lengths.size)])


def worst_row(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest ‖got - expected‖ / ‖expected‖ of a row; inf where anything is NaN."""
    error = (got - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    return float(error.nan_to_num(nan=float("inf")).max())
