"""The scheduler one step ahead: a step is scheduled, and computed, before what the step before said is booked."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import invariant, rule
from paged_model import PagedModel, expected_tokens
from state_machines import run_machine
from test_scheduler_properties import WithTenants

from kvarn.cache import BlockPool, RadixPrefixCache
from kvarn.config import SchedulerConfig
from kvarn.request import FinishReason, Request, SamplingParams
from kvarn.scheduler import Scheduler
from kvarn.step import PENDING

BLOCK = 4


def known(scheduled, result):
    """The step with what the one before said in the places of what was pending."""
    said = {} if result is None else {token.sequence_id: token.token_id for token in result.sampled}

    def part_of(part):
        assert PENDING not in part.token_ids[:-1]
        last = part.token_ids[-1]
        return replace(part, token_ids=(*part.token_ids[:-1], said[part.sequence_id] if last == PENDING else last))

    return replace(scheduled, sequences=tuple(part_of(part) for part in scheduled.sequences))


class OneAhead(WithTenants):
    """Whoever comes, goes, and waits: everybody says what they say alone, and no block is lost.

    A step that loads or saves is computed when the one before is booked, as a runner does.
    """

    under_way = None
    """A step that is scheduled, and what came of it, if it is computed already."""
    num_for_nothing = 0
    """Rows of sequences that had ended."""

    def one_step(self):
        scheduled, result = self.under_way or self.decide(None)
        self.under_way = None
        if result is not None:
            self.scheduler.assume(scheduled)
            self.under_way = self.decide(result)
        else:
            result = self.model.execute(scheduled)
        ended = {s.sequence_id for s in self.sequences if s.finished}
        for sequence, token in self.scheduler.update(scheduled, result):
            self.said[sequence.sequence_id].append(token.token_id)
        alive = tuple(part for part in scheduled.sequences if part.sequence_id not in ended)
        type(self).num_for_nothing += len(scheduled.sequences) - len(alive)
        self.check_hits(replace(scheduled, sequences=alive))
        self.unchecked = True
        self.books_agree()

    def decide(self, before):
        scheduled = known(self.scheduler.schedule(), before)
        moves = scheduled.block_loads or scheduled.block_saves
        return scheduled, None if moves or not scheduled.sequences else self.model.execute(scheduled)

    @rule(data=st.data())
    def abort_within_a_step(self, data):
        self.steps(1)
        self.abort(data)
        self.steps(1)

    @invariant()
    def books_agree(self):
        if self.unchecked and self.under_way:  # blocks of a step under way are for what is not booked
            self.scheduler.check()
            self.count_step()
            self.unchecked = False
        super().books_agree()

    def teardown(self):
        if hasattr(self, "scheduler"):
            for _ in range(200 + 140 * len(self.sequences)):
                if self.scheduler.has_work() or self.under_way:
                    self.one_step()
            assert not self.under_way
        super().teardown()


class OneAheadWithWindows(OneAhead):
    """In every KV group, whose blocks are given back as they fall out of sight."""

    windows = (None, 9, 3)
    tier_slots = 0


@pytest.mark.parametrize("machine", [OneAhead, OneAheadWithWindows], ids=lambda m: m.__name__)
def test_one_step_ahead(machine):
    run_machine(machine, length=60, steps=2500)
    assert machine.num_for_nothing > 50


def scheduler_of(blocks=16, seqs=4, tokens=64):
    pool = BlockPool(blocks, BLOCK)
    config = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens)
    return Scheduler(config, pool, 60, eos_token_ids=(0,), prefix_cache=RadixPrefixCache(pool))


def asked(scheduler, max_tokens=8, **sampling):
    return scheduler.add(Request("a", (5, 6, 7), SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling)))


def test_the_next_step_computes_the_token_that_is_pending():
    scheduler, model = scheduler_of(), PagedModel(16, BLOCK, max_tokens=64, max_seqs=4)
    (sequence,) = asked(scheduler)
    first = scheduler.schedule()
    result = model.execute(first)
    scheduler.assume(first)
    (part,) = scheduler.schedule().sequences
    assert (part.token_ids, part.start, part.sample) == ((PENDING,), 3, True)
    assert sequence.token_ids == [5, 6, 7, PENDING]
    scheduler.update(first, result)
    assert sequence.token_ids == [5, 6, 7, *expected_tokens((5, 6, 7), 0, max_length=4)]
    assert sequence.num_computed_tokens == 3


def test_who_is_known_to_end_is_not_in_the_next_step():
    scheduler, model = scheduler_of(), PagedModel(16, BLOCK, max_tokens=64, max_seqs=4)
    (sequence,) = asked(scheduler, max_tokens=1)
    first = scheduler.schedule()
    scheduler.assume(first)
    assert scheduler.schedule().sequences == ()
    scheduler.update(first, model.execute(first))
    assert sequence.finish_reason is FinishReason.LENGTH
    assert scheduler.num_free_blocks == 16


def test_what_is_computed_after_an_end_is_not_found_by_the_next_request():
    """Four tokens make a block: the fourth ends the sequence, and is computed in the step under way."""
    scheduler, model = scheduler_of(), PagedModel(16, BLOCK, max_tokens=64, max_seqs=4)
    (sequence,) = asked(scheduler)
    first = scheduler.schedule()
    result = model.execute(first)
    scheduler.assume(first)
    second = known(scheduler.schedule(), result)
    said = model.execute(second)
    scheduler.update(first, result, lambda _sequence, _token: "stop")
    assert sequence.finished
    assert scheduler.update(second, said) == []
    assert scheduler.num_cached_blocks == 1
    (again,) = scheduler.add(Request("b", (*sequence.token_ids, 9), SamplingParams(max_tokens=1)))
    scheduler.schedule()
    assert again.num_cached_tokens == 3
    scheduler.check()


def test_a_request_may_be_aborted_while_its_token_is_pending():
    scheduler, model = scheduler_of(), PagedModel(16, BLOCK, max_tokens=64, max_seqs=4)
    asked(scheduler, n=2)
    first = scheduler.schedule()
    result = model.execute(first)
    scheduler.assume(first)
    scheduler.schedule()
    scheduler.abort("a")
    assert scheduler.update(first, result) == []
    scheduler.check()
    assert scheduler.num_free_blocks == 16
