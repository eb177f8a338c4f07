"""An engine one step ahead of what it has read says what one says that waits for every token."""

import numpy as np
import pytest
from fake_ahead import AheadOnCpu, steps_ahead
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import EOS, Wrapper, handmade_engine, request, run_core, text_of, tokens_of

from kvarn.engine.events import RequestFailed
from kvarn.request import FinishReason

PROMPTS = ["Hello", "Hello there, what do you", "Hello there, what do you say to a long prompt of many tokens?", "x"]


@pytest.fixture
def engines():
    """Pairs of a core that waits and one that is ahead, and the latter's executable; closed at the end."""
    cores = []

    def make(*, late=True, poison=(), **settings):
        executables = []

        def wrap(executable):
            executables.append(AheadOnCpu(executable, late=late, poison=poison))
            return executables[-1]

        waits = handmade_engine(**settings).core
        ahead = handmade_engine(wrap_executable=wrap, ahead=steps_ahead, **settings).core
        cores.extend((waits, ahead))
        return waits, ahead, executables[0]

    yield make
    for core in cores:
        core.close()


def said(outputs):
    """Per request: tokens, text and end of each of its answers."""
    ends = {
        name: {p.index: (p.finish_reason, p.stop_reason) for o in parts for p in o.outputs if p.finish_reason}
        for name, parts in outputs.items()
    }
    return {
        name: {index: (tokens_of(parts, index), text_of(parts, index), end) for index, end in ends[name].items()}
        for name, parts in outputs.items()
    }


def finish(core):
    """All events of what is there."""
    events = []
    while core.has_work():
        events += core.step()
    return events


@pytest.mark.parametrize("late", [True, False])
def test_the_same_is_said_and_hardly_a_step_waits(engines, late):
    waits, ahead, executable = engines(late=late)
    requests = [
        request("greedy", PROMPTS[0], max_tokens=20),
        request("drawn", PROMPTS[1], max_tokens=20, temperature=1.0, seed=3, top_p=0.9, top_k=40),
        request("three", PROMPTS[2], max_tokens=9, temperature=0.8, seed=1, n=3),
        request("biased", PROMPTS[3], max_tokens=7, logit_bias={65: 3.0}, bad_words=((101,),)),
        request("penalized", PROMPTS[1], max_tokens=20, frequency_penalty=1.0, repetition_penalty=1.3),
        request("least", PROMPTS[3], max_tokens=6, min_tokens=3, stop_token_ids=tuple(range(0, 256, 2))),
    ]
    assert said(run_core(ahead, requests)) == said(run_core(waits, requests))
    assert executable.num_fed > 70
    assert executable.most_under_way == 2
    assert executable.num_executed == 0
    assert ahead.stats().free_blocks == ahead.stats().num_blocks


def test_chunks_of_a_prompt_that_nothing_is_sampled_from_are_submitted_too(engines):
    waits, ahead, executable = engines(max_num_batched_tokens=64)
    requests = [request("long", "x" * 150, max_tokens=2)]
    assert said(run_core(ahead, requests)) == said(run_core(waits, requests))
    assert (executable.num_submitted, executable.num_executed) == (4, 0)


@pytest.mark.parametrize("late", [True, False])
def test_what_ends_a_text_ends_it_where_it_should(engines, late):
    """By a stop token, by a stop string that the text brings up, by the end of the model: all seen a step too late."""
    waits, ahead, _ = engines(late=late, num_blocks=12)
    plain = run_core(waits, [request("plain", PROMPTS[1], max_tokens=30)])["plain"]
    tokens, text = tokens_of(plain), text_of(plain)
    requests = [
        request("token", PROMPTS[1], max_tokens=30, stop_token_ids=(tokens[9],)),
        request("string", PROMPTS[1], max_tokens=30, stop=(text[4:7],)),
        request("end", PROMPTS[3], max_tokens=12, ignore_eos=False, logit_bias={EOS: 100.0}),
        request("again", PROMPTS[1], max_tokens=30),
    ]
    outputs = run_core(ahead, requests)
    assert said(outputs) == said(run_core(waits, requests))
    assert {outputs[name][-1].outputs[0].finish_reason for name in ("token", "string", "end")} == {FinishReason.STOP}
    assert ahead.stats().generated_tokens == sum(len(tokens_of(parts)) for parts in outputs.values())
    again = run_core(ahead, [request("later", PROMPTS[1] + text, max_tokens=5)])
    assert said(again) == said(run_core(waits, [request("later", PROMPTS[1] + text, max_tokens=5)]))
    assert again["later"][-1].num_cached_tokens > 16


def test_what_needs_the_host_waits_and_the_others_go_on(engines):
    waits, ahead, executable = engines()
    requests = [
        request("plain", PROMPTS[0], max_tokens=30),
        request("penalized", PROMPTS[1], max_tokens=30, frequency_penalty=1.0, repetition_penalty=1.2),
        request("told", PROMPTS[2], max_tokens=6, logprobs=2),
        request("least", PROMPTS[3], max_tokens=20, min_tokens=9, stop_token_ids=tuple(range(0, 256, 5))),
        request("words", PROMPTS[3], max_tokens=3, bad_words=((65, 66),)),
        request("asked", PROMPTS[3], max_tokens=3, prompt_logprobs=1),
    ]
    both = [run_core(core, requests) for core in (ahead, waits)]
    assert said(both[0]) == said(both[1])
    logprobs = [[p.logprobs for o in outputs["told"] for p in o.outputs] for outputs in both]
    assert logprobs[0] == logprobs[1]
    assert executable.num_executed >= 6
    assert executable.num_fed >= 15


class Remembering(Wrapper):
    """A sampler that knows whom it knows."""

    known = frozenset()

    def add(self, sequence):
        self.inner.add(sequence)
        type(self).known |= {sequence.sequence_id}

    def remove(self, sequence_id):
        self.inner.remove(sequence_id)
        type(self).known -= {sequence_id}


@pytest.mark.parametrize("end", [{"max_tokens": 8}, {"ignore_eos": False, "logit_bias": {EOS: 100.0}}])
def test_an_idle_engine_has_nothing_under_way_and_knows_nobody(engines, end):
    _, ahead, executable = engines(wrap_sampler=Remembering)
    run_core(ahead, [request("a", PROMPTS[0], **end)])
    assert executable.under_way == 0
    assert not ahead.has_work()
    assert not Remembering.known


def test_what_is_under_way_is_forgotten_on_close(engines):
    _, ahead, executable = engines()
    ahead.add(request("a", PROMPTS[0]))
    ahead.step()
    assert executable.under_way == 1
    ahead.close()
    assert executable.under_way == 0


class _Driver:
    """Adds and aborts at given steps; keeps what comes."""

    def __init__(self, core):
        self.core = core
        self.outputs = {}

    def run(self, plan):
        for kind, what in plan:
            if kind == "add":
                self.core.add(what)
            elif kind == "abort":
                self.take([] if (last := self.core.abort(what)) is None else [last])
            else:
                for _ in range(what):
                    if self.core.has_work():
                        self.take(self.core.step())
        while self.core.has_work():
            self.take(self.core.step())
        return self.outputs

    def take(self, events):
        for event in events:
            self.outputs.setdefault(event.request_id, []).append(event)


REQUESTS = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from(PROMPTS),
        "max_tokens": st.integers(1, 24),
        "temperature": st.sampled_from([0.0, 1.0]),
        "seed": st.integers(0, 3),
        "n": st.sampled_from([1, 1, 2]),
        "stop_token_ids": st.sampled_from([(), tuple(range(97, 123))]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.2]),
        "min_tokens": st.just(0) | st.just(1),
        "logprobs": st.sampled_from([None, None, None, 0]),
    }
)
PLANS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), REQUESTS),
        st.tuples(st.just("abort"), st.integers(0, 3)),
        st.tuples(st.just("steps"), st.integers(1, 6)),
    ),
    min_size=2,
    max_size=12,
)


@settings(max_examples=25, deadline=None)
@given(PLANS, st.booleans(), st.sampled_from([7, 12, 64]))
def test_whoever_comes_and_goes_the_same_is_said(plan, late, num_blocks):
    """Few blocks: somebody is preempted. What is aborted says the beginning of what it says otherwise."""
    named, number = [], 0
    for kind, what in plan:
        if kind == "add":
            named.append((kind, request(str(number), **what)))
            number += 1
        else:
            named.append((kind, str(what) if kind == "abort" else what))
    executables = []

    def wrap(executable):
        executables.append(AheadOnCpu(executable, late=late))
        return executables[0]

    sizes = {"num_blocks": num_blocks, "max_num_seqs": 4, "max_num_batched_tokens": 24, "max_model_len": 100}
    ahead = handmade_engine(wrap_executable=wrap, ahead=steps_ahead, **sizes).core
    waits = handmade_engine(**sizes).core
    try:
        got = _Driver(ahead).run(named)
        want = _Driver(waits).run([item for item in named if item[0] != "abort"])
        aborted = {what for kind, what in named if kind == "abort"}
        for name, parts in want.items():
            if name not in aborted:
                assert said({name: got[name]}) == said({name: parts})
            else:
                for index in range(2):
                    tokens = tokens_of(got.get(name, []), index)
                    assert tokens == tokens_of(parts, index)[: len(tokens)]
        assert ahead.stats().free_blocks == num_blocks
        assert not executables[0].under_way
    finally:
        ahead.close()
        waits.close()


def test_who_has_no_token_left_fails_alone(engines):
    waits, ahead, _ = engines()
    plain = request("plain", PROMPTS[0], max_tokens=12)
    nothing = request("nothing", PROMPTS[3], max_tokens=12, allowed_token_ids=(65,), bad_words=((65,),))
    expected = said(run_core(waits, [plain]))
    ahead.add(plain)
    ahead.add(nothing)
    events = finish(ahead)
    failed = [event for event in events if isinstance(event, RequestFailed)]
    assert [(event.request_id, event.error.field) for event in failed] == [("nothing", "allowed_token_ids")]
    assert said({"plain": [event for event in events if event.request_id == "plain"]}) == expected


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("bad", [{}, {"n": 2, "temperature": 1.0, "seed": 1}, {"frequency_penalty": 1.0}])
@pytest.mark.parametrize("step", [0, 3])
def test_whose_logits_are_no_numbers_fails_alone(engines, late, bad, step):
    """It is in the step under way already, in which it reads the token that there is not, and may be wrong again."""
    waits, ahead, executable = engines(late=late, poison=(step, step + 1))
    others = [request("b", PROMPTS[1], max_tokens=12), request("c", PROMPTS[2], max_tokens=12, seed=1, temperature=1.0)]
    expected = said(run_core(waits, others))
    crowd = [request("a", PROMPTS[0], max_tokens=12, **bad), others[0], request("d", PROMPTS[0]), others[1]]
    for each in crowd:
        ahead.add(each)
    events = finish(ahead)
    failed = [event for event in events if isinstance(event, RequestFailed)]
    assert [event.request_id for event in failed] == ["a"]
    assert "NaN or infinity" in str(failed[0].error)
    outputs = {name: [e for e in events if e.request_id == name] for name in ("b", "c")}
    assert said(outputs) == expected
    assert ahead.stats().free_blocks == ahead.stats().num_blocks
    assert ahead.stats().failed_steps == 0
    assert executable.num_executed == 0
    assert executable.under_way == 0


def test_a_program_that_fails_in_the_step_under_way_fails_the_step_before(engines):
    """Its tokens are lost with it: they were not booked."""
    _, ahead, executable = engines(late=False)

    class Breaks(Wrapper):
        calls = 0

        def execute(self, batch, outputs=()):
            type(self).calls += 1
            if self.calls == 3:
                raise RuntimeError("the card fell off")
            return self.inner.execute(batch, outputs)

    executable.inner = Breaks(executable.inner)
    ahead.add(request("a", PROMPTS[0], max_tokens=12))
    with pytest.raises(RuntimeError, match="the card fell off"):
        finish(ahead)
    ahead.reset()
    assert not ahead.has_work()


def test_arrays_of_a_submitted_step_are_the_caller_s_again(engines):
    """The fake writes over them; a plan or a table that the runner kept from them would be wrong now."""
    waits, ahead, executable = engines()
    requests = [request(str(i), PROMPTS[i], max_tokens=40) for i in range(4)]
    assert said(run_core(ahead, requests)) == said(run_core(waits, requests))
    assert np.all(executable._last >= 0)
