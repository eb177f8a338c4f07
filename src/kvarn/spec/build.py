"""From settings to a drafter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kvarn.config import SpeculativeConfig
from kvarn.errors import ModelFileError
from kvarn.program import Logits, Program
from kvarn.runner import Drafter, NullDrafter
from kvarn.tensors import TensorSource

if TYPE_CHECKING:
    from kvarn.spec.head_model import HeadModel


def _no_model() -> Drafter:
    raise ValueError("methods draft, medusa and eagle need a model")


def make_drafter(
    config: SpeculativeConfig | None, of_model: Callable[[], Drafter] = _no_model, logits: str = "logits"
) -> Drafter:
    """The drafter that the settings ask for, without sequences. of_model: makes the one of method draft, or of heads.
    logits: the program's output buffer."""
    if config is None:
        return NullDrafter()
    if config.looks_up_first:
        from kvarn.spec.found_first import FoundFirst

        return FoundFirst(_lookup(config), of_model())
    if config.costly:
        return of_model()
    if config.method == "lookahead":
        from kvarn.spec.lookahead import LookaheadDrafter

        return LookaheadDrafter(config, logits)
    return _lookup(config)


def _lookup(config: SpeculativeConfig) -> Drafter:
    from kvarn.spec.corpus import Corpora
    from kvarn.spec.ngram import NgramDrafter

    corpora = Corpora(config.corpus_tokens, config.ngram_min, config.ngram_max) if config.corpus_tokens else None
    return NgramDrafter(config.ngram_min, config.ngram_max, corpora)


def open_heads(
    config: SpeculativeConfig | None, program: Program, weights: TensorSource | None = None
) -> HeadModel | None:
    """The heads that the settings ask for, to be run beside the target; None where they ask for none.

    program, weights: the target's; without weights what heads take can be told, but not whether they are the target's.
    Raises ModelFileError for heads that are damaged or another model's, ConfigError.
    """
    if config is None or not config.heads:
        return None
    from kvarn.models import content_key
    from kvarn.spec.eagle import eagle_model
    from kvarn.spec.heads import read_heads
    from kvarn.spec.medusa import medusa_model

    target = None if weights is None else content_key(program, weights)
    heads = read_heads(Path(config.heads).expanduser(), config.source, target)
    sizes = next(op.weight for op in program.ops if isinstance(op, Logits) and op.out == program.output)
    if (heads.shape.vocab_size, heads.shape.hidden_size) != program.weight(sizes).shape:
        raise ModelFileError("trained for a model of other sizes", path=config.heads, field="shape")
    if config.source == "medusa":
        return medusa_model(heads, program, weights, config.k)
    return eagle_model(heads, program, weights)
