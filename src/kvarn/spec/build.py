"""From settings to a drafter."""

from __future__ import annotations

from kvarn.config import SpeculativeConfig
from kvarn.runner import Drafter, NullDrafter
from kvarn.spec.corpus import Corpora
from kvarn.spec.ngram import NgramDrafter


def make_drafter(config: SpeculativeConfig | None) -> Drafter:
    """The drafter that the settings ask for, without sequences."""
    if config is None:
        return NullDrafter()
    corpora = Corpora(config.corpus_tokens, config.ngram_min, config.ngram_max) if config.corpus_tokens else None
    return NgramDrafter(config.ngram_min, config.ngram_max, corpora)
