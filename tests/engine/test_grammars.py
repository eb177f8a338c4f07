"""Answers are what their grammars say, and the same to the bit whatever else goes on."""

import asyncio
import functools
import json
import re
import threading

import jsonschema
import pytest
from pairwise import SAMPLING, pairwise, uncovered
from tiny_engine import EOS, handmade_engine, request, run_core, text_of, tiny_engine, tokens_of

from kvarn.config import EngineConfig, GrammarConfig, SpeculativeConfig
from kvarn.engine import AsyncLLM
from kvarn.engine.events import RequestFailed, merge_outputs
from kvarn.engine.llm import with_overrides
from kvarn.errors import QueueFullError, RequestError
from kvarn.grammar import GrammarMasks
from kvarn.request import FinishReason, Grammar, Request, SamplingParams
from kvarn.step import FailedSequence

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["horizontal", "vertical"]},
        "name": {"type": "string", "maxLength": 6},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["kind", "name", "sizes"],
    "additionalProperties": False,
}
PATTERN = r"[a-c]{3,9}(-stop)?-[0-9]+(\.[0-9]{1,2})?!"
GRAMMARS = {
    "schema": Grammar.json_schema(SCHEMA),
    "regex": Grammar.regex(PATTERN),
    "choice": Grammar.choice(["red", "green and blue", "green and brown"]),
    "lark": Grammar.lark('start: "<" item ("," item)* ">"\nitem: "one" | "two" | start'),
}
CHECKS = {
    "schema": lambda text: jsonschema.validate(json.loads(text), SCHEMA),
    "regex": lambda text: re.fullmatch(PATTERN, text).group(),
    "choice": ["red", "green and blue", "green and brown"].index,
    "lark": lambda text: re.fullmatch(r"[<>,a-z]+", text).group(),
}
FACTORS = {
    "grammar": list(GRAMMARS),
    "speculative": [None, SpeculativeConfig(k=4), SpeculativeConfig(), SpeculativeConfig(k=7, max_step_drafts=5),
                    SpeculativeConfig("lookahead", k=40)],
    "batch": [1, 16],
    "prefix_cache": [True, False],
    "budget": [24, 256],
    "memory": ["ample", "tight"],
    "dtype": ["float16", "int8"],
    "n": [1, 3],
    "sampling": ["greedy", "hot", "penalties"],
    "logprobs": [None, 2],
    "stop": [(), ("o", "-stop")],
    "abort": [False, True],
}
CASES = pairwise(FACTORS)


def test_every_pair_of_values_is_in_some_case():
    assert not uncovered(FACTORS, CASES)
    assert len(CASES) < 30


def asked(case):
    """The requests of a case: every third without a grammar."""
    sampling = {**SAMPLING[case["sampling"]], "n": case["n"], "logprobs": case["logprobs"], "stop": case["stop"]}
    texts = [f"{'lorem ipsum dolor sit amet ' * (i % 3)}{i} and {i} and {i} and" for i in range(case["batch"])]
    grammar = GRAMMARS[case["grammar"]]
    return [
        Request(
            str(i),
            tuple(text.encode()),
            SamplingParams(max_tokens=90 - i % 3, grammar=None if i % 3 == 2 else grammar, **sampling),
        )
        for i, text in enumerate(texts)
    ]


@functools.cache
def expected_answers(**case):
    """What everybody says alone, one after the other, without speculation."""
    core = tiny_engine(backend="cpu", dtype=case["dtype"], max_model_len=192).core
    answers = {r.request_id: merge_outputs(run_core(core, [r])[r.request_id]).outputs for r in asked(case)}
    core.close()
    return answers


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(v)[:12] for v in case.values()))
def test_the_same_answers_with_everything_else(case):
    names = ("grammar", "batch", "dtype", "n", "sampling", "logprobs", "stop")
    expected = expected_answers(**{name: case[name] for name in names})
    requests = asked(case)
    core = tiny_engine(
        backend="cpu",
        dtype=case["dtype"],
        num_blocks=256 if case["memory"] == "ample" else 12,
        max_model_len=192,
        max_num_batched_tokens=case["budget"],
        enable_prefix_caching=case["prefix_cache"],
        speculative=case["speculative"],
    ).core
    outputs = {r.request_id: [] for r in requests}
    for r in requests:
        core.add(r)
    aborted = requests[0].request_id if case["abort"] else None
    while core.has_work():
        for event in core.step():
            outputs[event.request_id].append(event)
        if aborted in outputs and len(outputs[aborted]) == 3 and not outputs[aborted][-1].finished:
            outputs[aborted].append(core.abort(aborted))
    for r in requests:
        got, parts = merge_outputs(outputs[r.request_id]), expected[r.request_id]
        if r.request_id == aborted and any(part.finish_reason is FinishReason.ABORT for part in got.outputs):
            whole = {part.index: part.token_ids for part in parts}
            assert all(part.token_ids == whole[part.index][: len(part.token_ids)] for part in got.outputs)
            continue
        assert got.outputs == parts
        for part in got.outputs if r.sampling.grammar else ():
            if part.finish_reason is FinishReason.STOP and part.stop_reason is None:
                CHECKS[case["grammar"]](part.text)
    stats = core.stats()
    assert stats.free_blocks == stats.num_blocks
    if case["memory"] == "tight" and case["batch"] == 16:
        assert stats.preemptions > 0
    core.close()


def test_most_answers_come_to_their_end():
    """So that the checks above say something."""
    shared = {"grammar": "schema", "batch": 16, "dtype": "float16", "n": 3, "sampling": "hot"}
    answers = expected_answers(**shared, logprobs=None, stop=())
    ends = [part for parts in answers.values() for part in parts if part.text.startswith("{")]
    finished = [part for part in ends if part.finish_reason is FinishReason.STOP]
    assert len(finished) > len(ends) / 3
    assert {json.loads(part.text)["kind"] for part in finished} == {"horizontal", "vertical"}


def test_what_a_grammar_leaves_no_choice_of_comes_several_tokens_at_a_time():
    grammar = Grammar.choice([f"{'0123456789' * 4}{end}" for end in "ab"])
    one = [request("a", "x", grammar=grammar, max_tokens=60, ignore_eos=False)]
    plain, guessing = (tiny_engine(backend="cpu", speculative=s).core for s in (None, SpeculativeConfig(k=8)))
    expected, got = run_core(plain, one), run_core(guessing, one)
    assert tokens_of(got["a"]) == tokens_of(expected["a"])
    assert plain.stats().steps > 40
    assert guessing.stats().steps < 12, "up to 9 tokens in a step: 8 guessed, and the one after them"
    assert guessing.stats().accepted_tokens == guessing.stats().draft_tokens > 30
    plain.close()
    guessing.close()


def test_logprobs_are_of_the_models_own_distribution():
    core = tiny_engine(backend="cpu").core
    grammar = Grammar.regex("[xy]")
    free = run_core(core, [request("a", "x", max_tokens=1, logprobs=2)])["a"][0].outputs[0].logprobs[0]
    bound = run_core(core, [request("b", "x", max_tokens=1, logprobs=2, grammar=grammar, ignore_eos=False)])
    said = bound["b"][0].outputs[0].logprobs[0]
    assert said.token_id in b"xy"
    assert said.top == free.top
    assert said.rank > 1
    core.close()


def test_bias_and_penalties_choose_among_what_is_allowed():
    core = tiny_engine(backend="cpu").core
    grammar = Grammar.regex("[xyz]{4}")
    bias = {ord("y"): 50.0, ord("a"): 100.0}
    outputs = run_core(core, [request("a", "x", grammar=grammar, ignore_eos=False, logit_bias=bias)])
    assert text_of(outputs["a"]) == "yyyy"
    assert tokens_of(outputs["a"]) == [*b"yyyy", EOS]
    core.close()


def test_a_grammar_that_gives_up_fails_its_own_request_only(monkeypatch):
    """A limit that is reached on the way, which no trial foresaw."""
    core = tiny_engine(backend="cpu", num_blocks=256).core
    requests = [request(str(i), "x", max_tokens=30, n=2) for i in range(2)]
    bad = request("bad", "x", max_tokens=30, n=2, grammar=Grammar.regex("[ab]+"), ignore_eos=False)
    finish, calls = GrammarMasks.finish, []

    def finish_or_give_up(self, pending):
        calls.append(pending)
        masks = finish(self, pending)
        if len(calls) == 5:
            masks.failed += [FailedSequence(i, "too complex") for i in range(10) if i in self]
        return masks

    monkeypatch.setattr(GrammarMasks, "finish", finish_or_give_up)
    for r in (*requests, bad):
        core.add(r)
    events = []
    while core.has_work():
        events += core.step()
    failed = [event for event in events if isinstance(event, RequestFailed)]
    assert [event.request_id for event in failed] == ["bad"]
    assert isinstance(failed[0].error, RequestError) and failed[0].error.field == "grammar"
    finished = {event.request_id for event in events if not isinstance(event, RequestFailed) and event.finished}
    assert finished == {"0", "1"}
    assert core.grammars.find(bad.sampling.grammar) is None, "the next one begins with no limit half reached"
    assert core.stats().free_blocks == core.stats().num_blocks
    core.close()


def test_who_waits_with_the_same_grammar_has_it_all_the_same(monkeypatch):
    core = tiny_engine(backend="cpu", max_num_seqs=1).core
    grammar = Grammar.regex("[ab]+")
    finish, calls = GrammarMasks.finish, []

    def finish_or_give_up(self, pending):
        calls.append(pending)
        masks = finish(self, pending)
        masks.failed += [FailedSequence(0, "too complex")] if len(calls) == 5 else []
        return masks

    monkeypatch.setattr(GrammarMasks, "finish", finish_or_give_up)
    for name in ("bad", "waits"):
        core.add(request(name, "x", max_tokens=8, grammar=grammar, ignore_eos=False))
    events = []
    while core.has_work():
        events += core.step()
    assert [event.request_id for event in events if isinstance(event, RequestFailed)] == ["bad"]
    assert [event.request_id for event in events if getattr(event, "finished", False)] == ["waits"]
    assert core.grammars.compile(grammar) is core.grammars.find(grammar)
    assert core.stats().grammars_compiled == 2, "who comes later begins anew"
    core.close()


def test_an_engine_without_grammars_refuses_them():
    core = handmade_engine().core
    with pytest.raises(RequestError, match="takes no grammars"):
        core.check(request("a", "x", grammar=Grammar.regex("a"), ignore_eos=False))
    core.close()


def test_a_step_that_fails_leaves_grammars_working():
    core = tiny_engine(backend="cpu").core
    one = [request("a", "x", grammar=GRAMMARS["choice"], ignore_eos=False, max_tokens=20)]
    expected = tokens_of(run_core(core, one)["a"])
    core.add(one[0])
    core.step()
    core.reset()
    assert tokens_of(run_core(core, one)["a"]) == expected
    assert core.stats().grammars_compiled == 1
    core.close()


class HeldUp:
    """Lets nothing be compiled until it is told to."""

    def __init__(self, core, monkeypatch):
        self.go = threading.Event()
        compiler, compile_one = core.grammars, core.grammars._compile

        def wait(grammar):
            assert self.go.wait(30)
            return compile_one(grammar)

        monkeypatch.setattr(compiler, "_compile", wait)


def grammar_request(name, pattern="[ab]{5}", **sampling):
    return request(name, "x", grammar=Grammar.regex(pattern), ignore_eos=False, **sampling)


def test_who_waits_for_a_grammar_holds_nobody_up(monkeypatch):
    async def run():
        engine = tiny_engine(backend="cpu", num_blocks=256, max_num_queued_requests=3)
        held = HeldUp(engine.core, monkeypatch)
        async with AsyncLLM(engine) as llm:
            waiting = llm.generate(grammar_request("waits"))
            aborted = llm.generate(grammar_request("aborted"))
            refused = llm.generate(grammar_request("refused", "(?=a)"))
            assert llm.stats().queued == 3
            with pytest.raises(QueueFullError):
                llm.generate(request("one more", "x"))
            await llm.abort("aborted")
            (last,) = [output async for output in aborted]
            assert [part.finish_reason for part in last.outputs] == [FinishReason.ABORT]
            other = [output async for output in llm.generate(request("other", "x"))]
            assert other[-1].finished
            assert llm.stats().queued == 2
            held.go.set()
            with pytest.raises(RequestError, match="look-around"):
                async for _ in refused:
                    pass
            text = "".join([part.text async for output in waiting for part in output.outputs])
            assert re.fullmatch("[ab]{5}", text)
            stats = llm.stats()
            assert (stats.queued, stats.waiting, stats.running) == (0, 0, 0)
            assert stats.free_blocks == stats.num_blocks

    asyncio.run(run())


def test_an_id_may_be_used_again_while_the_grammar_of_its_last_request_is_compiled(monkeypatch):
    async def run():
        engine = tiny_engine(backend="cpu")
        held = HeldUp(engine.core, monkeypatch)
        async with AsyncLLM(engine) as llm:
            first = llm.generate(grammar_request("same", "a"))
            await llm.abort("same")
            assert [output.finished async for output in first] == [True]
            second = llm.generate(grammar_request("same", "b"))
            held.go.set()
            assert "".join([part.text async for output in second for part in output.outputs]) == "b"

    asyncio.run(run())


def test_closing_ends_who_waits_for_a_grammar():
    async def run():
        llm = AsyncLLM(tiny_engine(backend="cpu"))
        stream = llm.generate(request("a", "x", grammar=Grammar.json_schema({"type": "integer", "multipleOf": 99999}),
                                      ignore_eos=False))  # fmt: skip
        await llm.close()
        with pytest.raises(Exception, match="closed"):
            async for _ in stream:
                pass

    asyncio.run(run())


def test_settings_by_name():
    config = with_overrides(EngineConfig(), {"max_grammar_depth": 3})
    assert config.grammar == GrammarConfig(max_grammar_depth=3)
