"""Drafts change no distribution: what is verified is what would have been sampled, token by token."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampling import PARAMS, chi_square, quantile

from kvarn import _native
from kvarn.backends.row_rules import NOT_FINITE
from kvarn.config import SpeculativeConfig
from kvarn.draft_tree import chain, path
from kvarn.request import SamplingParams
from kvarn.runner import Proposal
from kvarn.sampling import Draft, NativeSampler, ReferenceSampler, TokenMasks
from kvarn.sampling.reference import ACCEPT, DRAFT, RESIDUAL, distribution, uniform
from kvarn.spec.lookahead import LookaheadDrafter
from kvarn.step import NewSequence, SampledToken, ScheduledSequence, SchedulerOutput

pytestmark = pytest.mark.long

VOCAB = 211
TINY = 24


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def sequence(sampling, *, number=0, seed=5, stream=0, prompt=(1, 2, 2, 3), stop=()):
    return NewSequence(number, tuple(prompt), sampling, seed, stream, tuple(stop))


def random_case(seed, drawn, masked, vocab=VOCAB, drafts=(3, 0, 1, 5), tree=False):
    """Logits, drafts and masks of several sequences; drafts are likely tokens, so that many are accepted.

    tree: their parents are random ones before them.
    """
    rng = np.random.default_rng(seed)
    rows = sum(drafts) + len(drafts)
    logits = (rng.standard_normal((rows, vocab)) * 3).astype(np.float32)
    made, row = [], 0
    for count in drafts:
        near = logits[row : row + count] + rng.standard_normal((count, vocab)) * 0.5
        q = softmax(near * 1.5).astype(np.float32)
        ids = tuple(int(rng.choice(vocab, p=p.astype(np.float64) / p.sum(dtype=np.float64))) for p in q)
        parents = tuple(int(rng.integers(max(-1, i - 3), i)) for i in range(count)) if tree else None
        if parents:
            rows_of = [row + 1 + parent for parent in parents]
            ids = tuple(int(logits[r].argsort()[-1 - rng.integers(2)]) for r in rows_of)
        made.append(Draft(ids, q if drawn else None, parents))
        row += count + 1
    if not masked:
        return logits, made, None
    bits = rng.integers(0, 2**32, (4, -(-vocab // 32)), dtype=np.uint32) | rng.integers(
        0, 2**32, (4, -(-vocab // 32)), dtype=np.uint32
    )
    return logits, made, TokenMasks(bits, rng.integers(-1, 4, rows).astype(np.int32))


@functools.cache
def threads():
    return _native.Pool(2, [])


@settings(max_examples=300, deadline=None)
@given(PARAMS, st.integers(0, 2**32), st.sampled_from(["compared", "drawn", "tree"]), st.booleans(), st.booleans())
def test_native_verifies_what_the_reference_verifies(params, seed, kind, masked, shared):
    native, reference = NativeSampler(VOCAB, threads if shared else lambda: None), ReferenceSampler(VOCAB)
    for sampler in (native, reference):
        for number in range(4):
            sampler.add(sequence(params, number=number, seed=seed + number, stream=number, stop=(7, 9)))
    for step in range(3):
        logits, drafts, masks = random_case(seed + step, kind == "drawn", masked, tree=kind == "tree")
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
@given(PARAMS, st.integers(0, 2**32), st.booleans(), st.booleans())
def test_a_draft_that_was_not_drawn_changes_no_token(params, seed, masked, tree):
    """The tokens, logprobs among them, are those of sampling row by row, along a branch where the draft is a tree."""
    drafting, plain = NativeSampler(VOCAB), NativeSampler(VOCAB)
    for sampler in (drafting, plain):
        sampler.add(sequence(params, seed=seed, stop=(7, 9)))
    for step in range(4):
        logits, drafts, masks = random_case(seed + step, drawn=False, masked=masked, drafts=(9,), tree=tree)
        position = 4 + 10 * step
        verified = drafting.verify(logits, [0], [position], drafts, masks)
        ids, parents = drafts[0].token_ids, drafts[0].parents or chain(9)
        places = path(ids, parents, [t.token_id for t in verified])
        assert len(places) == len(verified) - 1, "it goes on for as long as a guess is what is drawn"
        for level, (row, token) in enumerate(zip([0, *(place + 1 for place in places)], verified, strict=True)):
            one = None if masks is None else TokenMasks(masks.bits, masks.rows[row : row + 1])
            (expected,) = plain.sample(logits[row : row + 1], [0], [position + level], one)
            assert token == expected


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


def test_a_row_that_is_no_distribution_ends_its_own_draft_with_a_mark():
    """Whether it is reached in a chain or in a tree, and with masks; the other sequence has its tokens."""
    logits = np.zeros((8, VOCAB), np.float32)
    logits[:, 5] = 9
    logits[2] = np.nan
    good = [(1, 5), (1, 5), (1, 5), (1, 5)]
    masks = TokenMasks(np.full((1, -(-VOCAB // 32)), 0xFFFFFFFF, np.uint32), np.zeros(8, np.int32))
    for kind in (NativeSampler, ReferenceSampler):
        for draft, before in ((Draft((5, 5, 5)), 2), (Draft((6, 5, 7), parents=(-1, -1, 1)), 1)):
            for mask in (None, masks):
                sampler = kind(VOCAB)
                for number in (0, 1):
                    sampler.add(sequence(SamplingParams(temperature=0.0), number=number))
                verified = sampler.verify(logits, [0, 1], [4, 4], [draft, Draft((5, 5, 5))], mask)
                assert [(t.sequence_id, t.token_id) for t in verified] == [(0, 5)] * before + [(0, NOT_FINITE), *good]


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
        ([Draft((1,), parents=(0,))], None, "not the parents of 1 tokens"),
        ([Draft((1,), parents=(-2,))], None, "not the parents"),
        ([Draft((1,), parents=(-1, -1))], None, "not the parents"),
        ([Draft((1,))], TokenMasks(bits[:, :6], np.zeros(2, np.int32)), "a row has 7 words"),
        ([Draft((1,))], TokenMasks(bits, np.zeros(1, np.int32)), "needs a row of masks"),
        ([Draft((1,))], TokenMasks(bits, np.ones(2, np.int32)), "needs a row of masks"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler.verify(logits, [0], [4], drafts, masks)


@pytest.mark.parametrize("kind", [NativeSampler, ReferenceSampler])
def test_a_sequence_whose_rules_leave_no_token_says_so_and_the_others_go_on(kind):
    sampler = kind(VOCAB)
    for number, rules in enumerate([{}, {"allowed_token_ids": (5, 6), "bad_words": ((5, 5),)}]):
        sampler.add(sequence(SamplingParams(temperature=0.0, **rules), number=number))
    logits = np.zeros((6, VOCAB), np.float32)
    logits[:, 5] = 1.0
    bits = np.zeros((1, 7), np.uint32)
    bits[0, 0] = 1 << 5  # 5 only, which the second sequence may not say twice
    drafts = [Draft((5, 5)), Draft((5, 5))]
    masks = TokenMasks(bits, np.array([-1, -1, -1, 0, 0, 0], np.int32))
    said = sampler.verify(logits, [0, 1], [4, 4], drafts, masks)
    assert [(t.sequence_id, t.token_id) for t in said] == [(0, 5), (0, 5), (0, 5), (1, 5), (1, -1)]
    assert sampler.sample(logits[:1], [1], [5])[0].token_id == 6, "nothing was taken in for the missing one"


@pytest.mark.parametrize("kind", [NativeSampler, ReferenceSampler])
def test_words_that_a_draft_completes_are_forbidden(kind):
    sampler = kind(VOCAB)
    sampler.add(sequence(SamplingParams(temperature=0.0, bad_words=((8, 9), (3,), (9, 9, 9)))))
    logits = np.zeros((4, VOCAB), np.float32)
    logits[:, [3, 8, 9, 7]] = [[5, 4, 3, 2], [5, 0, 4, 3], [5, 0, 4, 3], [5, 0, 4, 3]]
    assert [t.token_id for t in sampler.verify(logits, [0], [4], [Draft((8, 9, 9))])] == [8, 7]
    assert [t.token_id for t in sampler.verify(logits[1:], [0], [6], [Draft((9, 9))])] == [9, 9, 7]
    q = np.zeros((1, VOCAB), np.float32)
    assert sampler.guess(logits[1:2], [0], [9], [(8,)], q, [-1]) == [7]
    assert sampler.guess(logits[1:2], [0], [9], [(7,)], q, [-1]) == [9]
    assert sampler.sample(logits[1:2], [0], [9])[0].token_id == 9, "what was guessed ahead is not remembered"


@pytest.mark.parametrize("kind", [NativeSampler, ReferenceSampler])
def test_a_draft_with_branches_cannot_have_been_drawn(kind):
    sampler = kind(VOCAB)
    sampler.add(sequence(SamplingParams()))
    q = np.full((2, VOCAB), 1 / VOCAB, np.float32)
    with pytest.raises(ValueError, match="must be a chain"):
        sampler.verify(np.zeros((3, VOCAB), np.float32), [0], [4], [Draft((1, 2), q, (-1, -1))])
    sampler.verify(np.zeros((3, VOCAB), np.float32), [0], [4], [Draft((1, 2), q, (-1, 0))])


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


def branching(count):
    """Trees of three guesses of what follows token 0, each with one of what follows it."""
    rng = np.random.default_rng(9)
    first = np.argsort(rng.random((count, TINY)) * DRAWN_FROM[0], axis=1)[:, -3:]
    second = draw_rows(DRAWN_FROM[first.reshape(-1)], rng).reshape(count, 3)
    return [(tuple(ids), (-1, -1, -1, 0, 1, 2)) for ids in np.concatenate([first, second], 1).tolist()]


def looked_ahead(count):
    """Trees that `LookaheadDrafter` makes for what follows token 0, in a text that is drawn from the table."""
    rng, drafter = np.random.default_rng(9), LookaheadDrafter(SpeculativeConfig("lookahead", window=3, guesses=3))
    drafter.add(sequence(SamplingParams(), prompt=range(TINY)))
    last, draft, found = TINY - 1, Proposal(0, (), parents=()), []
    while len(found) < count:
        part = ScheduledSequence(0, (last,), 0, (), True, draft.token_ids, draft.parents, 9, 99)
        logits = TARGET[[last, *draft.token_ids]]
        text = []
        while len(text) == len(path(draft.token_ids, draft.parents, text)):
            text.append(last := int(draw_rows(softmax(TARGET[[last]]), rng)[0]))
        step = SchedulerOutput(1, (part,))
        (draft,) = drafter.propose(step, [SampledToken(0, token) for token in text], {"logits": logits})
        if last == 0:
            found.append((draft.token_ids, draft.parents))
    return found


def verify_trees(rule, trees, *, rows=None):
    """Pairs as of `verify_many`, of drafts that are taken from the trees at random.

    rows: which guess each row of logits comes after, 0 being token 0. None: its own, as it must.
    """
    rng = np.random.default_rng(9)
    sampler = NativeSampler(TINY)
    sampler.add(sequence(RULES[rule]))
    bits = (ALLOWED * (1 << np.arange(TINY))).sum(1).astype(np.uint32)[:, None]
    trees = [(Draft(tokens, parents=parents), np.array([0, *tokens])) for tokens, parents in trees]
    pairs = []
    for start in range(0, SAMPLES, BATCH):
        drafts, lasts = zip(*(trees[i] for i in rng.integers(0, len(trees), BATCH)), strict=True)
        last = np.concatenate(lasts if rows is None else [tokens[list(rows)] for tokens in lasts])
        masks = TokenMasks(bits, last.astype(np.int32)) if rule == "mask" else None
        positions = range(3 * start, 3 * (start + BATCH), 3)
        said = iter(sampler.verify(TARGET[last], [0] * BATCH, positions, drafts, masks))
        for draft in drafts:
            text = [next(said).token_id]
            while len(path(draft.token_ids, draft.parents, text)) == len(text):
                text.append(next(said).token_id)
            pairs.append([*text, -1][:2])
        assert next(said, None) is None
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


@pytest.mark.parametrize("trees", [branching, looked_ahead])
@pytest.mark.parametrize("rule", RULES)
def test_tokens_verified_along_a_tree_have_the_exact_distribution(rule, trees):
    pairs = verify_trees(rule, trees(200))
    assert (pairs[:, 1] >= 0).mean() > 0.15, "branches are gone along"
    assert [s < most for s, most in misfits(pairs, exact(rule))] == [True, True]


def test_the_chi_square_test_sees_rows_of_another_branch():
    """What comes after the second guess is drawn from what comes after the first, and the other way round."""
    pairs = verify_trees("plain", branching(200), rows=(0, 2, 1, 3, 4, 5, 6))
    first, second = misfits(pairs, exact("plain"))
    assert first[0] < first[1]
    assert second[0] > second[1]


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
