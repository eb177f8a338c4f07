"""From settings to a drafter."""

from __future__ import annotations

from collections.abc import Callable

from kvarn.config import SpeculativeConfig
from kvarn.runner import Drafter, NullDrafter
from kvarn.spec.corpus import Corpora
from kvarn.spec.lookahead import LookaheadDrafter
from kvarn.spec.ngram import NgramDrafter


def _no_model() -> Drafter:
    raise ValueError("method draft needs a model")


def make_drafter(
    config: SpeculativeConfig | None, draft_model: Callable[[], Drafter] = _no_model, logits: str = "logits"
) -> Drafter:
    """The drafter that the settings ask for, without sequences. draft_model: makes the one of method draft. logits: the
    program's output buffer."""
    if config is None:
        return NullDrafter()
    if config.method == "draft":
        return draft_model()
    if config.method == "lookahead":
        return LookaheadDrafter(config, logits)
    corpora = Corpora(config.corpus_tokens, config.ngram_min, config.ngram_max) if config.corpus_tokens else None
    return NgramDrafter(config.ngram_min, config.ngram_max, corpora)
