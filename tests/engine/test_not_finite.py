"""A request whose row of logits is no row of numbers fails alone; nothing it has computed is used for another."""

import itertools

import pytest
from broken_numbers import BAD, BadMemory, Guesses, poisoned_model
from random_heads import heads_file
from tiny_engine import handmade_engine, request, tiny_engine

from kvarn.backends.row_rules import NOT_FINITE, NOTHING_LEFT
from kvarn.config import SpeculativeConfig
from kvarn.engine.events import RequestFailed, merge_outputs
from kvarn.errors import EngineError
from kvarn.request import Grammar, Pooling, Request, SamplingParams
from kvarn.runner.failures import without_failed
from kvarn.step import FailedSequence, SampledToken

GOOD = [
    request("greedy", "hello there, what do you", max_tokens=20),
    request("drawn", "hello there", max_tokens=20, temperature=1.0, seed=3, logprobs=2, bad_words=((BAD,),)),
    request("three", "x", max_tokens=9, temperature=0.8, seed=1, n=3, bad_words=((BAD,),)),
    request("asked", "what is it", max_tokens=6, prompt_logprobs=1),
    request("bound", "say it", max_tokens=10, ignore_eos=False, grammar=Grammar.regex("[a-z ]{30}")),
]
"""Say nothing that they may not."""


@pytest.fixture
def make():
    """Cores of tiny engines, closed at the end."""
    cores = []

    def made(core):
        cores.append(core)
        return core

    yield made
    for core in cores:
        core.close()


def poisoned(**settings):
    return tiny_engine(**{"model": poisoned_model(), "backend": "cpu", "max_num_batched_tokens": 128, **settings}).core


def failing(core, requests, bad):
    """What comes of all others, by request; `bad` must fail, and nothing else."""
    for each in requests:
        core.add(each)
    events = []
    while core.has_work():
        events += core.step()
    failed = {event.request_id: event.error for event in events if isinstance(event, RequestFailed)}
    assert sorted(failed) == sorted(bad)
    for error in failed.values():
        assert type(error) is EngineError
        assert "NaN or infinity" in str(error) and "error id" in str(error)
    stats = core.stats()
    assert stats.failed_steps == 0
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.num_blocks)
    core._scheduler.check()
    gathered = {}
    for event in events:
        if event.request_id not in failed:
            gathered.setdefault(event.request_id, []).append(event)
    return {name: merge_outputs(outputs) for name, outputs in gathered.items()}


def said(outputs):
    return {name: (output.outputs, output.prompt_logprobs) for name, output in outputs.items()}


def tokens(outputs):
    return {name: [part.token_ids for part in output.outputs] for name, output in outputs.items()}


def bad_requests():
    """At their first token and later, in all the ways that a row may be asked for."""
    first = "hello there, what do you\0"
    return [
        request("first", first),
        request("told", first, logprobs=3),
        request("penalized", first, temperature=1.0, seed=1, repetition_penalty=1.3, min_tokens=2),
        request("bound bad", first, ignore_eos=False, grammar=Grammar.regex("[a-z ]{30}")),
        request("middle", "hello \0there"),
        request("chunks", "it begins with a beginning, \0 and goes on for quite some time", n=2, max_tokens=3),
        request("prompt", "hello \0there", prompt_logprobs=2),
        request("later", "hello there, what", logit_bias={BAD: 100.0}),
        request("all of three", "hello", n=3, temperature=1.0, seed=5, logit_bias={BAD: 4.0}, max_tokens=40),
        Request("vector", tuple(first.encode()), SamplingParams(max_tokens=1), pooling=Pooling.LAST),
        Request("mean", tuple(b"hello \0there"), SamplingParams(max_tokens=1), pooling=Pooling.MEAN),
    ]


CASES = {
    "plain": {},
    "reference": {"backend": "reference"},
    "threads": {"threads": 2, "max_num_seqs": 16},
    "chunks": {"max_num_batched_tokens": 16, "num_blocks": 24, "max_model_len": 96},
    "ngram": {"speculative": SpeculativeConfig(k=4)},
    "lookahead": {"speculative": SpeculativeConfig("lookahead", k=12)},
    "window": {"family": "mistral", "speculative": SpeculativeConfig()},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_only_those_fail_whose_rows_are_bad(make, settings):
    model = poisoned_model(settings.get("family", "llama"))
    settings = {name: value for name, value in settings.items() if name != "family"}
    bad = bad_requests()
    same = tokens if settings.get("backend") == "reference" else said  # which promises no bits
    alone = same(failing(make(poisoned(model=model, **settings)), GOOD, ()))
    core = make(poisoned(model=model, **settings))
    crowd = [each for pair in itertools.zip_longest(bad, GOOD) for each in pair if each is not None]
    assert same(failing(core, crowd, {each.request_id for each in bad})) == alone
    assert core.meter.ended["error"] == sum(each.sampling.n for each in bad)
    assert same(failing(core, GOOD, ())) == alone, "and nothing is left of it"


def test_guesses_that_have_no_numbers_are_wrong_and_no_more(make):
    """Their rows, and KV of NaN where there is such a thing, stand beside the right ones in each step."""
    for backend in ("cpu", "reference"):
        model = poisoned_model()
        common = {"backend": backend, "model": model, "dtype": "float32", "max_num_batched_tokens": 128}
        requests = [each for each in GOOD if each.sampling.grammar is None]
        alone = tokens(failing(make(handmade_engine(**common).core), requests, ()))
        config = SpeculativeConfig(k=8)
        core = make(handmade_engine(**common, speculative=config, wrap_drafter=lambda _: Guesses(BAD, 65)).core)
        assert tokens(failing(core, requests, ())) == alone
        assert core.stats().draft_tokens > 100


def test_a_guess_that_is_right_and_has_no_numbers_fails_its_request(make):
    """In the step that verifies it, as the token alone would in the step after it."""
    config = SpeculativeConfig(k=8)
    core = make(
        handmade_engine(
            model=poisoned_model(), dtype="float32", max_num_batched_tokens=128, speculative=config,
            wrap_drafter=lambda _: Guesses(65, BAD),
        ).core
    )  # fmt: skip
    says = request("bad", "hello", logit_bias={BAD: 100.0}, max_tokens=30)
    first = request("good", "hello there", max_tokens=30)
    failing(core, [says, first], {"bad"})
    assert core.stats().draft_tokens > 100


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
def test_heads_that_read_hidden_states_of_others_guess_on(make, tmp_path, kind):
    model = poisoned_model()
    config = SpeculativeConfig(kind, k=3, heads=heads_file(tmp_path, model, kind))
    alone = said(failing(make(poisoned(model=model)), GOOD, ()))
    core = make(poisoned(model=model, speculative=config))
    bad = [each for each in bad_requests() if each.pooling is None]
    crowd = [each for pair in itertools.zip_longest(bad, GOOD) for each in pair if each is not None]
    assert said(failing(core, crowd, {each.request_id for each in bad})) == alone
    assert core.stats().draft_tokens > 0


def test_a_row_of_logits_in_a_prompt_tells_too(make):
    """Where nobody sees hidden states."""
    core = make(handmade_engine(model=poisoned_model()).core)
    good = request("good", "hello there", prompt_logprobs=2)
    alone = said(failing(core, [good], ()))
    assert said(failing(core, [request("bad", "hello \0there", prompt_logprobs=2), good], {"bad"})) == alone


def test_whatever_else_is_wrong_with_it_what_has_no_numbers_is_not_kept():
    sampled = [SampledToken(1, 65), SampledToken(2, 66), SampledToken(2, NOT_FINITE), SampledToken(3, NOTHING_LEFT)]
    kept, failed = without_failed(sampled, [FailedSequence(4, "no", ""), FailedSequence(2, "too complex")])
    assert kept == [SampledToken(1, 65)]
    assert [(failure.sequence_id, failure.finite) for failure in failed] == [(2, False), (4, True), (3, True)]


LONG = "a prompt of some sixty tokens! so it fills three blocks, and more"


@pytest.fixture(params=["cpu", "reference"])
def bad_memory(request, make):
    """A core whose memory can go bad, and what the same says where it does not."""
    executables = []

    def build(wrap=lambda executable: executable, **settings):
        dtype = {"cpu": "float16", "reference": "float32"}[request.param]
        settings = {"max_num_batched_tokens": 24, "max_num_seqs": 4, **settings}
        return make(handmade_engine(backend=request.param, dtype=dtype, wrap_executable=wrap, **settings).core)

    def pair(*, logits=False, **settings):
        def wrap(executable):
            executables.append(BadMemory(executable, logits=logits))
            return executables[-1]

        return build(wrap, **settings), executables[-1], build(**settings)

    return pair


def asked(name, text=LONG, **sampling):
    return request(name, text, **{"max_tokens": 4, **sampling})


def test_what_a_bad_request_computed_is_found_by_nobody(bad_memory):
    """Of the chunk that went bad and of those before it, which the tree has had since their steps."""
    core, memory, sound = bad_memory()
    expected = tokens(failing(sound, [asked("again"), asked("other", "nothing")], ()))
    memory.faults = 1
    got = failing(core, [asked("bad"), asked("other", "nothing")], {"bad"})
    assert core.stats().cached_blocks == 1, "that of the other's"
    got |= failing(core, [asked("again")], ())
    assert got["again"].num_cached_tokens == 0
    assert tokens(got) == expected
    assert failing(core, [asked("third")], ())["third"].num_cached_tokens > 48, "what is right is kept"


def test_all_choices_of_a_bad_request_are_forgotten(bad_memory):
    core, memory, sound = bad_memory()
    expected = tokens(failing(sound, [asked("again", n=3)], ()))
    memory.faults = 1
    failing(core, [asked("bad", n=3)], {"bad"})
    assert core.stats().cached_blocks == 0
    assert tokens(failing(core, [asked("again", n=3)], ())) == expected


def test_what_was_left_unread_fails_one_request_and_no_more(bad_memory):
    """It was aborted before anybody could see that it is bad. The first that reads it fails, and takes it away."""
    core, memory, sound = bad_memory()
    expected = tokens(failing(sound, [asked("again", LONG + "?")], ()))
    memory.faults = 1
    core.add(asked("left"))
    while memory.faults:
        core.step()
    core.abort("left")
    assert core.stats().cached_blocks > 0
    failing(core, [asked("reads", LONG + "??")], {"reads"})
    assert tokens(failing(core, [asked("again", LONG + "?")], ())) == expected


def test_who_computes_the_same_block_in_the_same_step_keeps_its_own(bad_memory):
    """Whoever's is filed first is everybody's; what is known to be bad is not filed."""
    core, memory, sound = bad_memory(logits=True, max_num_batched_tokens=128)
    long = asked("long", "sixteen tokens.." + "and more than twice as many that are its own, so it waits for nobody")
    expected = tokens(failing(sound, [long], ()))
    memory.faults = 1
    assert tokens(failing(core, [asked("bad", "sixteen tokens..!"), long], {"bad"})) == expected
