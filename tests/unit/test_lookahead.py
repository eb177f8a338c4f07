"""Lookahead decoding: what its window makes, and what of it is proposed."""

from itertools import pairwise

import numpy as np

from kvarn.config import SpeculativeConfig
from kvarn.draft_tree import levels, path
from kvarn.request import SamplingParams
from kvarn.spec.lookahead import LookaheadDrafter, LookaheadWindow, NgramPool
from kvarn.step import NewSequence, SampledToken, ScheduledSequence, SchedulerOutput

VOCAB = 100


def after(text):
    """What a model says that counts by sevens."""
    return (text[-1] + 7) % VOCAB


def test_a_window_is_a_tree_of_columns_that_begin_one_after_the_other():
    window = LookaheadWindow(3, 2, [5], seed=1)
    window.columns = [[1, 4], [2, 5], [3, 6]]
    tokens, parents = window.tree()
    assert tokens == [1, 2, 3, 4, 5, 6]
    assert parents == [-1, 0, 1, 0, 1, 2]
    assert levels(parents) == [0, 1, 2, 1, 2, 3]


def test_columns_become_ngrams_of_the_models_own_tokens():
    window = LookaheadWindow(2, 3, [5, 6], seed=1)
    assert window.columns == LookaheadWindow(2, 3, [5, 6], seed=1).columns
    assert set(window.columns[0] + window.columns[1]) <= {5, 6}
    begun = [column[-1] for column in window.columns]
    assert window.advance([10, 20]) == []
    assert window.advance([11, 21]) == [], "the second token is not the model's yet"
    assert window.advance([12, 22]) == [[begun[0], 10, 11, 12], [begun[1], 20, 21, 22]]
    assert window.columns == [[10, 11, 12], [20, 21, 22]]
    assert window.advance([13, 23]) == [[10, 11, 12, 13], [20, 21, 22, 23]]


def test_a_pool_has_the_latest_ngrams_of_each_token():
    pool = NgramPool(2)
    for ngram in ((1, 2, 3), (1, 2, 4), (2, 2, 2), (1, 2, 3), (1, 5, 6)):
        pool.add(ngram)
    assert pool.after(1) == [(5, 6), (2, 3)]
    assert pool.after(2) == [(2, 2)]
    assert pool.after(3) == []


class Bench:
    """A drafter and a model that is a function of the text; every draft is verified by the rule."""

    def __init__(self, prompt, model=after, **settings):
        self.model = model
        self.config = SpeculativeConfig("lookahead", **settings)
        self.drafter = LookaheadDrafter(self.config)
        self.drafter.add(NewSequence(0, tuple(prompt), SamplingParams(), seed=3, stream=0))
        self.text = list(prompt)
        self.draft = (), ()

    def step(self, *, ahead=99, nodes=99, verify=99):
        """How many tokens came in a step. ahead, nodes: wanted. verify: guesses that there was room for."""
        tokens, parents = (values[:verify] for values in self.draft)
        part = ScheduledSequence(0, (self.text[-1],), 0, (), True, tokens, parents, ahead, nodes)
        texts = [self.text]
        for token, parent in zip(tokens, parents, strict=True):
            texts.append([*texts[parent + 1], token])
        logits = np.zeros((1 + len(texts), VOCAB), np.float32)
        logits[np.arange(1, 1 + len(texts)), [self.model(text) for text in texts]] = 1
        said = []
        while len(path(tokens, parents, said)) == len(said):
            said.append(self.model([*self.text, *said]))
        self.text += said
        # Another sequence, which nothing is wanted of, has the first row.
        other = ScheduledSequence(7, (1,), 0, (), True)
        step = SchedulerOutput(1, (other, part))
        self.drafter.add(NewSequence(7, (1,), SamplingParams(), seed=3, stream=0))
        sampled = [SampledToken(7, 1), *(SampledToken(0, token) for token in said)]
        proposals = self.drafter.propose(step, sampled, {"logits": logits})
        self.draft = (proposals[0].token_ids, proposals[0].parents) if proposals else ((), ())
        assert not proposals or proposals[0].sequence_id == 0
        return len(said)


def test_ngrams_that_were_made_ahead_are_said_in_one_step():
    """A text in which nothing follows the same token twice: nothing in it could be copied."""
    bench = Bench([73, 52, 31, 3], window=4, ngram=3, guesses=2)
    steps = [bench.step() for _ in range(14)]
    pairs = list(pairwise(bench.text))
    assert len(pairs) == len(set(pairs))
    assert steps[:2] == [1, 1]
    assert max(steps) == 3, "both tokens of an n-gram, and one beyond"


def test_a_draft_begins_with_the_window_and_has_what_is_known_of_the_last_token():
    bench = Bench([1, 2, 3, 1, 2, 4, 1], lambda text: 50, window=2, ngram=3, guesses=3)
    bench.step(ahead=0)
    bench.text[-1:] = []
    bench.drafter._states[0].tokens[-1:] = []
    bench.drafter._states[0].pooled = 0
    bench.model = lambda text: 1
    bench.step()
    tokens, parents = bench.draft
    assert len(tokens) <= 4 + 2 * 3
    assert parents[:4] == (-1, 0, 0, 1)
    assert any(path(tokens, parents, [2, 4]))
    assert any(path(tokens, parents, [2, 3]))
    assert len(set(zip(tokens[4:], parents[4:], strict=True))) == len(tokens) - 4, "what begins alike is one branch"


def test_where_there_is_no_room_for_the_window_there_are_ngrams_only():
    text = [1, 2, 3, 4, 1, 2, 3, 4, 1]
    loop = {1: 2, 2: 3, 3: 4, 4: 1}
    bench = Bench(text, lambda text: loop[text[-1]], window=4, ngram=4, guesses=2)
    bench.step(nodes=5)
    assert bench.draft == ((3, 4, 1), (-1, 0, 1))
    bench.step(ahead=2)
    assert bench.draft == ((3, 4), (-1, 0))
    assert bench.step() == 3
    assert len(bench.draft[0]) > 12
    few = Bench(text, lambda text: loop[text[-1]], window=4, ngram=4, guesses=2, max_step_drafts=18)
    few.step()
    assert len(few.draft[0]) > 12


def test_a_window_that_was_not_computed_in_full_stays_as_it_is():
    bench = Bench([3], window=3, ngram=3, guesses=1)
    bench.step()
    window = bench.drafter._states[0].window
    before = [list(column) for column in window.columns]
    bench.step(verify=5)
    assert window.columns == before
    bench.step(verify=6)
    assert window.columns != before


def test_sequences_are_forgotten():
    bench = Bench([3])
    bench.step()
    bench.drafter.remove(0)
    bench.drafter.remove(0)
    assert 0 not in bench.drafter._states
