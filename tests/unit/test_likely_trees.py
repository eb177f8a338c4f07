"""Guesses in the order of what they are expected to bring."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.spec.chain import LEAST, Candidates, candidates_of, kept_rows, likely_tree
from kvarn.step import SampledToken, ScheduledSequence, SchedulerOutput

LEVELS = st.lists(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4), min_size=1, max_size=4)


@given(LEVELS, st.integers(1, 12), st.booleans())
def test_no_other_tree_of_as_many_guesses_is_expected_to_bring_more(weights, most, chained):
    levels = []
    for level in weights:
        probabilities = sorted((weight / sum(weights[0] + level) for weight in level), reverse=True)
        levels.append(Candidates(range(10, 10 + len(level)), probabilities))
    places, parents = likely_tree(levels, most, chained=chained)
    together, depths = [], []
    for place, parent in zip(places, parents, strict=True):
        assert parent < len(together)
        depth = 0 if parent < 0 else depths[parent] + 1
        depths.append(depth)
        before = 1.0 if parent < 0 else together[parent]
        together.append(before * levels[depth].probabilities[place - 10])
    assert len(set(zip(parents, places, strict=True))) == len(places), "no guess twice"
    assert together == sorted(together, reverse=True)
    every = [
        float(np.prod([levels[d].probabilities[rank] for d, rank in enumerate(path)]))
        for depth in range(1, len(levels) + 1)
        for path in itertools.product(*(range(len(level.places)) for level in levels[:depth]))
        if not chained or not any(path[:-1])
    ]
    likely = sorted((p for p in every if p >= LEAST), reverse=True)[:most]
    assert together == pytest.approx(likely)


@given(st.integers(0, 2**32), st.integers(1, 9))
def test_candidates_are_the_likeliest(seed, count):
    logits = np.random.default_rng(seed).standard_normal(7).astype(np.float32) * 3
    found = candidates_of(logits, count)
    if 1 - found.probabilities[0] < LEAST:
        count = 1
    weights = np.exp(logits.astype(np.float64))
    order = np.argsort(-logits)[: min(count, 7)]
    assert list(found.places) == order.tolist()
    assert list(found.probabilities) == pytest.approx((weights / weights.sum())[order].tolist(), rel=1e-5)


def test_what_is_not_likely_is_not_guessed():
    unsure = candidates_of(np.log(np.array([0.4, 0.6], np.float32)), 1)
    assert likely_tree([unsure] * 9, 9) == ([1] * 4, [-1, 0, 1, 2]), "0.6⁴ is above the least, 0.6⁵ below"
    assert likely_tree([candidates_of(np.full(2, np.nan, np.float32), 1)], 3) == ([], [])
    assert likely_tree([], 3) == ([], [])


def test_rows_of_what_was_right_are_kept():
    def part(number, tokens, draft=(), parents=(), sample=True):
        return ScheduledSequence(number, tokens, 0, ((),), sample, draft, parents)

    tree = part(4, (9,), (8, 5, 7, 1), (-1, -1, 1, 2))
    sequences = (part(1, (5,), (6, 7), (-1, 0)), part(2, (1, 2, 3), sample=False), part(3, (4, 4)), tree, part(5, (2,)))
    said = [(1, 6), (1, 9), (3, 2), (4, 5), (4, 7), (4, 3)]  # a grammar failed: nothing of the last
    sampled = [SampledToken(number, token) for number, token in said]
    kept = list(kept_rows(SchedulerOutput(1, sequences), sampled))
    rows = np.arange(14, dtype=np.float32)[:, None]
    assert [(k.part.sequence_id, list(k.tokens), k.output_row, k.rows(rows)[:, 0].tolist()) for k in kept] == [
        (1, [6, 9], 1, [0, 1]),
        (2, [], -1, [3, 4, 5]),
        (3, [2], 3, [6, 7]),
        (4, [5, 7, 3], 7, [8, 10, 11]),
        (5, [], -1, [13]),
    ]
