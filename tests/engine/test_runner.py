"""From a schedule to arrays: what back-ends are promised, for any schedule, in any order of steps."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from tiny_engine import shared_model

from kvarn.backends import KvCacheSpec, StepLimits
from kvarn.backends.checks import check_batch
from kvarn.backends.reference import ReferenceBackend
from kvarn.request import SamplingParams
from kvarn.runner import BatchBuilder, Runner
from kvarn.sampling import NativeSampler
from kvarn.step import NewSequence, ScheduledSequence, SchedulerOutput

BLOCK = 16
LIMITS = StepLimits(max_num_tokens=64, max_num_sequences=6, max_model_len=128)
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
        needed = -(-(start + count) // BLOCK)
        table, blocks = tuple(blocks[:needed]), blocks[needed:]
        tokens = tuple(draw(st.integers(0, 258)) for _ in range(count))
        sequences.append(ScheduledSequence(sequence_id, tokens, start, table, draw(st.booleans())))
        left -= count
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
        rows = [(s, i) for s in sequences for i in range(len(s.token_ids))]
        assert batch.token_ids.tolist() == [s.token_ids[i] for s, i in rows]
        assert batch.positions.tolist() == [s.start + i for s, i in rows]
        slots = [s.block_table[(s.start + i) // BLOCK] * BLOCK + (s.start + i) % BLOCK for s, i in rows]
        assert batch.slot_mapping.tolist() == slots
        assert batch.seq_lens.tolist() == [s.end for s in sequences]
        ends = np.cumsum([len(s.token_ids) for s in sequences]).tolist()
        assert batch.query_start.tolist() == [0, *ends]
        assert batch.output_rows.tolist() == [end - 1 for end, s in zip(ends, sequences, strict=True) if s.sample]
        for row, s in zip(batch.block_tables, sequences, strict=True):
            assert row.tolist() == [*s.block_table, *([-1] * (len(row) - len(s.block_table)))]
        assert batch.tree_parents is None
        arrays = [name for name in batch.__slots__ if name != "tree_parents"]
        types = {name: getattr(batch, name).dtype for name in arrays}
        assert types.pop("slot_mapping") == np.int64
        assert set(types.values()) == {np.dtype(np.int32)}
        assert all(getattr(batch, name).flags.c_contiguous for name in arrays)


def make_runner():
    model = shared_model("llama", 0)
    executable = ReferenceBackend().load(model.program, model.weights, KV, LIMITS)
    return Runner(executable, NativeSampler(259), LIMITS, BLOCK)


def new(sequence_id):
    return NewSequence(sequence_id, (1, 2), SamplingParams(temperature=0.0), seed=0, stream=0)


def test_an_empty_step_only_forgets():
    runner = make_runner()
    part = ScheduledSequence(0, (1, 2), 0, (3,), sample=True)
    assert len(runner.execute(SchedulerOutput(1, (part,), new=(new(0),))).sampled) == 1
    assert runner.execute(SchedulerOutput(2, (), finished=(0,))).sampled == ()
    assert len(runner.execute(SchedulerOutput(3, (part,), new=(new(0),))).sampled) == 1, "the id is free again"


def test_a_chunk_that_is_not_the_last_samples_nothing():
    runner = make_runner()
    first = ScheduledSequence(0, (1,), 0, (3,), sample=False)
    last = ScheduledSequence(0, (2,), 1, (3,), sample=True)
    assert runner.execute(SchedulerOutput(1, (first,), new=(new(0),))).sampled == ()
    (token,) = runner.execute(SchedulerOutput(2, (last,))).sampled
    assert token.sequence_id == 0


def test_blocks_are_copied_before_the_step():
    """A sequence goes on in a copy of the block that it began in, and says the same."""
    runner = make_runner()
    start = ScheduledSequence(0, (1, 2), 0, (3,), sample=True)
    runner.execute(SchedulerOutput(1, (start,), new=(new(0),)))
    there = ScheduledSequence(0, (5,), 2, (3,), sample=True)
    copied = ScheduledSequence(0, (5,), 2, (9,), sample=True)
    (expected,) = runner.execute(SchedulerOutput(2, (there,))).sampled
    (token,) = runner.execute(SchedulerOutput(3, (copied,), block_copies=((3, 9),))).sampled
    assert token == expected


def test_reset_forgets_and_tries_the_program():
    runner = make_runner()
    part = ScheduledSequence(0, (1, 2), 0, (3,), sample=True)
    runner.execute(SchedulerOutput(1, (part,), new=(new(0),)))
    runner.reset()
    with pytest.raises(ValueError, match="sequence 0"):
        runner.execute(SchedulerOutput(1, (part,)))
    runner.reset()
    assert len(runner.execute(SchedulerOutput(1, (part,), new=(new(0),))).sampled) == 1
    runner.close()
