"""Medusa heads: each guesses one of the next tokens from the last hidden state (Cai et al. 2024, section 2.1.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kvarn.backends import Executable, InputBatch, KvCacheSpec, StepLimits
from kvarn.errors import ConfigError
from kvarn.program import (
    Activation,
    Add,
    Buffer,
    Input,
    KvLayer,
    Linear,
    Logits,
    Op,
    Program,
    Rows,
    Weight,
)
from kvarn.runner import BlocklessDrafter, Proposal
from kvarn.spec.chain import LEAST, WIDTH, Candidates, candidates_of, kept_rows, likely_tree
from kvarn.spec.head_model import HeadModel, HeadTensors, logits_input
from kvarn.spec.heads import Heads, HeadsShape, tensor_shapes
from kvarn.step import NewSequence, SampledToken, SchedulerOutput
from kvarn.tensors import TensorSource

HIDDEN = "hidden"
BLOCK_SIZE = 16


def medusa_program(shape: HeadsShape) -> Program:
    """hidden[T] → logits.0 … logits.(K-1), each [T, draft_vocab]: h + silu(W_k h + b_k), then head k's own LM head."""
    heads, no_kv = range(shape.num_heads), tuple[KvLayer, ...]()
    ops: list[Op] = [Input(HIDDEN)]
    # Linears of the same input stand together, so that a back-end can run them at once.
    ops += [Linear(f"h.{k}", HIDDEN, f"heads.{k}.block.weight", f"heads.{k}.block.bias") for k in heads]
    for k in heads:
        ops += [Activation(f"h.{k}", f"h.{k}", "silu"), Add(f"h.{k}", f"h.{k}", HIDDEN)]
    ops += [Logits(f"logits.{k}", f"h.{k}", f"heads.{k}.lm_head.weight") for k in heads]
    buffers = [Buffer(HIDDEN, Rows.TOKENS, shape.hidden_size)]
    buffers += [Buffer(f"h.{k}", Rows.TOKENS, shape.hidden_size) for k in heads]
    buffers += [Buffer(f"logits.{k}", Rows.TOKENS, shape.draft_vocab) for k in heads]
    weights = tuple(Weight(name, extents) for name, extents in tensor_shapes("medusa", shape).items())
    return Program("medusa", tuple(ops), tuple(buffers), weights, no_kv, shape.vocab_size, 1 << 30, "logits.0")


def medusa_model(heads: Heads, target: Program, weights: TensorSource | None, k: int | None) -> HeadModel:
    """Heads beside their model. k: tokens to guess, where that is fixed. Raises ConfigError."""
    shape = heads.shape
    if k is not None and k > shape.num_heads:
        raise ConfigError(f"speculative k must be at most {shape.num_heads}, the heads that were trained, not {k}")
    logits = tuple(f"logits.{head}" for head in range(shape.num_heads))

    def limits(of_target: StepLimits) -> StepLimits:
        rows = of_target.max_num_sequences
        return StepLimits(rows, 1, rows, rows - 1, outputs=logits[1:])

    def cache_spec(_: KvCacheSpec, limits: StepLimits) -> KvCacheSpec:
        # Of no layers, so of no bytes. All rows of a step are one sequence's.
        return KvCacheSpec(-(-limits.max_num_sequences // BLOCK_SIZE), BLOCK_SIZE, "float32")

    def start(executable: Executable, _limits: StepLimits, _block_size: int) -> MedusaDrafter:
        return MedusaDrafter(executable, heads.draft_ids, logits, logits_input(target))

    return HeadModel(
        medusa_program(shape), HeadTensors(heads.tensors, weights), (logits_input(target),), frozenset(), cache_spec,
        limits, start,
    )  # fmt: skip


class MedusaDrafter(BlocklessDrafter):
    """Guesses a tree of the likeliest tokens of each head, as long as its branches are likely enough.

    All sequences' rows go through the heads in one step of their program.
    """

    def __init__(
        self, executable: Executable, draft_ids: NDArray[np.int32], logits: Sequence[str], hidden: str
    ) -> None:
        """executable: of `medusa_program`, owned. logits: its outputs, head by head. hidden: the target's buffer of
        hidden states after the last norm, a row for each row with logits."""
        self.buffers: Sequence[str] = (hidden,)
        self._executable = executable
        self._draft_ids = draft_ids
        self._logits = logits
        self._hidden = hidden
        self._batches: dict[int, InputBatch] = {}
        """By number of rows: only the rows themselves differ from step to step."""

    def add(self, sequence: NewSequence) -> None:
        """Nothing: all that heads see is in the step."""

    def remove(self, sequence_id: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Closes the executable."""
        self._executable.close()

    def propose(
        self,
        scheduled: SchedulerOutput,
        sampled: Sequence[SampledToken],
        values: Mapping[str, NDArray[np.float32]],
    ) -> Sequence[Proposal]:
        """See `Drafter.propose`."""
        kept_here = kept_rows(scheduled, sampled)
        wanted = [kept for kept in kept_here if kept.part.num_drafts_wanted and kept.output_row >= 0]
        if not wanted:
            return ()
        hidden = values[self._hidden][[kept.output_row for kept in wanted]]
        out = self._executable.execute(self._batch(hidden))
        logits = [out[name] for name in self._logits]
        proposals = []
        for row, kept in enumerate(wanted):
            part = kept.part
            levels, before = list[Candidates](), 1.0
            for rows in logits[: part.num_drafts_wanted]:
                if not before >= LEAST:
                    break
                levels.append(candidates_of(rows[row], min(WIDTH, part.num_nodes_wanted), before))
                before *= levels[-1].probabilities[0]
            places, parents = likely_tree(levels, part.num_nodes_wanted)
            if places:
                tokens = tuple(int(self._draft_ids[place]) for place in places)
                proposals.append(Proposal(part.sequence_id, tokens, parents=tuple(parents)))
        return proposals

    def _batch(self, hidden: NDArray[np.float32]) -> InputBatch:
        count = len(hidden)
        if count not in self._batches:
            ids = np.zeros(count, np.int32)
            self._batches[count] = InputBatch.of_one(ids, num_outputs=count, block_size=BLOCK_SIZE)
        return replace(self._batches[count], inputs={HIDDEN: hidden})
