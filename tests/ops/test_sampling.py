"""The native sampler draws what the definition draws, with the right frequencies, whoever else is in the batch."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn import _native
from kvarn.backends.row_rules import NOT_FINITE, NOTHING_LEFT
from kvarn.errors import RequestError
from kvarn.request import SamplingParams
from kvarn.sampling import NativeSampler, ReferenceSampler, TokenMasks
from kvarn.sampling.reference import distribution, philox4x32, uniform
from kvarn.step import NewSequence, SampledToken

VOCAB = 211


def sequence(sampling, *, number=0, seed=5, stream=0, prompt=(1, 2, 2, 3), stop=()):
    return NewSequence(number, tuple(prompt), sampling, seed, stream, tuple(stop))


def random_logits(seed, rows=1, vocab=VOCAB):
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * 3).astype(np.float32)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 17, 500]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.7, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.4, -0.5]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -3.0, 2.5]), max_size=4),
    min_tokens=st.sampled_from([0, 3]),
    logprobs=st.sampled_from([None, 0, 5]),
)


@settings(max_examples=300, deadline=None)
@given(PARAMS, st.integers(0, 2**63 - 1), st.integers(0, 7))
def test_native_draws_what_the_reference_draws(params, seed, stream):
    native, reference = NativeSampler(VOCAB), ReferenceSampler(VOCAB)
    for sampler in (native, reference):
        sampler.add(sequence(params, seed=seed, stream=stream, stop=(7, 9)))
    for position in range(4, 12):
        logits = random_logits(seed + position)
        got, want = (sampler.sample(logits, [0], [position])[0] for sampler in (native, reference))
        assert got.token_id == want.token_id
        if params.logprobs is None:
            assert got.logprob is None
        else:
            assert got.logprob.rank == want.logprob.rank
            assert got.logprob.logprob == pytest.approx(want.logprob.logprob, abs=1e-5)
            assert [t for t, _ in got.logprob.top] == [t for t, _ in want.logprob.top]
            assert np.allclose([p for _, p in got.logprob.top], [p for _, p in want.logprob.top], atol=1e-5)


FEW = (3, 40, 41, 77, 120, 210)
MASKED = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.5]),
    top_p=st.sampled_from([1.0, 0.9]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    min_tokens=st.sampled_from([0, 3]),
    logprobs=st.sampled_from([None, 3]),
    allowed_token_ids=st.sampled_from([None, FEW, FEW[:3]]),
    bad_words=st.lists(
        st.lists(st.sampled_from(FEW), min_size=1, max_size=3).map(tuple), max_size=12
    ).map(tuple),
)
"""Few tokens, and many sequences of them that are forbidden."""


@settings(max_examples=300, deadline=None)
@given(MASKED, st.integers(0, 2**63 - 1), st.booleans())
def test_what_a_request_forbids(params, seed, masked):
    native, reference = NativeSampler(VOCAB), ReferenceSampler(VOCAB)
    for sampler in (native, reference):
        sampler.add(sequence(params, seed=seed, stop=(77,)))
    words = [0xFFFFFFF7, 0x200, 2**32 - 1, 0, 2**32 - 1, 0, 2**32 - 1]
    masks = TokenMasks(np.array([words], np.uint32), np.zeros(1, np.int32)) if masked else None
    said = ()
    for position in range(4, 24):
        logits = random_logits(seed + position)
        logits[0, list(FEW)] += 8
        got, want = (sampler.sample(logits, [0], [position], masks)[0] for sampler in (native, reference))
        assert got.token_id == want.token_id
        assert (got.logprob is None) == (want.logprob is None)
        forbidden = {word[-1] for word in params.bad_words if said[len(said) - len(word) + 1 :] == word[:-1]}
        if got.token_id < 0:
            left = set(params.allowed_token_ids or range(VOCAB))
            left -= {t for t in left if masked and not words[t // 32] >> t % 32 & 1}
            assert not left - forbidden - ({77} if len(said) < params.min_tokens else set())
            return
        assert got.token_id not in forbidden
        assert params.allowed_token_ids is None or got.token_id in params.allowed_token_ids
        assert got.logprob is None or got.logprob.rank == int((logits[0] > logits[0, got.token_id]).sum()) + 1
        said += (got.token_id,)


@pytest.mark.parametrize("kind", [NativeSampler, ReferenceSampler])
def test_logprobs_of_given_tokens(kind):
    logits = random_logits(4, rows=3)
    sampler = kind(VOCAB)
    said = sampler.logprobs(logits, [5, 6, 7], [0, 2, 20])
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    assert [item.token_id for item in said] == [5, 6, 7]
    assert [item.logprob for item in said] == pytest.approx([exact[0, 5], exact[1, 6], exact[2, 7]], abs=1e-5)
    assert [item.rank for item in said] == [int((exact[r] > exact[r, 5 + r]).sum()) + 1 for r in range(3)]
    assert [len(item.top) for item in said] == [0, 2, 20]
    assert [token for token, _ in said[2].top] == np.argsort(-logits[2], kind="stable")[:20].tolist()
    for bad in (np.nan, np.inf):
        spoilt = logits.copy()
        spoilt[1, 3] = bad
        assert sampler.logprobs(spoilt, [5, 6, 7], [0, 2, 20]) == [said[0], None, said[2]]
    assert sampler.logprobs(np.full((1, VOCAB), -np.inf, np.float32), [5], [2]) == [None]


WORDS = st.lists(st.sampled_from([0, 0, 2**32 - 1, 2**32 - 1, 0x80000001, 0xFFFFFFFE]), min_size=7, max_size=7)


@settings(max_examples=200, deadline=None)
@given(PARAMS, st.integers(0, 2**63 - 1), WORDS.filter(any))
def test_under_a_mask_too_whichever_words_of_it_are_full_or_empty(params, seed, words):
    native, reference = NativeSampler(VOCAB), ReferenceSampler(VOCAB)
    for sampler in (native, reference):
        sampler.add(sequence(params, seed=seed, stop=(7,)))
    allowed = [token for token in range(VOCAB) if words[token // 32] >> token % 32 & 1 and token != 7]
    masks = TokenMasks(np.array([words], np.uint32), np.zeros(1, np.int32))
    for position in range(4, 8) if allowed else ():
        logits = random_logits(seed + position)
        got, want = (sampler.sample(logits, [0], [position], masks)[0] for sampler in (native, reference))
        assert got.token_id == want.token_id
        assert got.token_id in allowed or got.token_id == 7
        assert got.logprob is None or got.logprob.rank == want.logprob.rank



def chi_square(counts, probabilities):
    """The statistic and its degrees of freedom, rare outcomes pooled so that each expects at least 10."""
    total = counts.sum()
    order = np.argsort(-probabilities)
    counts, expected = counts[order].astype(float), probabilities[order] * total
    cut = int(np.searchsorted(-expected, -10, side="right"))
    if cut < len(expected) and expected[cut:].sum() > 0:
        counts = np.append(counts[:cut], counts[cut:].sum())
        expected = np.append(expected[:cut], expected[cut:].sum())
    else:
        assert counts[cut:].sum() == 0
        counts, expected = counts[:cut], expected[:cut]
    return float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1


def quantile(freedom, z=4.0):
    """The chi-square distribution's value at z standard deviations (Wilson & Hilferty 1931)."""
    f = max(freedom, 1)
    return f * (1 - 2 / (9 * f) + z * (2 / (9 * f)) ** 0.5) ** 3


RULES = {
    "plain": SamplingParams(),
    "hot": SamplingParams(temperature=1.8),
    "cold": SamplingParams(temperature=0.5),
    "top_k": SamplingParams(top_k=12),
    "top_p": SamplingParams(top_p=0.8),
    "min_p": SamplingParams(min_p=0.05),
    "all": SamplingParams(temperature=1.3, top_k=40, top_p=0.9, min_p=0.01),
}


def draws(params, logits, count):
    sampler = NativeSampler(logits.size)
    counts = np.zeros(logits.size, int)
    rows = np.repeat(logits[None], 100, axis=0)
    sampler.add(sequence(params))
    for start in range(0, count, 100):
        for sampled in sampler.sample(rows, [0] * 100, range(start, start + 100)):
            counts[sampled.token_id] += 1
    return counts


@pytest.mark.parametrize("name", RULES)
def test_frequencies_are_the_exact_probabilities(name):
    logits = random_logits(11)[0]
    counts = draws(RULES[name], logits, 100_000)
    exact = distribution(logits.astype(np.float64), RULES[name])
    statistic, freedom = chi_square(counts, exact)
    assert statistic < quantile(freedom), (statistic, freedom)


def test_the_chi_square_test_sees_a_wrong_rule():
    logits = random_logits(11)[0]
    counts = draws(SamplingParams(temperature=1.03), logits, 100_000)
    statistic, freedom = chi_square(counts, distribution(logits.astype(np.float64), SamplingParams()))
    assert statistic > quantile(freedom)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_row_does_not_depend_on_its_neighbours_nor_on_who_draws_it(threads):
    pool = _native.Pool(threads, []) if threads else None
    params = [SamplingParams(temperature=t, top_p=p, logprobs=3) for t, p in itertools.product((0, 1.0), (0.7, 1.0))]
    logits = random_logits(3, rows=4)
    together = NativeSampler(VOCAB, lambda: pool)
    for number, p in enumerate(params):
        together.add(sequence(p, number=number, seed=number))
    crowd = together.sample(logits, range(4), [9] * 4)
    for number, p in enumerate(params):
        alone = NativeSampler(VOCAB)
        alone.add(sequence(p, number=number, seed=number))
        assert alone.sample(logits[number : number + 1].copy(), [number], [9]) == [crowd[number]]


def test_seed_stream_and_position_key_the_draw():
    flat = np.zeros((1, VOCAB), np.float32)

    def draw(seed, stream, position):
        sampler = NativeSampler(VOCAB)
        sampler.add(sequence(SamplingParams(), seed=seed, stream=stream))
        return sampler.sample(flat, [0], [position])[0].token_id

    assert draw(1, 0, 5) == draw(1, 0, 5)
    assert len({draw(s, t, p) for s, t, p in itertools.product(range(3), repeat=3)}) > 15


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers of the Random123 distribution
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    assert philox4x32(counter, key) == words
    assert tuple(_native.philox4x32(list(counter), *key)) == words


def test_uniform_is_the_same_in_both():
    for seed, stream, position in ((0, 0, 0), (2**63 + 5, 3, 77), (12345, 0, 2**40)):
        assert _native.uniform(seed, stream, position) == uniform(seed, stream, position)


def test_greedy_takes_the_lowest_id_among_equals():
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, [50, 20, 120]] = 3
    sampler = NativeSampler(VOCAB)
    sampler.add(sequence(SamplingParams(temperature=0)))
    assert sampler.sample(logits, [0], [4])[0].token_id == 20


def test_min_tokens_keeps_stop_tokens_out_and_then_lets_them_in():
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 7] = 50
    sampler = NativeSampler(VOCAB)
    sampler.add(sequence(SamplingParams(temperature=0, min_tokens=2), stop=(7,)))
    assert [sampler.sample(logits, [0], [p])[0].token_id for p in range(3)] == [0, 0, 7]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [NativeSampler, ReferenceSampler])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_no_distribution_gets_a_mark_and_the_others_their_tokens(kind, bad, temperature):
    """And its own state stays as it was, so that its next row is sampled as if there had been none."""
    logits = random_logits(3, rows=3)
    spoilt = logits.copy()
    spoilt[1] = bad if bad == -np.inf else 0
    spoilt[1, 3] = bad
    params = SamplingParams(temperature=temperature, frequency_penalty=1.0, min_tokens=1, logprobs=1)
    said = []
    for rows in (logits, spoilt):
        sampler = kind(VOCAB)
        for number in (41, 42, 43):
            sampler.add(sequence(params, seed=number, number=number, stop=(7,)))
        said.append(sampler.sample(rows, [41, 42, 43], [4, 4, 4]))
    assert said[1] == [said[0][0], SampledToken(42, NOT_FINITE), said[0][2]]
    assert sampler.sample(logits[1:2], [42], [4]) == [said[0][1]]


@pytest.mark.parametrize("kind", [NativeSampler, ReferenceSampler])
def test_rules_that_leave_nothing_are_told_from_logits_that_are_no_numbers(kind):
    sampler = kind(VOCAB)
    sampler.add(sequence(SamplingParams(allowed_token_ids=(5,), bad_words=((5,),))))
    logits = random_logits(3, rows=1)
    assert sampler.sample(logits, [0], [4]) == [SampledToken(0, NOTHING_LEFT)]
    logits[0, 9] = np.nan
    assert sampler.sample(logits, [0], [4]) == [SampledToken(0, NOT_FINITE)], "though the token is forbidden"


@pytest.mark.parametrize("kind", [NativeSampler, ReferenceSampler])
def test_who_was_not_added_is_refused(kind):
    with pytest.raises(ValueError, match="sequence 43 was not added"):
        kind(VOCAB).sample(random_logits(3, rows=1), [43], [4])


@pytest.mark.parametrize("kind", [NativeSampler, ReferenceSampler])
def test_tokens_outside_the_vocabulary_are_refused(kind):
    for field, params in {
        "logit_bias": SamplingParams(logit_bias={VOCAB: 1.0}),
        "stop_token_ids": SamplingParams(stop_token_ids=(VOCAB,)),
    }.items():
        with pytest.raises(RequestError, match=field):
            kind(VOCAB).add(sequence(params))
