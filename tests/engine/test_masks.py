"""`allowed_token_ids` and `bad_words`: exactly what may come comes, the same to the bit whatever else goes on."""

import functools
import types

import pytest
from pairwise import SAMPLING, pairwise, uncovered
from tiny_engine import EOS, nearly, request, run_core, text_of, tiny_engine, tokens_of

from kvarn.config import SpeculativeConfig
from kvarn.engine.events import RequestFailed, merge_outputs
from kvarn.errors import RequestError
from kvarn.request import Grammar, SamplingParams
from kvarn.testing import byte_tokenizer
from kvarn.text import token_sequences

LETTERS = tuple(b"abc")
PAIRS = ((97, 98), (98, 97), (99, 99, 99), (97, 97, 97))
ASKED = {
    "allowed": {"allowed_token_ids": LETTERS},
    "words": {"bad_words": ("e", "st", (105,), "an")},
    "both": {"allowed_token_ids": LETTERS, "bad_words": PAIRS},
    "grammar": {"grammar": Grammar.regex("[a-e]{20}"), "bad_words": PAIRS, "allowed_token_ids": (*LETTERS, EOS),
                "ignore_eos": False},
}  # fmt: skip
FACTORS = {
    "asked": list(ASKED),
    "speculative": [None, SpeculativeConfig(k=4), SpeculativeConfig("lookahead", k=40),
                    SpeculativeConfig("draft", k=3, model="tinier")],
    "batch": [1, 9],
    "prefix_cache": [True, False],
    "budget": [24, 256],
    "memory": ["ample", "tight"],
    "n": [1, 3],
    "sampling": ["greedy", "hot", "penalties"],
    "logprobs": [None, 2],
}  # fmt: skip
CASES = pairwise(FACTORS)


def test_every_pair_of_values_is_in_some_case():
    assert not uncovered(FACTORS, CASES)
    assert len(CASES) < 24


def asked(case):
    """The requests of a case: every third without a mask."""
    sampling = {**SAMPLING[case["sampling"]], "n": case["n"], "logprobs": case["logprobs"], "max_tokens": 30}
    texts = [f"{'abcabbacb st an ' * (i % 3)}{i} abcabbacb" for i in range(case["batch"])]
    masks = [ASKED[case["asked"]] if i % 3 != 1 else {} for i in range(case["batch"])]
    parts = enumerate(zip(texts, masks, strict=True))
    return [request(str(i), text, **{**sampling, **mask}) for i, (text, mask) in parts]


@functools.cache
def expected_answers(**case):
    """What everybody says alone, one after the other, without speculation."""
    core = tiny_engine(backend="cpu", max_model_len=192).core
    answers = {r.request_id: merge_outputs(run_core(core, [r])[r.request_id]).outputs for r in asked(case)}
    core.close()
    return answers


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(v)[:12] for v in case.values()))
def test_the_same_answers_with_everything_else(case):
    expected = expected_answers(**{name: case[name] for name in ("asked", "batch", "n", "sampling", "logprobs")})
    spec = case["speculative"]
    core = tiny_engine(
        backend="cpu",
        num_blocks=200 if case["memory"] == "ample" else 12,
        max_model_len=192,
        max_num_batched_tokens=case["budget"],
        enable_prefix_caching=case["prefix_cache"],
        speculative=spec,
        draft=nearly("llama", 0, 0.05) if spec is not None and spec.method == "draft" else None,
    ).core
    outputs = run_core(core, asked(case))
    for r in asked(case):
        merged = merge_outputs(outputs[r.request_id])
        assert merged.outputs == expected[r.request_id]
        for part in merged.outputs:
            check(r.sampling, part.token_ids)
    if spec is not None and spec.method == "draft":
        assert core.stats().accepted_tokens > 0
    core.close()


def check(sampling: SamplingParams, said: tuple[int, ...]) -> None:
    """That nothing was said that may not be."""
    allowed = sampling.allowed_token_ids
    assert allowed is None or set(said) <= set(allowed)
    for word in token_sequences(byte_tokenizer(), sampling.bad_words):
        assert all(said[i : i + len(word)] != word for i in range(len(said)))


def test_most_answers_would_be_others_without():
    """So that the checks above say something."""
    core = tiny_engine(backend="cpu").core
    free = tokens_of(run_core(core, [request("a", "once upon a time", max_tokens=40)])["a"])
    words = {tuple(free[4:6]), tuple(free[20:23])}
    bound = run_core(core, [request("b", "once upon a time", max_tokens=40, bad_words=tuple(words))])
    said = tokens_of(bound["b"])
    assert said[:5] == free[:5]
    assert said[5] != free[5]
    check(SamplingParams(bad_words=tuple(words)), tuple(said))
    core.close()


def test_the_likeliest_allowed_token_comes_with_the_models_own_logprob():
    core = tiny_engine(backend="cpu").core
    free = run_core(core, [request("a", "x", max_tokens=1, logprobs=20)])["a"][0].outputs[0].logprobs[0]
    third, fifth = free.top[2], free.top[4]
    bound = run_core(core, [request("b", "x", max_tokens=1, logprobs=20, allowed_token_ids=(fifth[0], third[0]))])
    said = bound["b"][0].outputs[0].logprobs[0]
    assert (said.token_id, said.logprob, said.rank) == (*third, 3)
    assert said.top == free.top
    core.close()


def test_without_the_end_among_them_allowed_tokens_go_on_to_the_limit():
    core = tiny_engine(backend="cpu").core
    ends = run_core(core, [request("a", "x", allowed_token_ids=(EOS,), ignore_eos=False)])
    goes_on = run_core(core, [request("b", "x", allowed_token_ids=(65,), ignore_eos=False)])
    assert tokens_of(ends["a"]) == [EOS]
    assert text_of(goes_on["b"]) == "A" * 8
    core.close()


@pytest.mark.parametrize("speculative", [None, SpeculativeConfig(k=4)])
def test_masks_that_leave_no_token_fail_their_own_request_only(speculative):
    core = tiny_engine(backend="cpu", speculative=speculative).core
    others = [request(str(i), "x y z x y z", max_tokens=12) for i in range(2)]
    expected = run_core(core, others)
    bad = request("bad", "abab", n=2, max_tokens=30, allowed_token_ids=(97,), bad_words=((97,) * 5,))
    for r in (bad, *others):
        core.add(r)
    events = []
    while core.has_work():
        events += core.step()
    (failed,) = [event for event in events if isinstance(event, RequestFailed)]
    assert failed.request_id == "bad"
    assert isinstance(failed.error, RequestError) and failed.error.field == "allowed_token_ids"
    for r in others:
        mine = [event for event in events if event.request_id == r.request_id]
        assert tokens_of(mine) == tokens_of(expected[r.request_id])
    assert core.stats().free_blocks == core.stats().num_blocks
    core.close()


def test_words_are_forbidden_with_and_without_a_space_before():
    pieces = {"ham": (1,), " ham": (2,), "spam": (3, 4), " spam": (5, 3, 4), "eggs": (6, 7), " eggs": (8,)}
    tokenizer = types.SimpleNamespace(encode=lambda text: list(pieces[text]))
    assert token_sequences(tokenizer, [" ham", "spam", "  eggs", (9, 9), "ham"]) == (
        (1,), (2,), (3, 4), (6, 7), (8,), (9, 9),
    )  # fmt: skip


def test_texts_become_token_ids_offline_too(make_llm):
    llm = make_llm(backend="cpu")
    letters = {"temperature": 0.0, "max_tokens": 12, "allowed_token_ids": tuple(range(97, 123))}
    free = llm.generate("once upon a time", SamplingParams(**letters))[0].text
    word = free[4:6]
    said = llm.generate("once upon a time", SamplingParams(**letters, bad_words=(f" {word}",)))[0].text
    assert said[: free.index(word) + 1] == free[: free.index(word) + 1]
    assert word not in said


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"allowed_token_ids": ()}, "allowed_token_ids"),
        ({"allowed_token_ids": tuple(range(70_000))}, "allowed_token_ids"),
        ({"bad_words": ("",)}, "bad_words"),
        ({"bad_words": ("x" * 129,)}, "bad_words"),
        ({"bad_words": ("x",) * 257}, "bad_words"),
        ({"bad_words": ((1,),) * 513}, "bad_words"),
        ({"bad_words": ((),)}, "bad_words"),
    ],
)
def test_limits(wrong, field):
    with pytest.raises(RequestError, match=field) as found:
        SamplingParams(**wrong)
    assert found.value.field == field


def test_tokens_that_the_model_has_not_are_refused():
    core = tiny_engine().core
    for wrong in ({"allowed_token_ids": (3, 259)}, {"bad_words": ((1, 400),)}):
        with pytest.raises(RequestError, match="0 to 258") as found:
            core.check(request("a", "x", **wrong))
        assert found.value.field in wrong
    core.close()
