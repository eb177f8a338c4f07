"""The token-budget loop, case by case, with `PagedModel` for a model."""

import pytest
from paged_model import PagedModel, expected_tokens

from kvarn.cache import BlockPool
from kvarn.config import SchedulerConfig
from kvarn.errors import QueueFullError, RequestError
from kvarn.request import FinishReason, Request, SamplingParams
from kvarn.scheduler import Scheduler
from kvarn.step import SampledToken, StepOutput

BLOCK = 4


class Bench:
    """A scheduler and a model, stepped by hand."""

    def __init__(self, *, blocks=64, seqs=8, tokens=32, max_model_len=100, queue=1024, eos=()):
        self.pool = BlockPool(blocks, BLOCK)
        self.model = PagedModel(blocks, BLOCK, max_tokens=tokens, max_seqs=seqs)
        config = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens, max_num_queued_requests=queue)
        self.scheduler = Scheduler(config, self.pool, max_model_len, eos_token_ids=eos)
        self.said: dict[int, list[int]] = {}

    def add(self, name, prompt, **sampling):
        sequences = self.scheduler.add(Request(name, tuple(prompt), SamplingParams(**sampling)))
        self.said |= {s.sequence_id: [] for s in sequences}
        return sequences

    def step(self):
        scheduled = self.scheduler.schedule()
        for sequence, token in self.scheduler.update(scheduled, self.model.execute(scheduled)):
            self.said[sequence.sequence_id].append(token.token_id)
        self.scheduler.check()
        return scheduled

    def run(self):
        for _ in range(10_000):
            if not self.scheduler.has_work():
                return
            self.step()
        raise AssertionError("the work does not end")


def lengths(scheduled):
    return [len(s.token_ids) for s in scheduled.sequences]


def test_a_prompt_is_computed_and_then_one_token_a_step():
    bench = Bench()
    (sequence,) = bench.add("a", range(10), max_tokens=3)
    first, second, third = bench.step(), bench.step(), bench.step()
    assert [lengths(s) for s in (first, second, third)] == [[10], [1], [1]]
    assert [s.sequences[0].start for s in (first, second, third)] == [0, 10, 11]
    assert [n.sequence_id for n in first.new] == [sequence.sequence_id]
    assert sequence.finish_reason is FinishReason.LENGTH
    assert bench.step().finished == (sequence.sequence_id,)
    assert not bench.scheduler.has_work()
    assert bench.said[sequence.sequence_id] == expected_tokens(range(10), 0, max_length=13)


def test_a_long_prompt_is_computed_in_chunks_and_sampled_after_the_last():
    bench = Bench(tokens=8)
    bench.add("a", range(20), max_tokens=1)
    steps = [bench.step() for _ in range(3)]
    assert [lengths(s) for s in steps] == [[8], [8], [4]]
    assert [s.sequences[0].sample for s in steps] == [False, False, True]


def test_a_prompt_shares_the_budget_with_running_sequences():
    bench = Bench(tokens=8)
    bench.add("a", range(4), max_tokens=9)
    bench.step()
    bench.add("b", range(20), max_tokens=1)
    assert lengths(bench.step()) == [1, 7]
    assert lengths(bench.step()) == [1, 7]
    assert lengths(bench.step()) == [1, 6]


def test_waiting_requests_are_admitted_in_order_of_arrival():
    bench = Bench(seqs=2)
    ids = [bench.add(name, range(3), max_tokens=2)[0].sequence_id for name in "abcd"]
    assert [n.sequence_id for n in bench.step().new] == ids[:2]
    bench.step()
    assert [n.sequence_id for n in bench.step().new] == ids[2:]


def test_a_request_behind_one_that_does_not_fit_yet_waits():
    bench = Bench(blocks=8, tokens=32)
    bench.add("a", range(16), max_tokens=8)
    bench.step()
    bench.add("big", range(20), max_tokens=1)
    bench.add("small", range(2), max_tokens=1)
    assert [s.sequence_id for s in bench.step().sequences] == [0]
    bench.run()
    assert [len(bench.said[i]) for i in range(3)] == [8, 1, 1]


def test_when_blocks_run_out_the_latest_is_preempted_and_says_the_same():
    bench = Bench(blocks=8, tokens=32, max_model_len=32)
    bench.add("a", range(8), max_tokens=20)
    bench.add("b", range(100, 108), max_tokens=20)
    bench.run()
    assert bench.scheduler.num_preemptions > 0
    assert bench.said == {
        0: expected_tokens(range(8), 0, max_length=28),
        1: expected_tokens(range(100, 108), 0, max_length=28),
    }
    assert bench.pool.num_free == 8


def test_the_preempted_one_waits_in_front_of_later_requests():
    bench = Bench(blocks=8, seqs=3, tokens=32, max_model_len=32)
    bench.add("a", range(8), max_tokens=20)
    bench.add("b", range(8), max_tokens=20)
    while not bench.scheduler.num_preemptions:
        bench.step()
    bench.add("c", range(1), max_tokens=1)
    order = []
    while bench.scheduler.has_work():
        order += [s.sequence_id for s in bench.step().sequences if s.sequence_id not in order]
    assert order == [0, 1, 2]


def test_a_waiting_sequence_gives_up_shared_blocks_before_the_running_one_is_preempted():
    bench = Bench(blocks=8, seqs=1, tokens=32, max_model_len=32)
    bench.add("a", range(10), max_tokens=22, n=2)
    starts = []
    while bench.scheduler.num_running or not starts:
        starts += [s.start for s in bench.step().sequences if s.sequence_id == 0]
    assert bench.scheduler.num_preemptions > 0
    assert starts == [0, *range(10, 31)], "the first is never set back"
    bench.run()
    assert bench.said == {i: expected_tokens(range(10), i, max_length=32) for i in range(2)}


def test_abort_frees_blocks_at_once_in_every_state():
    bench = Bench(seqs=1, tokens=8)
    bench.add("running", range(20), max_tokens=5)
    bench.add("waiting", range(4), max_tokens=5)
    bench.step()
    (waiting,) = bench.scheduler.abort("waiting")
    (running,) = bench.scheduler.abort("running")
    assert bench.pool.num_free == bench.pool.num_blocks
    assert {waiting.finish_reason, running.finish_reason} == {FinishReason.ABORT}
    assert bench.step().finished == (running.sequence_id,), "the runner never heard of the waiting one"
    assert not bench.scheduler.has_work()
    assert bench.scheduler.abort("running") == []


def test_abort_between_schedule_and_update_drops_the_token():
    bench = Bench()
    bench.add("a", range(4), max_tokens=5)
    bench.add("b", range(4), max_tokens=5)
    scheduled = bench.scheduler.schedule()
    bench.scheduler.abort("a")
    sampled = bench.scheduler.update(scheduled, bench.model.execute(scheduled))
    assert [s.request.request_id for s, _ in sampled] == ["b"]
    bench.scheduler.check()
    assert bench.scheduler.schedule().finished == (0,)


def test_an_id_can_be_used_again_once_its_request_ended():
    bench = Bench()
    bench.add("a", range(4), max_tokens=5)
    with pytest.raises(RequestError, match="'a' is in use") as caught:
        bench.add("a", range(4))
    assert caught.value.field == "request_id"
    bench.scheduler.abort("a")
    bench.add("a", range(4), max_tokens=1)
    bench.run()


@pytest.mark.parametrize(
    ("prompt", "sampling", "field", "message"),
    [
        (0, {}, "prompt", "at least 1 token"),
        (100, {}, "prompt", r"100 tokens, but the model's limit is 100 tokens.*at most 99"),
        (90, {"max_tokens": 11}, "max_tokens", r"90 prompt tokens and max_tokens 11 make 101.*at most 10"),
        (90, {"min_tokens": 11}, "min_tokens", r"make 101.*at most 10"),
    ],
)
def test_what_could_never_run_is_refused_with_the_numbers(prompt, sampling, field, message):
    with pytest.raises(RequestError, match=message) as caught:
        Bench().add("a", range(prompt), **sampling)
    assert caught.value.field == field


def test_what_the_whole_cache_cannot_hold_is_refused():
    with pytest.raises(RequestError, match="the KV cache holds 16 tokens"):
        Bench(blocks=4).add("a", range(10), max_tokens=7)
    bench = Bench(blocks=4)
    bench.add("a", range(10), max_tokens=6)
    bench.run()


def test_a_full_queue_refuses_the_next_request():
    bench = Bench(seqs=1, queue=2)
    bench.add("a", range(4), max_tokens=2)
    bench.step()
    bench.add("b", range(4), max_tokens=2)
    bench.add("c", range(4), max_tokens=2)
    with pytest.raises(QueueFullError, match="2 requests are waiting, the limit is 2"):
        bench.add("d", range(4), max_tokens=2)
    bench.scheduler.abort("b")
    bench.add("d", range(4), max_tokens=2)
    bench.run()


def feed(bench, *tokens):
    """Lets the model say the given tokens."""
    for token in tokens:
        scheduled = bench.scheduler.schedule()
        said = tuple(SampledToken(s.sequence_id, token) for s in scheduled.sequences if s.sample)
        bench.scheduler.update(scheduled, StepOutput(scheduled.step, said))


@pytest.mark.parametrize(
    ("sampling", "said", "reason", "stop"),
    [
        ({}, [5, 7], FinishReason.STOP, None),
        ({"ignore_eos": True, "max_tokens": 3}, [7, 7, 5], FinishReason.LENGTH, None),
        ({"stop_token_ids": (9,)}, [5, 9], FinishReason.STOP, 9),
        ({"stop_token_ids": (7,), "ignore_eos": True}, [5, 7], FinishReason.STOP, 7),
        ({"min_tokens": 2}, [7, 7, 7], FinishReason.STOP, None),
        ({"max_tokens": 2}, [5, 7], FinishReason.STOP, None),
        ({}, [5] * 6, FinishReason.LENGTH, None),
    ],
    ids=["eos", "ignore_eos", "stop_token", "stop_token_over_ignore_eos", "min_tokens", "eos_last", "model_length"],
)
def test_why_a_sequence_ends(sampling, said, reason, stop):
    bench = Bench(max_model_len=10, eos=(7,))
    (sequence,) = bench.add("a", range(4), **sampling)
    feed(bench, *said[:-1])
    assert not sequence.finished
    feed(bench, said[-1])
    assert (sequence.finish_reason, sequence.stop_reason) == (reason, stop)
    assert sequence.token_ids[4:] == said
    assert bench.pool.num_free == bench.pool.num_blocks


def test_finish_from_outside_ends_one_sequence():
    bench = Bench()
    first, second = bench.add("a", range(6), max_tokens=9, n=2)
    bench.step()
    bench.step()
    bench.scheduler.finish(first.sequence_id, FinishReason.STOP, "END")
    bench.scheduler.finish(12345, FinishReason.STOP)
    bench.scheduler.check()
    assert first.stop_reason == "END"
    bench.run()
    assert len(bench.said[second.sequence_id]) == 9


def test_the_sequences_of_a_request_share_its_prompt():
    bench = Bench(tokens=16)
    bench.add("a", range(30), max_tokens=4, n=3)
    assert [lengths(bench.step()) for _ in range(2)] == [[16], [14]]
    third = bench.step()
    assert lengths(third) == [1, 1, 1], "the others compute the last prompt token only"
    assert [s.start for s in third.sequences] == [30, 29, 29]
    assert len(third.block_copies) == 2, "of three owners of the last block, two copy it"
    bench.run()
    assert bench.said == {i: expected_tokens(range(30), i, max_length=34) for i in range(3)}


def test_aborting_while_the_prompt_is_computed_ends_all_its_sequences():
    bench = Bench(tokens=8)
    sequences = bench.add("a", range(30), max_tokens=4, n=3)
    bench.step()
    assert len(bench.scheduler.abort("a")) == 3
    assert all(s.finished for s in sequences)
    bench.scheduler.check()
    bench.run()


def test_the_others_go_on_when_the_first_ends_before_the_prompt_is_computed():
    bench = Bench(tokens=8)
    first, second = bench.add("a", range(30), max_tokens=4, n=2)
    bench.step()
    bench.scheduler.finish(first.sequence_id, FinishReason.ABORT)
    bench.scheduler.check()
    bench.run()
    assert bench.said[second.sequence_id] == expected_tokens(range(30), 1, max_length=34)


def test_a_result_of_another_step_is_refused():
    bench = Bench()
    bench.add("a", range(4))
    scheduled = bench.scheduler.schedule()
    with pytest.raises(ValueError, match="step 7 for step 1"):
        bench.scheduler.update(scheduled, StepOutput(7, ()))


def test_a_seed_of_the_request_wins_over_the_engines():
    bench = Bench()
    bench.scheduler.add(Request("a", (1,), SamplingParams(max_tokens=1)), seed=11)
    bench.scheduler.add(Request("b", (1,), SamplingParams(max_tokens=1, seed=5)), seed=12)
    assert [n.seed for n in bench.scheduler.schedule().new] == [11, 5]
