"""What an engine answers, step by step: text, stops, seeds, n, logprobs, limits."""

import itertools
from dataclasses import replace

import pytest
from tiny_engine import EOS, Script, Wrapper, handmade_engine, request, run_core, text_of, tokens_of

from kvarn.engine.events import RequestFailed
from kvarn.errors import EngineError, QueueFullError, RequestError
from kvarn.request import FinishReason, Request, RequestOutput, SamplingParams
from kvarn.scheduler import MeasuredCost
from kvarn.testing import byte_tokenizer


@pytest.fixture
def make_core():
    """Cores; closed at the end of the test. `says`: what its sampler says, instead of what the logits want."""
    cores = []

    def make(*says, **settings):
        wrap = (lambda sampler: Script(sampler, *says)) if says else (lambda sampler: sampler)
        cores.append(handmade_engine(wrap_sampler=wrap, **settings).core)
        return cores[-1]

    yield make
    for core in cores:
        core.close()


def last_part(outputs, index=0):
    return next(part for output in reversed(outputs) for part in output.outputs if part.index == index)


def test_outputs_are_deltas_and_the_last_one_says_finished(make_core):
    outputs = run_core(make_core("Hello."), [request("a", "Hi", max_tokens=6)])["a"]
    assert [o.outputs[0].text for o in outputs] == list("Hello.")
    assert [o.finished for o in outputs] == [False] * 5 + [True]
    assert {(o.num_prompt_tokens, o.num_cached_tokens) for o in outputs} == {(2, 0)}
    assert outputs[-1].outputs[0].finish_reason is FinishReason.LENGTH


def test_code_points_come_whole(make_core):
    said = "aé漢🙂!"
    outputs = run_core(make_core(said), [request("a", "x", max_tokens=len(said.encode()))])["a"]
    assert [o.outputs[0].text for o in outputs] == ["a", "", "é", "", "", "漢", "", "", "", "🙂", "!"]
    assert text_of(outputs) == said


def test_the_end_of_text_is_no_text_but_a_token(make_core):
    core = make_core([*b"Hi", EOS])
    outputs = run_core(core, [request("a", "x", ignore_eos=False)])["a"]
    assert (text_of(outputs), tokens_of(outputs)) == ("Hi", [*b"Hi", EOS])
    part = last_part(outputs)
    assert (part.finish_reason, part.stop_reason) == (FinishReason.STOP, None)


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "ab.")])
def test_a_stop_token_is_named_and_its_text_is_left_out_unless_asked_for(make_core, include, text):
    core = make_core("ab.cd")
    outputs = run_core(core, [request("a", "x", stop_token_ids=(ord("."),), include_stop_str_in_output=include)])["a"]
    assert text_of(outputs) == text
    assert (last_part(outputs).finish_reason, last_part(outputs).stop_reason) == (FinishReason.STOP, ord("."))


@pytest.mark.parametrize(("include", "text"), [(False, "one "), (True, "one END")])
def test_a_stop_string_ends_the_sequence_and_frees_its_blocks(make_core, include, text):
    core = make_core("one END two")
    outputs = run_core(core, [request("a", "x", stop=("END",), max_tokens=11, include_stop_str_in_output=include)])["a"]
    assert text_of(outputs) == text
    assert tokens_of(outputs) == list(b"one END")
    assert (last_part(outputs).finish_reason, last_part(outputs).stop_reason) == (FinishReason.STOP, "END")
    assert core.stats().free_blocks == core.stats().num_blocks


def test_what_may_begin_a_stop_string_is_held_back_and_given_at_the_end(make_core):
    core = make_core("a stoat")
    outputs = run_core(core, [request("a", "x", stop=("stop",), max_tokens=7)])["a"]
    assert [o.outputs[0].text for o in outputs] == ["a", " ", "", "", "", "stoa", "t"]


def test_what_is_held_back_comes_with_the_last_token(make_core):
    outputs = run_core(make_core("a sto"), [request("a", "x", stop=("stop",), max_tokens=5)])["a"]
    assert [o.outputs[0].text for o in outputs] == ["a", " ", "", "", "sto"]
    outputs = run_core(make_core("é!"), [request("a", "x", max_tokens=1)])["a"]
    assert text_of(outputs) == "\ufffd", "half a code point, and no more is coming"


def test_a_stop_string_in_the_very_last_token_counts_as_stop(make_core):
    outputs = run_core(make_core("abc"), [request("a", "x", stop=("bc",), max_tokens=3)])["a"]
    assert text_of(outputs) == "a"
    assert last_part(outputs).finish_reason is FinishReason.STOP


def test_stops_count_from_min_tokens_on(make_core):
    core = make_core("..a.b.")
    sampling = {"stop": (".",), "min_tokens": 3, "max_tokens": 6}
    assert text_of(run_core(core, [request("a", "x", **sampling)])["a"]) == "..a"


def test_n_sequences_end_one_by_one(make_core):
    core = make_core("one.", "number two.", "3.")
    outputs = run_core(core, [request("a", "x" * 40, n=3, stop=(".",), max_tokens=20)])["a"]
    assert [text_of(outputs, index) for index in range(3)] == ["one", "number two", "3"]
    assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
    assert core.stats().prompt_tokens == 40
    assert core.stats().generated_tokens == len("one.number two.3.")


def test_seeds_reproduce_and_streams_differ(make_core):
    core = make_core()
    sampling = {"temperature": 1.0, "max_tokens": 12}
    seeded = [request(name, "x", seed=seed, n=2, **sampling) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    outputs = run_core(core, seeded + [request(name, "x", **sampling) for name in "de"])
    tokens = {name: tokens_of(o) for name, o in outputs.items()}
    assert tokens["a"] == tokens["b"]
    assert tokens_of(outputs["a"], 1) == tokens_of(outputs["b"], 1)
    assert len({tuple(t) for t in tokens.values()} | {tuple(tokens_of(outputs["a"], 1))}) == 5, "all others differ"


def test_a_seed_says_the_same_when_preempted(make_core):
    quiet, busy = make_core(), make_core(num_blocks=8, max_model_len=128)
    sampling = {"temperature": 1.0, "seed": 7, "max_tokens": 60, "frequency_penalty": 1.0}
    wanted = [replace(request(name, "x" * 20, **sampling), cache_salt=name) for name in "abcd"]
    expected = run_core(quiet, wanted[:1])["a"]
    outputs = run_core(busy, wanted)
    assert busy.stats().preemptions > 0
    assert all(tokens_of(o) == tokens_of(expected) for o in outputs.values())


def test_logprobs_come_with_their_tokens(make_core):
    outputs = run_core(make_core(), [request("a", "x", logprobs=3, max_tokens=4)])["a"]
    assert len(outputs) == 4
    for output in outputs:
        (part,) = output.outputs
        (logprob,) = part.logprobs
        assert logprob.token_id == part.token_ids[0]
        assert logprob.rank == 1
        assert logprob.top[0] == (logprob.token_id, logprob.logprob)
        assert len(logprob.top) == 3


def test_abort_frees_blocks_at_once_and_gives_what_was_held_back(make_core):
    core = make_core("a sto")
    core.add(request("a", "x", stop=("stop",), max_tokens=5))
    for _ in range(4):
        core.step()
    output = core.abort("a")
    assert isinstance(output, RequestOutput)
    assert output.finished
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("st", FinishReason.ABORT)
    assert core.stats().free_blocks == core.stats().num_blocks
    assert core.abort("a") is None
    assert core.step() == []
    assert not core.has_work()


@pytest.mark.parametrize(
    ("prompt", "sampling", "field", "message"),
    [
        ((), {}, "prompt", "at least 1 token"),
        ((5, 259), {}, "prompt", "token ids are 0 to 258, not 259"),
        ((-1,), {}, "prompt", "token ids are 0 to 258, not -1"),
        ((1,) * 512, {}, "prompt", "512 tokens.*at most 511"),
        ((1,), {"max_tokens": 512}, "max_tokens", "at most 511"),
        ((1,), {"logit_bias": {900: 1.0}}, "logit_bias", "0 to 258, not 900"),
        ((1,), {"stop_token_ids": (259,)}, "stop_token_ids", "not 259"),
    ],
)
def test_requests_that_cannot_run_are_refused_by_field(make_core, prompt, sampling, field, message):
    core = make_core()
    with pytest.raises(RequestError, match=message) as caught:
        core.add(request("a", prompt, **sampling))
    assert caught.value.field == field
    assert not core.has_work()


def test_a_priority_is_refused_rather_than_ignored(make_core):
    with pytest.raises(RequestError, match="not 1: this server's scheduling policy is fcfs"):
        make_core().add(Request("a", (1,), SamplingParams(), priority=1))


def test_the_queue_is_bounded(make_core):
    core = make_core(max_num_queued_requests=2)
    core.add(request("a", "x"))
    core.add(request("b", "x"))
    with pytest.raises(QueueFullError):
        core.add(request("c", "x"))
    assert core.stats().queued == 2


def test_each_step_that_succeeds_is_told_of_with_its_time(make_core):
    class Recorder:
        def __init__(self):
            self.steps = []

        def seconds(self, shape):
            return 0.001

        def observe(self, shape, seconds):
            self.steps.append((shape, seconds))

    cost = Recorder()
    core = make_core(cost=cost, max_num_batched_tokens=8)
    run_core(core, [request("a", "x" * 10, max_tokens=3)])
    # The last step only tells the runner who has ended.
    assert [shape.num_tokens for shape, _ in cost.steps] == [8, 2, 1, 1, 0]
    assert [shape.num_attended for shape, _ in cost.steps] == [36, 19, 11, 12, 0]
    assert [shape.num_sampled for shape, _ in cost.steps] == [0, 1, 1, 1, 0]
    assert all(0 < seconds < 60 for _, seconds in cost.steps)


@pytest.mark.parametrize("settings", [{"policy": "fair"}, {"policy": "priority"}, {"itl_target_ms": 0.001}])
def test_who_is_served_first_changes_no_answer(make_core, settings):
    """And neither does how small the chunks of a prompt are."""

    def requests(priorities):
        sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=20, ignore_eos=True)
        return [
            Request(str(i), tuple(b"some prompt " * (i + 1)), sampling, priority=priorities * -i, tenant="ab"[i % 2])
            for i in range(6)
        ]

    usual = run_core(make_core(), requests(0))
    core = make_core(max_num_seqs=3, num_blocks=12, max_model_len=128, **settings)
    other = run_core(core, requests(settings.get("policy") == "priority"))
    assert {name: tokens_of(o) for name, o in other.items()} == {name: tokens_of(o) for name, o in usual.items()}


def test_without_max_tokens_the_length_limit_ends_it(make_core):
    outputs = run_core(make_core(max_model_len=48), [request("a", "x" * 8, max_tokens=None)])["a"]
    assert len(tokens_of(outputs)) == 40
    assert last_part(outputs).finish_reason is FinishReason.LENGTH


def test_a_text_that_cannot_be_made_fails_its_own_request_only(make_core):
    class Broken(Wrapper):
        def text_bytes(self, token_id, skip_special_tokens):
            if token_id == ord("!"):
                raise IndexError(token_id)
            return self.inner.text_bytes(token_id, skip_special_tokens)

    core = make_core("ok!", tokenizer=Broken(byte_tokenizer()))
    core.add(request("a", "x", max_tokens=3))
    core.add(request("b", "y", max_tokens=2))
    events = [event for _ in range(4) for event in core.step()]
    (failed,) = (event for event in events if isinstance(event, RequestFailed))
    assert failed.request_id == "a"
    assert "error id" in str(failed.error)
    outputs = [event for event in events if isinstance(event, RequestOutput) and event.request_id == "b"]
    assert text_of(outputs) == "ok"
    assert core.stats().free_blocks == core.stats().num_blocks
    assert not core.has_work()


def test_what_moving_blocks_took_is_not_learned_as_what_steps_take(make_core):
    """A clock that moves by a second whenever it is read: four times a step."""
    learned = []

    class Listening(MeasuredCost):
        def observe(self, shape, seconds):
            learned.append(seconds)

    ticks = itertools.count()
    core = make_core(cost=Listening(), clock=lambda: next(ticks))
    execute = core._runner.execute
    core._runner.execute = lambda step: replace(execute(step), move_seconds=0.25)
    run_core(core, [request("a", "Hi", max_tokens=3)])
    assert len(learned) >= 3
    assert set(learned) == {3 - 0.25}


class Picky(Wrapper):
    """A sampler that cannot take sequences of one temperature in."""

    def __init__(self, inner, error) -> None:
        super().__init__(inner)
        self.error = error

    def add(self, sequence):
        if sequence.sampling.temperature == 0.5:
            raise self.error
        self.inner.add(sequence)


@pytest.mark.parametrize("error", [ValueError("secret detail"), RequestError("no such bias", field="logit_bias")])
@pytest.mark.parametrize("long", [False, True])
def test_a_sequence_that_cannot_be_taken_in_fails_alone(error, long):
    def run(*requests):
        core = handmade_engine(wrap_sampler=lambda sampler: Picky(sampler, error)).core
        events = []
        for each in requests:
            core.add(each)
        while core.has_work():
            events += core.step()
        free = core.stats().free_blocks == core.stats().num_blocks
        core.close()
        assert free
        failed = {event.request_id: event.error for event in events if isinstance(event, RequestFailed)}
        return failed, tokens_of([event for event in events if event.request_id == "good"])

    good, bad = request("good", "abc"), request("bad", "x" * (150 if long else 1), temperature=0.5)
    failed, beside = run(bad, good)
    assert (beside, list(failed)) == (run(good)[1], ["bad"])
    if isinstance(error, RequestError):
        assert (str(failed["bad"]), failed["bad"].field) == ("no such bias", "logit_bias")
    else:
        assert isinstance(failed["bad"], EngineError)
        assert "error id" in str(failed["bad"])
        assert "secret" not in str(failed["bad"])
