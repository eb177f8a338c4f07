"""Guesses in the order of what they are expected to bring."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.spec.chain import LEAST, Candidates, candidates_of, chain_of, kept_rows, likely_tree
from kvarn.step import SampledToken, ScheduledSequence, SchedulerOutput

LEVELS = st.lists(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4), min_size=1, max_size=4)


@given(LEVELS, st.integers(1, 12))
def test_no_other_tree_of_as_many_guesses_is_expected_to_bring_more(weights, most):
    levels = []
    for level in weights:
        probabilities = sorted((weight / sum(weights[0] + level) for weight in level), reverse=True)
        levels.append(Candidates(range(10, 10 + len(level)), probabilities))
    places, parents = likely_tree(levels, most)
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
    ]
    likely = sorted((p for p in every if p >= LEAST), reverse=True)[:most]
    assert together == pytest.approx(likely)


@given(st.integers(0, 2**32), st.integers(1, 9))
def test_candidates_are_the_likeliest(seed, count):
    logits = np.random.default_rng(seed).standard_normal(7).astype(np.float32) * 3
    found = candidates_of(logits, count)
    weights = np.exp(logits.astype(np.float64))
    order = np.argsort(-logits)[: min(count, 7)]
    assert list(found.places) == order.tolist()
    assert list(found.probabilities) == pytest.approx((weights / weights.sum())[order].tolist(), rel=1e-5)


def test_a_chain_ends_where_it_is_likely_to_be_wrong():
    sure, unsure = np.log(np.array([0.9, 0.1], np.float32)), np.log(np.array([0.4, 0.6], np.float32))
    assert chain_of([sure] * 4) == [0] * 4
    assert chain_of([unsure] * 9) == [1] * 4, "0.6⁴ is above the least, 0.6⁵ below"
    assert chain_of([np.full(2, np.nan, np.float32)] * 3) == []


def test_the_last_row_that_was_right_is_kept():
    def part(number, tokens, draft=(), sample=True):
        return ScheduledSequence(number, tokens, 0, ((),), sample, draft)

    sequences = (part(1, (5,), (6, 7)), part(2, (1, 2, 3), sample=False), part(3, (4, 4)), part(4, (9,), (8,)))
    said = [(1, 6), (1, 9), (3, 2), (4, 8), (4, 1)]
    sampled = [SampledToken(number, token) for number, token in said]
    kept = list(kept_rows(SchedulerOutput(1, sequences), sampled))
    assert [(k.part.sequence_id, k.tokens, k.token_row, k.output_row) for k in kept] == [
        (1, (6, 9), 1, 1), (3, (2,), 7, 3), (4, (8, 1), 9, 5),
    ]  # fmt: skip
