"""From settings to a drafter."""

from __future__ import annotations

from pathlib import Path

from kvarn.config import SpeculativeConfig
from kvarn.models import content_key
from kvarn.program import Program
from kvarn.runner import Drafter, NullDrafter
from kvarn.spec.corpus import Corpora
from kvarn.spec.eagle import eagle_model
from kvarn.spec.head_model import HeadModel
from kvarn.spec.heads import read_heads
from kvarn.spec.medusa import medusa_model
from kvarn.spec.ngram import NgramDrafter
from kvarn.tensors import TensorSource


def make_drafter(config: SpeculativeConfig | None) -> Drafter:
    """The drafter that the settings ask for, without sequences: one that needs no program of its own."""
    if config is None:
        return NullDrafter()
    corpora = Corpora(config.corpus_tokens, config.ngram_min, config.ngram_max) if config.corpus_tokens else None
    return NgramDrafter(config.ngram_min, config.ngram_max, corpora)


def open_heads(
    config: SpeculativeConfig | None, program: Program, weights: TensorSource
) -> HeadModel | None:
    """What the drafter that the settings ask for runs beside the target; None where it runs nothing.

    program, weights: the target's. Raises ModelFileError for heads that are damaged or another model's, ConfigError.
    """
    if config is None or not config.heads:
        return None
    heads = read_heads(Path(config.heads).expanduser(), config.method, content_key(program, weights))
    if config.method == "medusa":
        return medusa_model(heads, program, weights, config.k)
    return eagle_model(heads, program, weights)
