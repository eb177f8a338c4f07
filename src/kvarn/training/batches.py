"""Windows of texts, in an order that a seed and a step's number give, as arrays for a training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvarn.training.store import Text, TextStore


@dataclass(frozen=True, slots=True)
class Window:
    """Rows `first` … of a text, at most as many as a batch is long."""

    text: Text
    first: int


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """S windows of `length` anchors and `ahead` rows more.

    features: float32[S, length + ahead, width], hidden states (see `TextStore`). tokens: int64[S, length + ahead + 1]:
    tokens[s, i] is the one that features[s, i] is of. valid: bool[S, length, ahead]: whether the answer has the token
    that guess k at anchor i is compared with, tokens[s, i + 2 + k], and the guess may be asked for there.
    """

    features: NDArray[np.float32]
    tokens: NDArray[np.int64]
    valid: NDArray[np.bool_]


def windows_of(texts: Sequence[Text], length: int, context: int) -> list[Window]:
    """Windows that have each place of each answer once as an anchor. context: rows of the prompt before it, too."""
    found = []
    for text in texts:
        start = max(0, text.prompt_length - 1 - context)
        found += [Window(text, first) for first in range(start, text.length - 2, length)]
    return found


def make_batch(store: TextStore, windows: Sequence[Window], length: int, ahead: int) -> Batch:
    """The arrays of some windows; zeros where a text has ended."""
    rows = length + ahead
    features = np.zeros((len(windows), rows, store.features.shape[1]), np.float32)
    tokens = np.zeros((len(windows), rows + 1), np.int64)
    valid = np.zeros((len(windows), length, ahead), np.bool_)
    anchors, guesses = np.arange(length)[:, None], np.arange(ahead)[None, :]
    for place, window in enumerate(windows):
        text, first = window.text, window.first
        known = min(rows + 1, text.length - first)
        begin = text.start + first
        tokens[place, :known] = store.tokens[begin : begin + known]
        hidden = min(rows, text.length - 1 - first)
        features[place, :hidden] = store.features[begin : begin + hidden]
        asked = first + anchors >= text.prompt_length - 1
        valid[place] = asked & (anchors + 2 + guesses < known)
    return Batch(features, tokens, valid)


def chosen(windows: Sequence[Window], count: int, seed: int, step: int) -> list[Window]:
    """The windows of a training step: each once in every so many steps, in an order of its own each time."""
    each = max(1, len(windows) // count)
    epoch, place = divmod(step, each)
    order = np.random.default_rng((seed, epoch)).permutation(len(windows))
    return [windows[i] for i in order[place * count : (place + 1) * count]]
