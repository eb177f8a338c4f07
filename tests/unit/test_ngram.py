"""Prompt lookup finds the longest match there is, and nothing of anybody else's."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.request import SamplingParams
from kvarn.spec.corpus import MAX_SALTS, Corpora
from kvarn.spec.index import CANDIDATES, NgramIndex
from kvarn.spec.ngram import NgramDrafter
from kvarn.step import NewSequence, SampledToken, ScheduledSequence, SchedulerOutput

TEXTS = st.lists(st.integers(0, 3), max_size=40)


def common(tokens, end, text, most):
    length = 0
    while length < min(most, end, len(text)) and tokens[end - 1 - length] == text[-1 - length]:
        length += 1
    return length


def search(tokens, text, n_min, n_max):
    """(end, length) of the longest match, the latest of equals, by looking everywhere."""
    best = (0, 0)
    for end in range(len(tokens) - 1, 0, -1):
        length = common(tokens, end, text, n_max)
        if length >= n_min and length > best[1]:
            best = (end, length)
    return best


@settings(max_examples=300)
@given(TEXTS, st.lists(TEXTS, max_size=4), st.integers(1, 4), st.integers(0, 4), st.booleans())
def test_the_longest_match_is_found(first, more, n_min, spread, own):
    tokens, n_max = list(first), n_min + spread
    index = NgramIndex(tokens, n_min, n_max)
    for part in more:
        tokens += part
        text = tokens if own else part
        found = index.find(text)
        end, length = search(tokens, text, n_min, n_max)
        if found is None:
            assert not length
        else:
            assert found.length == common(tokens, found.end, text, n_max) >= n_min
            # Of more places than are looked at, the latest are.
            places = [e for e in range(1, len(tokens)) if common(tokens, e, text, n_min) == n_min]
            if len(places) < CANDIDATES:
                assert (found.end, found.length) == (end, length)


def test_a_copy_goes_on_with_what_it_has_copied():
    index = NgramIndex(tokens := [9, 1, 2, 3, 1, 2], 2, 4)
    assert index.find(tokens).following(7) == (3, 1, 2, 3, 1, 2, 3)
    assert index.find(tokens).following(2) == (3, 1)
    assert index.find([5, 9, 1]).following(3) == (2, 3, 1)


def drafter(corpus=0):
    return NgramDrafter(2, 4, Corpora(corpus, 2, 4) if corpus else None)


def new(number, prompt, salt=("", "")):
    return NewSequence(number, tuple(prompt), SamplingParams(), seed=0, stream=0, salt=salt)


def step(drafter, number, *sampled, wanted=3):
    """What is proposed after a step in which these tokens came."""
    part = ScheduledSequence(number, (0,), 0, (0,), sample=True, num_drafts_wanted=wanted)
    tokens = [SampledToken(number, token) for token in sampled]
    proposals = {p.sequence_id: p.token_ids for p in drafter.propose(SchedulerOutput(1, (part,)), tokens, {})}
    return proposals.get(number, ())


def test_it_looks_in_prompt_and_output():
    lookup = drafter()
    lookup.add(new(0, [1, 2, 3, 4, 5]))
    assert step(lookup, 0, 7, wanted=0) == ()
    assert step(lookup, 0, 2, 3) == (4, 5, 7)
    assert step(lookup, 0, 8, 7, 2) == (3, 8, 7)
    assert step(lookup, 0, 6) == ()


def test_a_copy_is_as_long_as_its_match_deserves():
    lookup = drafter()
    lookup.add(new(0, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]))
    assert step(lookup, 0, 2, 3, wanted=9) == (4, 5, 6, 7)
    assert step(lookup, 0, 4, wanted=9) == (5, 6, 7, 8, 9)
    assert step(lookup, 0, 5, wanted=2) == (6, 7)


def test_what_ended_sequences_said_serves_their_own_salt_only():
    lookup = drafter(corpus=100)
    lookup.add(new(0, [1], ("ann", "x")))
    step(lookup, 0, 20, 21, 22, 23, 24)
    lookup.remove(0)
    for number, salt in enumerate([("ann", "x"), ("bob", "x"), ("ann", ""), ("", "")], 1):
        lookup.add(new(number, [20], salt))
        assert step(lookup, number, 21) == ((22, 23, 24) if number == 1 else ())
    assert step(drafter_without_corpus(), 1, 21) == ()


def drafter_without_corpus():
    lookup = drafter()
    lookup.add(new(0, [1]))
    step(lookup, 0, 20, 21, 22, 23)
    lookup.remove(0)
    lookup.add(new(1, [20]))
    return lookup


def test_a_longer_match_of_the_corpus_goes_before_its_own():
    lookup = drafter(corpus=100)
    lookup.add(new(0, [0]))
    step(lookup, 0, 5, 6, 7, 8, 9)
    lookup.remove(0)
    lookup.add(new(1, [6, 7, 1, 1, 5, 6]))
    assert step(lookup, 1, 7) == (8, 9, 8)


def test_corpora_are_bounded_in_tokens_and_in_salts():
    rng = random.Random(1)
    corpora = Corpora(100, 2, 4)
    for _ in range(200):
        corpora.add(("a", ""), [rng.randrange(50) for _ in range(rng.choice([0, 3, 30, 500]))])
        assert corpora.num_tokens(("a", "")) <= 100
    latest = [7, 8, 9, 10]
    corpora.add(("a", ""), latest)
    assert any(index.find([7, 8]) for index in corpora.of(("a", "")))
    for number in range(MAX_SALTS):
        corpora.add((str(number), ""), [1, 2, 3])
    assert corpora.num_tokens(("a", "")) == 0
    assert corpora.num_tokens(("0", "")) == 3
