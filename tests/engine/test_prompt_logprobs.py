"""What the model says of a prompt is the same to the bit however it was computed, and what the definition says."""

import functools

import numpy as np
import pytest
from pairwise import pairwise, uncovered
from tiny_engine import nearly, request, run_core, shared_model, tiny_engine

from kvarn.backends import InputBatch, KvCacheSpec, StepLimits
from kvarn.config import SpeculativeConfig
from kvarn.engine import make_backend
from kvarn.engine.events import merge_outputs
from kvarn.errors import RequestError
from kvarn.request import Grammar, SamplingParams

FACTORS = {
    "speculative": [None, SpeculativeConfig(k=4), SpeculativeConfig("lookahead", k=40),
                    SpeculativeConfig("draft", k=3, model="tinier")],
    "batch": [1, 9],
    "seats": [1, 3, 8],
    "prefix_cache": [True, False],
    "budget": [24, 256],
    "memory": ["ample", "tight"],
    "n": [1, 3],
    "grammar": [None, Grammar.regex("[a-z ]{30}")],
}  # fmt: skip
CASES = pairwise(FACTORS)


def test_every_pair_of_values_is_in_some_case():
    assert not uncovered(FACTORS, CASES)
    assert len(CASES) < 24


def asked(case):
    """The requests of a case: every third without, and the fifth says twice what the second says."""
    texts = [f"{'lorem ipsum dolor ' * (i % 4 + 1)}{i}" for i in range(case["batch"])]
    texts[4:5] = texts[1:2]
    common = {"n": case["n"], "max_tokens": 20, "temperature": 1.0, "seed": 3, "ignore_eos": False}
    return [
        request(str(i), text, **common, grammar=case["grammar"], prompt_logprobs=(None, 3, 0)[(i + 1) % 3])
        for i, text in enumerate(texts)
    ]


@functools.cache
def expected_outputs(**case):
    """What comes of each alone, its prompt computed in one step."""
    core = tiny_engine(backend="cpu", max_model_len=192, max_num_seqs=128, max_num_batched_tokens=256).core
    outputs = {r.request_id: merge_outputs(run_core(core, [r])[r.request_id]) for r in asked(case)}
    core.close()
    return outputs


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(v)[:12] for v in case.values()))
def test_the_same_with_everything_else(case):
    expected = expected_outputs(**{name: case[name] for name in ("batch", "n", "grammar")})
    spec = case["speculative"]
    core = tiny_engine(
        backend="cpu",
        num_blocks=200 if case["memory"] == "ample" else 12,
        max_model_len=192,
        max_num_seqs=case["seats"],
        max_num_batched_tokens=case["budget"],
        enable_prefix_caching=case["prefix_cache"],
        speculative=spec,
        draft=nearly("llama", 0, 0.05) if spec is not None and spec.method == "draft" else None,
    ).core
    requests = asked(case)
    warm = request("warm", requests[0].prompt_token_ids, max_tokens=1)
    run_core(core, [warm])
    for r, outputs in run_core(core, requests).items():
        got = merge_outputs(outputs)
        assert got.outputs == expected[r].outputs
        assert got.prompt_logprobs == expected[r].prompt_logprobs
        assert [bool(o.prompt_logprobs) for o in outputs[1:]].count(True) == 0
    assert core.stats().free_blocks == core.stats().num_blocks
    core.close()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_they_are_the_definitions(family):
    prompt = b"the quick brown fox jumps over the lazy dog, twice over"
    model = shared_model(family, 0)
    executable = make_backend("reference", 1).load(
        model.program, model.weights, KvCacheSpec(64, 16, "float32"), StepLimits(64, 64, 64)
    )
    groups = len(model.program.kv_groups)
    batch = InputBatch.of_one(list(prompt), num_outputs=len(prompt), num_groups=groups)
    logits = np.array(executable.execute(batch)["logits"], np.float64)
    exact = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    core = tiny_engine(family=family, backend="cpu", max_num_batched_tokens=24, num_blocks=64).core
    said = run_core(core, [request("a", tuple(prompt), prompt_logprobs=4)])["a"][0].prompt_logprobs
    assert [item.token_id for item in said] == list(prompt[1:])
    for place, item in enumerate(said):
        row = exact[place]
        assert item.logprob == pytest.approx(row[item.token_id], abs=2e-2)
        assert item.rank == pytest.approx(1 + (row > row[item.token_id]).sum(), abs=3)
        assert [p for _, p in item.top] == pytest.approx(sorted(row, reverse=True)[:4], abs=2e-2)
    core.close()


def test_what_a_prompt_and_an_answer_say_of_the_same_tokens_is_the_same():
    core = tiny_engine(backend="cpu").core
    first = merge_outputs(run_core(core, [request("a", "once upon", max_tokens=20, logprobs=5)])["a"]).outputs[0]
    whole = tuple(b"once upon") + first.token_ids
    again = run_core(core, [request("b", whole, max_tokens=1, prompt_logprobs=5)])["b"][0]
    assert again.prompt_logprobs[-20:] == first.logprobs
    assert again.num_cached_tokens == 0, "it is computed though the cache has it"
    third = run_core(core, [request("c", whole, max_tokens=1)])["c"][0]
    assert third.num_cached_tokens > 16, "and what was computed is kept for others"
    core.close()


def test_a_prompt_of_one_token_has_none():
    core = tiny_engine(backend="cpu").core
    (output,) = run_core(core, [request("a", "x", max_tokens=1, prompt_logprobs=5)])["a"]
    assert output.prompt_logprobs == ()
    core.close()


def test_a_preempted_prompt_tells_each_token_once():
    """With all seats taken it computes one token a step; the others need its blocks before it is done."""
    core = tiny_engine(backend="cpu", num_blocks=12, max_num_seqs=4, max_num_batched_tokens=24, max_model_len=128).core
    long = request("long", "a b c d e f g h i j k l m n o p q r s t ", prompt_logprobs=1, max_tokens=4)
    alone = run_core(core, [long])["long"][0].prompt_logprobs
    others = [request(str(i), "y" * 20 + str(i), max_tokens=40) for i in range(3)]
    asked = []
    execute = core._runner.execute

    def watched(scheduled):
        asked.extend(token for part in scheduled.sequences if part.prompt for token in part.prompt.token_ids)
        return execute(scheduled)

    core._runner.execute = watched
    got = run_core(core, [*others, long])
    assert core.stats().preemptions > 0
    assert tuple(asked) == long.prompt_token_ids[1:], "nothing is asked for again"
    assert merge_outputs(got["long"]).prompt_logprobs == alone
    core.close()


def test_offline(make_llm):
    llm = make_llm(backend="cpu")
    sampling = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=2)
    (answer,) = llm.generate(["hello"], sampling)
    assert [item.token_id for item in answer.prompt_logprobs] == list(b"ello")
    assert all(len(item.top) == 2 for item in answer.prompt_logprobs)


@pytest.mark.parametrize("wrong", [-1, 21])
def test_limits(wrong):
    with pytest.raises(RequestError, match="between 0 and 20") as found:
        SamplingParams(prompt_logprobs=wrong)
    assert found.value.field == "prompt_logprobs"
