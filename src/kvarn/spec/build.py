"""From settings to a drafter."""

from __future__ import annotations

from kvarn.config import SpeculativeConfig
from kvarn.runner import Drafter, NullDrafter
from kvarn.spec.corpus import Corpora
from kvarn.spec.lookahead import LookaheadDrafter
from kvarn.spec.ngram import NgramDrafter


def make_drafter(config: SpeculativeConfig | None, logits: str = "logits") -> Drafter:
    """The drafter that the settings ask for, without sequences. logits: the program's output buffer."""
    if config is None:
        return NullDrafter()
    if config.method == "lookahead":
        return LookaheadDrafter(config, logits)
    corpora = Corpora(config.corpus_tokens, config.ngram_min, config.ngram_max) if config.corpus_tokens else None
    return NgramDrafter(config.ngram_min, config.ngram_max, corpora)
