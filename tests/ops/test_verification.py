"""Drafts change no distribution: what is verified is what would have been sampled, token by token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampling import PARAMS, chi_square, quantile

from kvarn import _native
from kvarn.request import SamplingParams
from kvarn.sampling import Draft, NativeSampler, ReferenceSampler, TokenMasks
from kvarn.sampling.reference import ACCEPT, DRAFT, RESIDUAL, distribution, uniform
from kvarn.step import NewSequence

VOCAB = 211
TINY = 24


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def sequence(sampling, *, number=0, seed=5, stream=0, prompt=(1, 2, 2, 3), stop=()):
    return NewSequence(number, tuple(prompt), sampling, seed, stream, tuple(stop))


def random_case(seed, drawn, masked, vocab=VOCAB, drafts=(3, 0, 1, 5)):
    """Logits, drafts and masks of several sequences; drafts are likely tokens, so that many are accepted."""
    rng = np.random.default_rng(seed)
    rows = sum(drafts) + len(drafts)
    logits = (rng.standard_normal((rows, vocab)) * 3).astype(np.float32)
    made, row = [], 0
    for count in drafts:
        near = logits[row : row + count] + rng.standard_normal((count, vocab)) * 0.5
        q = softmax(near * 1.5).astype(np.float32)
        ids = tuple(int(rng.choice(vocab, p=p.astype(np.float64) / p.sum(dtype=np.float64))) for p in q)
        made.append(Draft(ids, q if drawn else None))
        row += count + 1
    if not masked:
        return logits, made, None
    bits = rng.integers(0, 2**32, (4, -(-vocab // 32)), dtype=np.uint32) | rng.integers(
        0, 2**32, (4, -(-vocab // 32)), dtype=np.uint32
    )
    return logits, made, TokenMasks(bits, rng.integers(-1, 4, rows).astype(np.int32))


@settings(max_examples=300, deadline=None)
@given(PARAMS, st.integers(0, 2**32), st.booleans(), st.booleans())
def test_native_verifies_what_the_reference_verifies(params, seed, drawn, masked):
    native, reference = NativeSampler(VOCAB), ReferenceSampler(VOCAB)
    for sampler in (native, reference):
        for number in range(4):
            sampler.add(sequence(params, number=number, seed=seed + number, stream=number, stop=(7, 9)))
    for step in range(3):
        logits, drafts, masks = random_case(seed + step, drawn, masked)
        positions = [4 + 10 * step] * 4
        got, want = (s.verify(logits, range(4), positions, drafts, masks) for s in (native, reference))
        assert [(t.sequence_id, t.token_id) for t in got] == [(t.sequence_id, t.token_id) for t in want]
        for mine, other in zip(got, want, strict=True):
            assert (mine.logprob is None) == (params.logprobs is None) == (other.logprob is None)
            if mine.logprob is not None:
                assert mine.logprob.rank == other.logprob.rank
                assert mine.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-5)
                assert [t for t, _ in mine.logprob.top] == [t for t, _ in other.logprob.top]


@settings(max_examples=200, deadline=None)
@given(PARAMS, st.integers(0, 2**32), st.booleans())
def test_a_draft_that_was_not_drawn_changes_no_token(params, seed, masked):
    """The tokens, logprobs among them, are those of sampling row by row."""
    drafting, plain = NativeSampler(VOCAB), NativeSampler(VOCAB)
    for sampler in (drafting, plain):
        sampler.add(sequence(params, seed=seed, stop=(7, 9)))
    for step in range(4):
        logits, drafts, masks = random_case(seed + step, drawn=False, masked=masked, drafts=(6,))
        position = 4 + 10 * step
        verified = drafting.verify(logits, [0], [position], drafts, masks)
        for place, token in enumerate(verified):
            one = None if masks is None else TokenMasks(masks.bits, masks.rows[place : place + 1])
            (expected,) = plain.sample(logits[place : place + 1], [0], [position + place], one)
            assert token == expected
        accepted = [t.token_id for t in verified[:-1]]
        assert accepted == list(drafts[0].token_ids[: len(accepted)])
        assert len(verified) == 7 or verified[-1].token_id != drafts[0].token_ids[len(accepted)]


def test_a_drawn_draft_is_compared_where_the_target_is_greedy():
    logits, drafts, _ = random_case(3, drawn=True, masked=False, drafts=(4,))
    for kind in (NativeSampler, ReferenceSampler):
        sampler = kind(VOCAB)
        sampler.add(sequence(SamplingParams(temperature=0.0)))
        ids = [t.token_id for t in sampler.verify(logits, [0], [4], drafts)]
        best = logits.argmax(1).tolist()
        wrong = next((i for i, t in enumerate(drafts[0].token_ids) if t != best[i]), 4)
        assert ids == best[: wrong + 1]


def test_what_is_beyond_the_first_wrong_token_is_never_looked_at():
    logits = np.zeros((3, VOCAB), np.float32)
    logits[0, 5] = 9
    logits[1:] = np.nan
    for kind in (NativeSampler, ReferenceSampler):
        sampler = kind(VOCAB)
        sampler.add(sequence(SamplingParams(temperature=0.0)))
        assert [t.token_id for t in sampler.verify(logits, [0], [4], [Draft((6, 7))])] == [5]
        with pytest.raises(ValueError, match="sequence 0 hold NaN"):
            sampler.verify(logits, [0], [5], [Draft((5, 7))])


def test_min_tokens_and_penalties_count_what_was_accepted():
    logits = np.zeros((4, VOCAB), np.float32)
    logits[:, 7], logits[:, 8], logits[:, 9] = 5, 4, 3
    for kind in (NativeSampler, ReferenceSampler):
        sampler = kind(VOCAB)
        sampler.add(sequence(SamplingParams(temperature=0.0, min_tokens=2, frequency_penalty=2.0), stop=(7,)))
        ids = [t.token_id for t in sampler.verify(logits, [0], [4], [Draft((8, 9, 7))])]
        assert ids == [8, 9, 7, 7], "8 is penalized once it was said; 7 may be said from the third token on"


@pytest.mark.parametrize("kind", [NativeSampler, ReferenceSampler])
def test_shapes_that_do_not_agree_are_refused(kind):
    sampler = kind(VOCAB)
    sampler.add(sequence(SamplingParams()))
    logits = np.zeros((2, VOCAB), np.float32)
    bits = np.zeros((1, 7), np.uint32)
    for drafts, masks, message in (
        ([Draft((1, 2))], None, "2 rows of logits for drafts that need 3"),
        ([Draft((VOCAB,))], None, "not within the vocabulary"),
        ([Draft((-1,))], None, "not within the vocabulary"),
        ([Draft((1,), np.zeros((1, 3), np.float32))], None, "probabilities of shape"),
        ([Draft((1,))], TokenMasks(bits[:, :6], np.zeros(2, np.int32)), "a row has 7 words"),
        ([Draft((1,))], TokenMasks(bits, np.zeros(1, np.int32)), "needs a row of masks"),
        ([Draft((1,))], TokenMasks(bits, np.ones(2, np.int32)), "needs a row of masks"),
        ([Draft((1,))], TokenMasks(bits, np.zeros(2, np.int32)), "leave no token"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler.verify(logits, [0], [4], drafts, masks)


def test_random_numbers_differ_by_their_use():
    for use in (0, DRAFT, ACCEPT, RESIDUAL):
        assert _native.uniform(3, 1, 77, use) == uniform(3, 1, 77, use)
    assert len({uniform(3, 1, 77, use) for use in range(4)}) == 4


# 200,000 samples of a model that is a table: the logits of the next token depend on the last one only.
SAMPLES, BATCH = 200_000, 20_000
TARGET = (np.random.default_rng(1).standard_normal((TINY, TINY)) * 1.5).astype(np.float32)
OTHER = TARGET + np.random.default_rng(2).standard_normal((TINY, TINY)).astype(np.float32)
DRAWN_FROM = softmax(OTHER.astype(np.float64))
ALLOWED = np.random.default_rng(4).random((TINY, TINY)) < 0.6
RULES = {
    "plain": SamplingParams(),
    "top_p": SamplingParams(top_p=0.8),
    "top_k and heat": SamplingParams(top_k=9, temperature=1.3),
    "mask": SamplingParams(),
}


def exact(rule):
    """float64[TINY, TINY]: by last token, the next one's distribution."""
    logits = np.where(ALLOWED, TARGET, -np.inf) if rule == "mask" else TARGET
    return np.stack([distribution(row.astype(np.float64), RULES[rule]) for row in logits])


def draw_rows(probabilities, rng):
    """One token for each row."""
    cumulative = probabilities.cumsum(1)
    return (rng.random((len(cumulative), 1)) * cumulative[:, -1:] < cumulative).argmax(1)


def verify_many(rule, *, drawn, claimed=DRAWN_FROM):
    """Pairs (first, second token or -1) of 200,000 verifications of drafts of two tokens after token 0."""
    rng = np.random.default_rng(9)
    sampler = NativeSampler(TINY)
    sampler.add(sequence(RULES[rule]))
    bits = (ALLOWED * (1 << np.arange(TINY))).sum(1).astype(np.uint32)[:, None]
    pairs = []
    for start in range(0, SAMPLES, BATCH):
        before = np.zeros(BATCH, int)
        first = draw_rows(DRAWN_FROM[before], rng)
        second = draw_rows(DRAWN_FROM[first], rng)
        last = np.stack([before, first, second], 1)
        q = claimed[last[:, :2]].astype(np.float32)
        drafts = [
            Draft((int(a), int(b)), q[i] if drawn else None) for i, (a, b) in enumerate(zip(first, second, strict=True))
        ]
        masks = TokenMasks(bits, last.reshape(-1).astype(np.int32)) if rule == "mask" else None
        positions = range(3 * start, 3 * (start + BATCH), 3)
        numbers = [0] * BATCH
        # The number of a sequence is its place here, which the sampler does not tell: verified tokens come in order.
        tokens = iter(sampler.verify(TARGET[last].reshape(-1, TINY), numbers, positions, drafts, masks))
        for draft in drafts:
            said = []
            for guess in (*draft.token_ids, None):
                said.append(next(tokens).token_id)
                if said[-1] != guess:
                    break
            pairs.append(([*said, -1])[:2])
        assert next(tokens, None) is None
    return np.array(pairs)


def misfits(pairs, expected):
    """(statistic, what it must be below) of the first tokens, and of the second ones after each first."""
    counts = np.bincount(pairs[:, 0], minlength=TINY)
    statistic, freedom = chi_square(counts, expected[0])
    yield statistic, quantile(freedom)
    statistic = freedom = 0
    for first in range(TINY):
        seconds = pairs[(pairs[:, 0] == first) & (pairs[:, 1] >= 0), 1]
        if len(seconds) > 200:
            one, degrees = chi_square(np.bincount(seconds, minlength=TINY), expected[first])
            statistic, freedom = statistic + one, freedom + degrees
    yield statistic, quantile(freedom)


@pytest.mark.parametrize("drawn", [False, True], ids=["compared", "drawn"])
@pytest.mark.parametrize("rule", RULES)
def test_verified_tokens_have_the_exact_distribution(rule, drawn):
    pairs = verify_many(rule, drawn=drawn)
    assert (pairs[:, 1] >= 0).mean() > 0.05, "drafts are accepted"
    assert [s < most for s, most in misfits(pairs, exact(rule))] == [True, True]


def test_the_chi_square_test_sees_wrong_rules():
    """The draft was drawn from something else than is said; what is rejected is drawn from p, not from p - q."""
    wrong_q = softmax(1.1 * OTHER.astype(np.float64))
    assert all(s > most for s, most in misfits(verify_many("plain", drawn=True, claimed=wrong_q), exact("plain")))
    rng = np.random.default_rng(9)
    p, q = exact("plain")[np.zeros(SAMPLES, int)], DRAWN_FROM[np.zeros(SAMPLES, int)]
    draft, again, rows = draw_rows(q, rng), draw_rows(p, rng), np.arange(SAMPLES)
    accepted = rng.random(SAMPLES) * q[rows, draft] < p[rows, draft]
    pairs = np.stack([np.where(accepted, draft, again), np.full(SAMPLES, -1)], 1)
    statistic, most = next(misfits(pairs, exact("plain")))
    assert statistic > most
