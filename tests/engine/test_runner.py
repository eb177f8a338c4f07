"""From a schedule to arrays: what back-ends are promised, for any schedule, in any order of steps."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from tiny_engine import shared_model

from kvarn.backends import KvCacheSpec, StepLimits
from kvarn.backends.checks import check_batch
from kvarn.backends.reference import ReferenceBackend
from kvarn.draft_tree import chain
from kvarn.request import SamplingParams
from kvarn.runner import BatchBuilder, BlockFile, NullDrafter, Proposal, Runner
from kvarn.sampling import NativeSampler
from kvarn.step import BlockLoad, BlockSave, DraftTokens, NewSequence, ScheduledSequence, SchedulerOutput

BLOCK = 16
LIMITS = StepLimits(max_num_tokens=64, max_num_sequences=6, max_model_len=128, max_num_drafts=20)
KV = KvCacheSpec(num_blocks=40, block_size=BLOCK, dtype="float32")


@st.composite
def schedules(draw):
    """Sequences of one step, with blocks of their own."""
    blocks = draw(st.permutations(range(KV.num_blocks)))
    sequences, left = [], LIMITS.max_num_tokens
    for sequence_id in range(draw(st.integers(1, LIMITS.max_num_sequences))):
        count = draw(st.sampled_from([1, 1, 1, 2, 7, 20]))
        count = min(count, left - (LIMITS.max_num_sequences - sequence_id))
        start = draw(st.integers(0, 80))
        sample = draw(st.booleans())
        drafts = draw(st.sampled_from([0, 0, 1, 5])) if sample else 0
        drafts = min(drafts, left - count - (LIMITS.max_num_sequences - sequence_id))
        needed = -(-(start + count + drafts) // BLOCK)
        table, blocks = tuple(blocks[:needed]), blocks[needed:]
        tokens = tuple(draw(st.integers(0, 258)) for _ in range(count + drafts))
        draft = tokens[count:]
        parts = (table,), sample, draft, chain(drafts)
        sequences.append(ScheduledSequence(sequence_id, tokens[:count], start, *parts))
        left -= count + drafts
        if len(blocks) < 8:
            break
    return sequences


@settings(max_examples=60, deadline=None)
@given(st.lists(schedules(), min_size=1, max_size=5))
def test_batches_say_what_was_scheduled(steps):
    builder = BatchBuilder(LIMITS, BLOCK)
    program = shared_model("llama", 0).program
    for sequences in steps:
        batch = builder.build(sequences)
        check_batch(batch, program, KV, LIMITS)
        rows = [(s, i) for s in sequences for i in range(s.num_rows)]
        assert batch.token_ids.tolist() == [(s.token_ids + s.draft)[i] for s, i in rows]
        assert batch.positions.tolist() == [s.start + i for s, i in rows]
        slots = [s.block_tables[0][(s.start + i) // BLOCK] * BLOCK + (s.start + i) % BLOCK for s, i in rows]
        assert batch.slot_mapping[:, 0].tolist() == slots
        assert batch.seq_lens.tolist() == [s.end + len(s.draft) for s in sequences]
        ends = np.cumsum([s.num_rows for s in sequences]).tolist()
        assert batch.query_start.tolist() == [0, *ends]
        wanted = [row for row, (s, i) in enumerate(rows) if s.sample and i >= len(s.token_ids) - 1]
        assert batch.output_rows.tolist() == wanted
        for row, s in zip(batch.block_tables, sequences, strict=True):
            (table,) = s.block_tables
            assert row.tolist() == [[*table, *([-1] * (row.size - len(table)))]]
        assert batch.tree_parents is None and not batch.inputs
        arrays = {name: getattr(batch, name) for name in batch.__slots__ if name not in ("tree_parents", "inputs")}
        assert all(array.flags.c_contiguous for array in arrays.values())
        assert arrays.pop("slot_mapping").dtype == np.int64
        assert {array.dtype for array in arrays.values()} == {np.dtype(np.int32)}


def make_runner(drafter=None):
    model = shared_model("llama", 0)
    executable = ReferenceBackend().load(model.program, model.weights, KV, LIMITS)
    return Runner(executable, NativeSampler(259), LIMITS, BLOCK, drafter=drafter)


def new(sequence_id):
    return NewSequence(sequence_id, (1, 2), SamplingParams(temperature=0.0), seed=0, stream=0)


def test_an_empty_step_only_forgets():
    runner = make_runner()
    part = ScheduledSequence(0, (1, 2), 0, ((3,),), sample=True)
    assert len(runner.execute(SchedulerOutput(1, (part,), new=(new(0),))).sampled) == 1
    assert runner.execute(SchedulerOutput(2, (), finished=(0,))).sampled == ()
    assert len(runner.execute(SchedulerOutput(3, (part,), new=(new(0),))).sampled) == 1, "the id is free again"


def test_a_chunk_that_is_not_the_last_samples_nothing():
    runner = make_runner()
    first = ScheduledSequence(0, (1,), 0, ((3,),), sample=False)
    last = ScheduledSequence(0, (2,), 1, ((3,),), sample=True)
    assert runner.execute(SchedulerOutput(1, (first,), new=(new(0),))).sampled == ()
    (token,) = runner.execute(SchedulerOutput(2, (last,))).sampled
    assert token.sequence_id == 0


def test_blocks_are_copied_before_the_step():
    """A sequence goes on in a copy of the block that it began in, and says the same."""
    runner = make_runner()
    start = ScheduledSequence(0, (1, 2), 0, ((3,),), sample=True)
    runner.execute(SchedulerOutput(1, (start,), new=(new(0),)))
    there = ScheduledSequence(0, (5,), 2, ((3,),), sample=True)
    copied = ScheduledSequence(0, (5,), 2, ((9,),), sample=True)
    (expected,) = runner.execute(SchedulerOutput(2, (there,))).sampled
    (token,) = runner.execute(SchedulerOutput(3, (copied,), block_copies=((3, 9),))).sampled
    assert token == expected


class Drawing(NullDrafter):
    """Proposes the same tokens for sequence 0 in every step, said to be drawn from a distribution."""

    buffers = ("x",)

    def __init__(self, draft, q):
        self.draft, self.q = draft, q
        self.seen = []

    def propose(self, scheduled, sampled, values):
        self.seen.append((scheduled.num_tokens, [t.token_id for t in sampled], values["x"].shape[0]))
        return [Proposal(0, self.draft, self.q)]


def test_a_drawn_draft_is_verified_with_what_it_was_drawn_from():
    """A draft that its drafter was sure of, and the model is not, is rejected; the other way round it is accepted."""
    runner = make_runner()
    logits = {}
    for sure, accepted in ((1.0, False), (1e-6, True)):
        q = np.zeros((3, 259), np.float32)
        q[:, 7] = sure
        drafter = Drawing((7, 7, 7), q)
        runner = make_runner(drafter)
        sampling = SamplingParams(temperature=1.0, seed=1, logprobs=0)
        first = runner.execute(
            SchedulerOutput(
                1, (ScheduledSequence(0, (1, 2), 0, ((3,),), True, num_drafts_wanted=3),),
                new=(NewSequence(0, (1, 2), sampling, seed=1, stream=0),),
            )
        )  # fmt: skip
        assert first.drafts == (DraftTokens(0, (7, 7, 7), (-1, 0, 1)),)
        part = ScheduledSequence(0, (first.sampled[0].token_id,), 2, ((3,),), True, draft=(7, 7), parents=(-1, 0))
        second = runner.execute(SchedulerOutput(2, (part,)))
        ids = [t.token_id for t in second.sampled]
        assert (ids[:2] == [7, 7]) == accepted
        assert drafter.seen == [(2, [first.sampled[0].token_id], 2), (3, ids, 3)]
        logits[sure] = ids
    assert 7 not in logits[1.0], "what is rejected is not drawn in its own place: all of q was on it"


def test_reset_forgets_and_tries_the_program():
    runner = make_runner()
    part = ScheduledSequence(0, (1, 2), 0, ((3,),), sample=True)
    runner.execute(SchedulerOutput(1, (part,), new=(new(0),)))
    runner.reset()
    with pytest.raises(ValueError, match="sequence 0"):
        runner.execute(SchedulerOutput(1, (part,)))
    runner.reset()
    assert len(runner.execute(SchedulerOutput(1, (part,), new=(new(0),))).sampled) == 1
    runner.close()


def test_a_step_says_what_moving_its_blocks_took(tmp_path):
    model, name = shared_model("llama", 0), b"n" * 32
    executable = ReferenceBackend().load(model.program, model.weights, KV, LIMITS)
    file = BlockFile(tmp_path / "blocks", 1 << 20, executable.block_bytes, "it")
    runner = Runner(executable, NativeSampler(259), LIMITS, BLOCK, block_file=file)
    try:
        saved = runner.execute(SchedulerOutput(1, (), block_saves=(BlockSave(3, 0, name),)))
        loaded = runner.execute(SchedulerOutput(2, (), block_loads=(BlockLoad(1, (5,), (0,), (name,)),)))
        computed = runner.execute(SchedulerOutput(3, (ScheduledSequence(1, (7,), 0, ((0,),), False),)))
    finally:
        runner.close()
    assert saved.move_seconds > 0 < loaded.move_seconds
    assert loaded.loaded == (1,)
    assert computed.move_seconds == 0
