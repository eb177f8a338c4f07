"""EAGLE: one decoder layer guesses the next hidden state from the last one and the token that came of it, and goes on
from its own (Li et al. 2024, section 3; its keys as in EAGLE-3, Li et al. 2025, and a draft vocabulary)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from kvarn.backends import Executable, InputBatch, KvCacheSpec, StepLimits
from kvarn.program import (
    Add,
    Attention,
    Buffer,
    Embed,
    GatedActivation,
    Input,
    KvLayer,
    KvWrite,
    Linear,
    Logits,
    Norm,
    Op,
    Program,
    Rope,
    RopeTable,
    Rows,
    SelectRows,
    Weight,
)
from kvarn.runner import BlocklessDrafter, Proposal
from kvarn.spec.chain import LEAST, WIDTH, Candidates, candidates_of, kept_rows, likely_tree
from kvarn.spec.head_model import HeadModel, HeadTensors
from kvarn.spec.heads import Heads, HeadsShape, tensor_shapes
from kvarn.spec.rings import Rings
from kvarn.step import NewSequence, SampledToken, ScheduledSequence, SchedulerOutput
from kvarn.tensors import TensorSource

FEATURE, LAYER, LOGITS = "feature", "x", "logits"
BLOCK_SIZE = 16
MOST_AHEAD = 32
CATCH_UP_TOKENS = 256
"""Rows in one step of the layer at least."""
Floats = NDArray[np.float32]


def eagle_program(shape: HeadsShape, embedding: str, max_positions: int) -> Program:
    """feature[T] and token ids → x[T], the next features, and logits[R] over the draft vocabulary.

    embedding: name of the target's token table.
    """
    hidden, draft, eps = shape.hidden_size, shape.draft_vocab, shape.norm_eps
    heads, kv_heads, dim, wide = shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.intermediate_size
    half = dim // 2
    table = RopeTable(tuple(float(shape.rope_theta ** (-i / half)) for i in range(half)), "halves")
    ops: list[Op] = [
        Input(FEATURE),
        Embed("e", embedding),
        Norm("e", "e", "token_norm.weight", None, eps, "rms"),
        Linear(LAYER, "e", "token.weight"),
        Norm("f", FEATURE, "feature_norm.weight", None, eps, "rms"),
        Linear("branch", "f", "feature.weight"),
        Add(LAYER, LAYER, "branch"),
        Norm("h", LAYER, "attn_norm.weight", None, eps, "rms"),
        Linear("q", "h", "attn.q.weight"),
        Linear("k", "h", "attn.k.weight"),
        Linear("v", "h", "attn.v.weight"),
        Rope("q", "q", heads, dim, table),
        Rope("k", "k", kv_heads, dim, table),
        KvWrite(0, "k", "v"),
        Attention(0, "attn", "q", heads, kv_heads, dim, dim**-0.5, shape.window),
        Linear("branch", "attn", "attn.o.weight"),
        Add(LAYER, LAYER, "branch"),
        Norm("h", LAYER, "mlp_norm.weight", None, eps, "rms"),
        Linear("gate", "h", "mlp.gate.weight"),
        Linear("up", "h", "mlp.up.weight"),
        GatedActivation("gate", "gate", "up", "silu"),
        Linear("branch", "gate", "mlp.down.weight"),
        Add(LAYER, LAYER, "branch"),
        SelectRows("last", LAYER),
        Norm("last", "last", "norm.weight", None, eps, "rms"),
        Logits(LOGITS, "last", "lm_head.weight"),
    ]
    widths = {
        FEATURE: hidden, "e": hidden, "f": hidden, LAYER: hidden, "branch": hidden, "h": hidden, "q": heads * dim,
        "k": kv_heads * dim, "v": kv_heads * dim, "attn": heads * dim, "gate": wide, "up": wide,
    }  # fmt: skip
    buffers = [Buffer(name, Rows.TOKENS, width) for name, width in widths.items()]
    buffers += [Buffer("last", Rows.OUTPUTS, hidden), Buffer(LOGITS, Rows.OUTPUTS, draft)]
    weights = [Weight(embedding, (shape.vocab_size, hidden))]
    weights += [Weight(name, extents) for name, extents in tensor_shapes("eagle", shape).items()]
    layers = (KvLayer(kv_heads, dim, dim, shape.window),)
    return Program("eagle", tuple(ops), tuple(buffers), tuple(weights), layers, shape.vocab_size, max_positions, LOGITS)


def ring_blocks(window: int) -> int:
    """Blocks that hold what the last known row sees, and the guesses after it.

    Rows before it may be written in the same step, more than there is room for: then some of them attend to what is
    overwritten. In a single layer nobody reads that: keys and values are of the row alone.
    """
    return -(-(window + MOST_AHEAD) // BLOCK_SIZE) + 1


def eagle_model(heads: Heads, target: Program, weights: TensorSource | None) -> HeadModel:
    """The layer beside its model."""
    shape = heads.shape
    embedding = next(op.weight for op in target.ops if isinstance(op, Embed))
    program = eagle_program(shape, embedding, target.max_positions)

    def limits(of_target: StepLimits) -> StepLimits:
        sequences = of_target.max_num_sequences
        tokens = max(CATCH_UP_TOKENS, sequences, shape.window)
        return StepLimits(tokens, sequences, of_target.max_model_len + MOST_AHEAD, outputs=(LAYER,))

    def cache(of_target: KvCacheSpec, limits: StepLimits) -> KvCacheSpec:
        # int4 keys of a sequence are read against one every 16 tokens, which guesses would disturb.
        dtype = "int8" if of_target.dtype == "int4" else of_target.dtype
        return KvCacheSpec(limits.max_num_sequences * ring_blocks(shape.window), BLOCK_SIZE, dtype)

    def start(executable: Executable, of_target: StepLimits, _block_size: int) -> EagleDrafter:
        return EagleDrafter(executable, heads.draft_ids, target.last_layer, shape.window, limits(of_target))

    source = HeadTensors(heads.tensors, weights, {embedding})
    return HeadModel(program, source, (target.last_layer,), frozenset({embedding}), cache, limits, start)


@dataclass(slots=True)
class _Sequence:
    """A sequence. Rows are of positions: row p has hidden state p of the target and token p + 1."""

    tokens: list[int]
    waiting: list[Floats] = field(default_factory=list)
    """Hidden states of the rows that the layer has not computed."""
    end: int = 0
    """Position after the last row that is known."""
    num_waiting: int = 0
    """Those rows."""
    computed: int = 0
    """Rows in the layer's cache, those right before the waiting ones."""

    def take(self, start: int, rows: Floats, window: int) -> None:
        """Hidden states of the positions from `start` on. Not many more wait than the layer would see."""
        if start > self.end:  # what lies between was found in the prefix cache: nobody has its hidden states
            self.waiting, self.num_waiting, self.computed = [], 0, 0
        new = rows[max(0, self.end - start) :][-window:]
        self.end = max(self.end, start + len(rows))
        if len(new):
            self.waiting.append(new.copy())
            self.num_waiting += len(new)
        if self.num_waiting > 2 * window:  # not at each row: all the others would be copied for it
            self.trim(window)

    def trim(self, window: int) -> None:
        """Lets only those wait that the layer would see."""
        if self.num_waiting > window:
            self.waiting = [np.concatenate(self.waiting)[-window:].copy()]
            self.num_waiting, self.computed = window, 0


@dataclass(slots=True)
class _Guess:
    """A proposal while it is made."""

    part: ScheduledSequence
    sequence: _Sequence
    ring: int
    levels: list[Candidates] = field(default_factory=list)
    """What may come in each place, the likeliest in all places before it."""
    probability: float = 1.0
    feature: Floats | None = None


class EagleDrafter(BlocklessDrafter):
    """Guesses a chain, token by token, for all sequences together, as long as all of it is likely enough; beside its
    tokens others that may stand in their place, where those are likelier than a longer chain.

    The layer sees the last `window` tokens. Its keys and values are in rings of blocks of its own, one for each
    sequence of a step: with so short a memory that is less than the target's blocks would take, and nothing of a
    sequence is left to another. Hidden states are kept until a guess is wanted, `window` of them at most, so that
    neither prompts nor steps without guesses cost anything. What the target found in its prefix cache the layer has not
    seen: right after it guesses are less often right.
    """

    def __init__(
        self,
        executable: Executable,
        draft_ids: NDArray[np.int32],
        hidden: str,
        window: int,
        limits: StepLimits,
    ) -> None:
        """executable: of `eagle_program`, owned. hidden: the target's buffer of hidden states before its last norm, a
        row for each token. limits: those that the executable was loaded with."""
        self.buffers: Sequence[str] = (hidden,)
        self._executable = executable
        self._draft_ids = draft_ids
        self._hidden = hidden
        self._rings = Rings(limits.max_num_sequences)
        self._batches = _Batches(limits.max_num_sequences, ring_blocks(window), limits.max_model_len)
        self._window = window
        self._max_tokens = limits.max_num_tokens
        self._sequences: dict[int, _Sequence] = {}

    def add(self, sequence: NewSequence) -> None:
        """See `Drafter.add`. Those that want no guesses are not followed."""
        if sequence.sampling.num_speculative_tokens != 0:
            self._sequences[sequence.sequence_id] = _Sequence(list(sequence.prompt_token_ids))

    def remove(self, sequence_id: int) -> None:
        """See `Drafter.remove`."""
        self._sequences.pop(sequence_id, None)
        self._rings.free(sequence_id)

    def close(self) -> None:
        """Closes the executable."""
        self._executable.close()

    def propose(
        self,
        scheduled: SchedulerOutput,
        sampled: Sequence[SampledToken],
        values: Mapping[str, Floats],
    ) -> Sequence[Proposal]:
        """See `Drafter.propose`."""
        self._follow(scheduled, sampled, values[self._hidden])
        guesses = self._begin([part for part in scheduled.sequences if part.num_drafts_wanted])
        going = self._catch_up(guesses)
        while going:
            going = self._go_on(going)
        return [proposal for guess in guesses if (proposal := self._proposal(guess)) is not None]

    def _follow(self, scheduled: SchedulerOutput, sampled: Sequence[SampledToken], hidden: Floats) -> None:
        """Takes in tokens and hidden states of a step."""
        for kept in kept_rows(scheduled, sampled):
            followed = self._sequences.get(kept.part.sequence_id)
            if followed is not None:
                followed.tokens += kept.tokens
                followed.take(kept.part.start, kept.rows(hidden), self._window)

    def _begin(self, parts: Sequence[ScheduledSequence]) -> list[_Guess]:
        guesses = []
        in_step = {part.sequence_id for part in parts}
        for part in parts:
            followed = self._sequences.get(part.sequence_id)
            if followed is None or not followed.waiting:
                continue
            followed.trim(self._window)
            ring, taken_from = self._rings.of(part.sequence_id, in_step)
            if taken_from is not None and taken_from in self._sequences:
                self._sequences[taken_from].computed = 0
            guesses.append(_Guess(part, followed, ring))
        return guesses

    def _proposal(self, guess: _Guess) -> Proposal | None:
        part = guess.part
        places, parents = likely_tree(guess.levels, part.num_nodes_wanted, chained=True)
        tokens = tuple(int(self._draft_ids[place]) for place in places)
        return Proposal(part.sequence_id, tokens, parents=tuple(parents)) if tokens else None

    def _catch_up(self, guesses: Sequence[_Guess]) -> list[_Guess]:
        """Computes the rows that wait, and with them the first guesses. Returns those to go on with."""
        left = list(guesses)
        going: list[_Guess] = []
        while left:
            now: list[_Guess] = []
            count = 0
            while left and count + left[0].sequence.num_waiting <= self._max_tokens:
                count += left[0].sequence.num_waiting
                now.append(left.pop(0))
            features, tokens, starts = [], [], []
            for guess in now:
                sequence = guess.sequence
                rows = np.concatenate(sequence.waiting)
                first = sequence.end - len(rows)
                features.append(rows)
                tokens.append(sequence.tokens[first + 1 : sequence.end + 1])
                starts.append(sequence.computed)
                sequence.computed += len(rows)
                sequence.waiting, sequence.num_waiting = [], 0
            going += self._run(now, np.concatenate(features), tokens, starts)
        return going

    def _go_on(self, going: Sequence[_Guess]) -> list[_Guess]:
        """One guess more for each."""
        features = np.stack([guess.feature for guess in going if guess.feature is not None])
        tokens = [[int(self._draft_ids[guess.levels[-1].places[0]])] for guess in going]
        starts = [guess.sequence.computed + len(guess.levels) - 1 for guess in going]
        return self._run(going, features, tokens, starts)

    def _run(
        self, guesses: Sequence[_Guess], features: Floats, tokens: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> list[_Guess]:
        """A step of the layer, whose last row for each sequence is its next guess. Returns those to go on with."""
        batch = self._batches.build(features, tokens, starts, [guess.ring for guess in guesses])
        out = self._executable.execute(batch)
        going = []
        for guess, logits, row in zip(guesses, out[LOGITS], batch.output_rows.tolist(), strict=True):
            part = guess.part
            here = candidates_of(logits, min(WIDTH, part.num_nodes_wanted), guess.probability)
            guess.probability *= here.probabilities[0]
            if not guess.probability >= LEAST:
                continue
            guess.levels.append(here)
            most = min(part.num_drafts_wanted, part.num_nodes_wanted, MOST_AHEAD)
            if len(guess.levels) < most and guess.probability >= part.least_sure + part.guess_cost:
                guess.feature = out[LAYER][row].copy()
                going.append(guess)
        return going


class _Batches:
    """The layer's batches. It runs several times a step, so it is written for few calls, of plain lists where those are
    short: right after a step of the target nothing of NumPy is in the caches."""

    def __init__(self, num_rings: int, ring: int, max_model_len: int) -> None:
        """ring: blocks of each. The text of a sequence goes round and round in its ring's blocks."""
        width = -(-max_model_len // BLOCK_SIZE)
        first = np.arange(num_rings, dtype=np.int32)[:, None] * ring
        self._tables = (first + np.arange(width, dtype=np.int32)[None, :] % ring)[:, None, :]
        self._ring = ring
        self._counts = np.arange(num_rings + 1, dtype=np.int32)

    def build(
        self, features: Floats, tokens: Sequence[Sequence[int]], starts: Sequence[int], rings: Sequence[int]
    ) -> InputBatch:
        """tokens, starts, rings: for each sequence its rows' tokens, the first row's place in its text, its ring."""
        ring, count = self._ring, len(rings)
        ids = [token for part in tokens for token in part]
        ends = [start + len(part) for start, part in zip(starts, tokens, strict=True)]
        places = [place for start, end in zip(starts, ends, strict=True) for place in range(start, end)]
        owners = [number for number, part in zip(rings, tokens, strict=True) for _ in part]
        slots = [
            (number * ring + place // BLOCK_SIZE % ring) * BLOCK_SIZE + place % BLOCK_SIZE
            for number, place in zip(owners, places, strict=True)
        ]
        if len(ids) == count:
            query_start = self._counts[: count + 1]
        else:
            query_start = np.array([0, *accumulate(map(len, tokens))], np.int32)
        return InputBatch(
            np.array(ids, np.int32),
            np.array(places, np.int32),
            np.array(slots, np.int64)[:, None],
            query_start,
            np.array(ends, np.int32),
            self._tables[rings[0] : rings[0] + 1] if count == 1 else self._tables[list(rings)],
            query_start[1:] - 1,
            inputs={FEATURE: features},
        )
