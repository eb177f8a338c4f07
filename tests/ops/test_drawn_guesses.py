"""Guesses that are drawn from another model's distribution, and verified by the ratio rule: no distribution changes."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampling import PARAMS, chi_square, quantile
from test_verification import OTHER, RULES, TARGET, TINY, exact, misfits, sequence
from tiny_engine import nearly, request, run_core, shared_model, tiny_engine, tokens_of

from kvarn.backends import InputBatch, KvCacheSpec, StepLimits
from kvarn.backends.cpu import CpuBackend
from kvarn.config import SpeculativeConfig
from kvarn.request import SamplingParams
from kvarn.runner import runner as runner_module
from kvarn.sampling import Draft, NativeSampler, ReferenceSampler
from kvarn.sampling.reference import DRAFT, distribution, draw, uniform
from kvarn.spec.ngram import NgramDrafter

pytestmark = pytest.mark.long

VOCAB = 211


@settings(max_examples=200, deadline=None)
@given(PARAMS, st.integers(0, 2**32), st.sampled_from([-20, 0, 20]))
def test_native_guesses_what_the_reference_guesses(params, seed, wider):
    """Drawn or not, with tokens before that were guessed, and from a vocabulary of another size."""
    rng = np.random.default_rng(seed)
    found = []
    logits = (rng.standard_normal((4, VOCAB + wider)) * 3).astype(np.float32)
    for kind in (NativeSampler, ReferenceSampler):
        sampler = kind(VOCAB)
        for number in range(4):
            sampler.add(sequence(params, number=number, seed=seed + number, stream=number, stop=(7, 9)))
        sampler.sample(np.repeat(logits[:, :1], VOCAB, 1), range(4), [4] * 4)
        q = np.zeros((5, VOCAB), np.float32)
        tokens = sampler.guess(logits, range(4), [5, 6, 7, 5], [(), (3,), (3, 3), (150,)], q, [-1, 3, 1, 0])
        again = sampler.sample(np.tile(logits[:, :100], 3)[:, :VOCAB].copy(), range(4), [5] * 4)
        found.append((tokens, q, [t.token_id for t in again]))
    (tokens, q, again), (expected, expected_q, expected_again) = found
    assert tokens == expected
    assert again == expected_again, "no state was changed by guessing"
    np.testing.assert_allclose(q, expected_q, atol=1e-5)
    assert not q[2].any() and not q[4].any()
    assert not q[:, VOCAB + wider :].any()


@settings(max_examples=100, deadline=None)
@given(PARAMS, st.integers(0, 2**32))
def test_a_guess_that_is_not_drawn_is_what_would_be_sampled(params, seed):
    """From the same logits, so that a model that guesses for itself is always right."""
    sampler = NativeSampler(VOCAB)
    sampler.add(sequence(params, seed=seed, stop=(7, 9)))
    logits = (np.random.default_rng(seed).standard_normal((6, VOCAB)) * 3).astype(np.float32)
    draft, none = [], np.zeros((1, VOCAB), np.float32)
    for place, row in enumerate(logits[:5]):
        draft += sampler.guess(row[None], [0], [4 + place], [tuple(draft)], none, [-1])
    assert [t.token_id for t in sampler.verify(logits, [0], [4], [Draft(tuple(draft))])][:5] == draft


def test_logits_that_are_no_numbers_are_no_guess():
    logits = np.full((1, VOCAB), np.nan, np.float32)
    for kind in (NativeSampler, ReferenceSampler):
        sampler = kind(VOCAB)
        sampler.add(sequence(SamplingParams()))
        assert sampler.guess(logits, [0], [4], [()], np.zeros((1, VOCAB), np.float32), [0]) == [-1]
        for q, rows, words in (
            (np.zeros((1, 3), np.float32), [0], "probabilities of shape"),
            (np.zeros((1, VOCAB), np.float32), [1], "out of range"),
            (np.zeros((1, VOCAB), np.float32), [], "1 rows of logits"),
        ):
            with pytest.raises(ValueError, match=words):
                sampler.guess(logits, [0], [4], [()], q, rows)


SAMPLES, BATCH = 200_000, 10_000


def guess_many(rule, *, spoil=lambda q: q):
    """Pairs (first, second token or -1) of 200,000 drafts of two tokens after token 0, drawn and verified."""
    sampler = NativeSampler(TINY)
    sampler.add(sequence(RULES[rule]))
    pairs, numbers = [], [0] * BATCH
    for start in range(0, SAMPLES, BATCH):
        positions = range(3 * start, 3 * (start + BATCH), 3)
        q = np.zeros((2 * BATCH, TINY), np.float32)
        zero = np.zeros(BATCH, int)
        first = sampler.guess(OTHER[zero], numbers, positions, [()] * BATCH, q, range(0, 2 * BATCH, 2))
        second = sampler.guess(
            OTHER[first], numbers, [p + 1 for p in positions], [(t,) for t in first], q, range(1, 2 * BATCH, 2)
        )
        q = spoil(q)
        drafts = [Draft((a, b), q[2 * i : 2 * i + 2]) for i, (a, b) in enumerate(zip(first, second, strict=True))]
        last = np.stack([zero, first, second], 1)
        tokens = iter(sampler.verify(TARGET[last].reshape(-1, TINY), numbers, positions, drafts))
        for draft in drafts:
            said = []
            for guess in (*draft.token_ids, None):
                said.append(next(tokens).token_id)
                if said[-1] != guess:
                    break
            pairs.append(([*said, -1])[:2])
    return np.array(pairs)


@pytest.mark.parametrize("rule", ["plain", "top_p", "top_k and heat"])
def test_drawn_and_verified_tokens_have_the_exact_distribution(rule):
    pairs = guess_many(rule)
    assert (pairs[:, 1] >= 0).mean() > 0.4, "most are accepted"
    assert [s < most for s, most in misfits(pairs, exact(rule))] == [True, True]


def test_what_was_not_drawn_from_what_is_said_is_seen():
    flatter = guess_many("plain", spoil=lambda q: (q**0.9 / (q**0.9).sum(1, keepdims=True)).astype(np.float32))
    assert all(s > most for s, most in misfits(flatter, exact("plain")))


# Of a whole engine: the third of the tokens that many streams of one request say, by a tiny pair of models.
PROMPT = b"abc"
STREAMS, REQUESTS = 64, 100


def third_tokens(monkeypatch, model, draft, params, vocab=0, method="draft"):
    numbers = itertools.count(1)
    monkeypatch.setattr("secrets.randbits", lambda bits: next(numbers))
    core = tiny_engine(
        model=model, draft=draft, backend="cpu", dtype="float32", max_num_seqs=STREAMS, max_num_batched_tokens=512,
        num_blocks=256, max_model_len=64,
        speculative=SpeculativeConfig(method, k=3, model="x", max_step_drafts=256, draft_vocab=vocab),
    ).core  # fmt: skip
    counts = np.zeros(259)
    for number in range(REQUESTS):
        asked = request(str(number), tuple(PROMPT), temperature=1.0, n=STREAMS, max_tokens=4, **params)
        outputs = run_core(core, [asked])[str(number)]
        for stream in range(STREAMS):
            counts[tokens_of(outputs, stream)[2]] += 1
    stats = core.stats()
    core.close()
    assert 0.2 < stats.accepted_tokens / stats.draft_tokens < 0.95
    assert (0 < stats.accepted_copies < stats.accepted_tokens) == (method != "draft")
    return counts


def third_token_distribution(model, params):
    """Of the token after two others, by the sum over all pairs of those that come at all."""
    limits = StepLimits(64, 1, 64, 64)
    executable = CpuBackend(1).load(model.program, model.weights, KvCacheSpec(16, 16, "float32"), limits)
    sampling, total = SamplingParams(**params), np.zeros(259)

    def after(*tokens):
        logits = executable.execute(InputBatch.of_one([*PROMPT, *tokens]))["logits"][0].astype(np.float64)
        return distribution(logits, sampling)

    for first, p in enumerate(after()):
        if p > 0:
            for second, q in enumerate(after(first)):
                if p * q > 0:
                    total += p * q * after(first, second)
    executable.close()
    return total


@pytest.mark.parametrize(("params", "vocab"), [({"top_k": 12}, 0), ({"top_p": 0.3}, 0), ({"top_k": 12}, 150)], ids=str)
def test_an_engine_that_guesses_without_a_seed_has_the_exact_distribution(params, vocab, monkeypatch):
    """The third token of 6,400 streams, most of which was a guess that was accepted or replaced."""
    model = shared_model("llama", 0)
    expected = third_token_distribution(model, params)
    counts = third_tokens(monkeypatch, model, nearly("llama", 0, 0.15), params, vocab)
    statistic, freedom = chi_square(counts, expected / expected.sum())
    assert statistic < quantile(freedom)


def test_two_sources_have_the_exact_distribution(monkeypatch):
    """Where a half of the streams copies what is likely, and the rest has guesses that are drawn."""
    params, model = {"top_k": 12}, shared_model("llama", 0)
    expected = third_token_distribution(model, params)
    executable = CpuBackend(1).load(model.program, model.weights, KvCacheSpec(16, 16, "float32"), StepLimits(64, 1, 64))

    @functools.cache
    def likeliest(tokens):
        return int(executable.execute(InputBatch.of_one(list(tokens)))["logits"][0].argmax())

    def guess(drafter, sequence_id, count):
        return (likeliest(tuple(drafter._texts[sequence_id].tokens)),) if sequence_id % 2 else ()

    monkeypatch.setattr(NgramDrafter, "_guess", guess)
    counts = third_tokens(monkeypatch, model, nearly("llama", 0, 0.15), params, 100, method="ngram+draft")
    executable.close()
    statistic, freedom = chi_square(counts, expected / expected.sum())
    assert statistic < quantile(freedom)


def test_an_engine_that_takes_all_guesses_is_seen(monkeypatch):
    """In as many streams."""
    params, model = {"top_k": 12}, shared_model("llama", 0)
    expected = third_token_distribution(model, params)

    def with_less(ids, q=None, parents=None):
        return Draft(ids, None if q is None else q * 0.3, parents)

    monkeypatch.setattr(runner_module, "Draft", with_less)
    counts = third_tokens(monkeypatch, model, nearly("llama", 0, 0.15), params)
    statistic, freedom = chi_square(counts, expected / expected.sum())
    assert statistic > quantile(freedom)


def test_the_number_that_draws_a_guess_is_for_nothing_else():
    q = distribution(OTHER[0].astype(np.float64), RULES["plain"])
    sampler = NativeSampler(TINY)
    sampler.add(sequence(RULES["plain"]))
    rows = np.zeros((1, TINY), np.float32)
    for position in range(4, 60):
        (token,) = sampler.guess(OTHER[:1], [0], [position], [()], rows, [0])
        assert token == draw(q, uniform(5, 0, position, DRAFT))
