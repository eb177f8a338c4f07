"""KL divergence and top-1 agreement of a candidate against its source."""

import math

import numpy as np
import pytest

from kvarn.errors import ConfigError
from kvarn.eval.divergence import divergence, kl_divergence


class Oracle:
    """A session whose logits follow from the position alone."""

    def __init__(self, context, logits_of):
        self.context, self.logits_of = context, logits_of
        self.tokenizer = self
        self.bos_token_id = None

    def encode(self, text, **_):
        return [ord(c) for c in text]

    def logits(self, ids, first):
        for position in range(first, len(ids)):
            yield position, np.asarray([self.logits_of(position)], np.float32)


def peaked(token):
    return [4.0 if i == token else 0.0 for i in range(128)]


def test_kl_of_two_known_distributions():
    p, q = np.log(np.float32([[0.5, 0.25, 0.25]])), np.log(np.float32([[0.25, 0.25, 0.5]]))
    wanted = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert kl_divergence(p, q)[0] == pytest.approx(wanted, rel=1e-6)
    assert kl_divergence(p + 7, p)[0] == pytest.approx(0, abs=1e-7)


def test_the_same_logits_diverge_by_nothing():
    source = Oracle(8, lambda position: peaked(position % 128))
    same = divergence(source, {"same": source}, "abcdefgh" * 3)["same"]
    assert (same.tokens, same.kl_max, same.top1_agreement) == (3 * 3, 0.0, 1.0)
    assert same.perplexity == same.source_perplexity


def test_agreement_counts_positions_whose_best_token_is_the_same():
    source = Oracle(8, lambda position: peaked(1))
    other = Oracle(8, lambda position: peaked(1 if position == 4 else 2))
    result = divergence(source, {"other": other}, "abcdefgh")["other"]
    assert result.top1_agreement == pytest.approx(1 / 3)
    assert result.kl_max > result.kl_mean > 0


def test_a_text_shorter_than_a_chunk_is_refused():
    source = Oracle(8, lambda position: peaked(1))
    with pytest.raises(ConfigError, match="fewer than one chunk of context=8"):
        divergence(source, {"same": source}, "abc")
