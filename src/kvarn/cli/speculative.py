"""`--speculative`: one option with several settings, as `method=ngram,k=auto`."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import typer

from kvarn.config import SpeculativeConfig
from kvarn.errors import ConfigError

Speculative = Annotated[
    str | None,
    typer.Option(
        help="Guess tokens ahead, so that several come in one step: 'method=ngram,k=auto' or k=4. ngram: what followed "
        "when the last tokens occurred before, in prompt or output. 'method=draft,model=MODEL': what a smaller model "
        "with the same vocabulary says (draft_vocab=N: it says its first N tokens only, which is faster). "
        "'method=eagle,heads=FILE' or medusa: what heads say that were trained for the model (`kvarn spec train` makes "
        "them). 'method=ngram+draft,model=MODEL' (ngram+eagle, ngram+medusa): as ngram, and where that finds nothing "
        "as the other. lookahead: n-grams that the model makes up itself (window, ngram, guesses). auto: as many as "
        "pay. Also: p_min (of draft and eagle: guess on while as sure), max_k (of auto, and of ngram+...), ngram_min, "
        "ngram_max, corpus_tokens, max_step_drafts."
    ),
]
_NAMES = tuple(field.name for field in dataclasses.fields(SpeculativeConfig))
_TEXTS = ("model", "heads")


def speculative_config(text: str | None) -> SpeculativeConfig | None:
    """The settings; None where the option is not given. Raises ConfigError naming the setting."""
    if text is None:
        return None
    given: dict[str, str] = {}
    for setting in text.split(","):
        name, equals, value = (part.strip() for part in setting.partition("="))
        if not equals or name not in _NAMES:
            names = ", ".join(_NAMES)
            raise ConfigError(f"--speculative: settings are name=value with a name of {names}, not {setting[:40]!r}")
        if name in given:
            raise ConfigError(f"--speculative: {name} is given twice")
        given[name] = value
    method = given.pop("method", SpeculativeConfig().method)
    if given.get("k") == "auto":
        del given["k"]
    model, heads = (given.pop(name, "") for name in _TEXTS)
    p_min = _share("p_min", given.pop("p_min", "0"))
    numbers = {name: _number(name, value) for name, value in given.items()}
    return SpeculativeConfig(method, model=model, heads=heads, p_min=p_min, **numbers)


def _number(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        must = "a whole number or auto" if name == "k" else "a whole number"
        raise ConfigError(f"--speculative: {name} must be {must}, not {text[:40]!r}")
    return int(text)


def _share(name: str, text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise ConfigError(f"--speculative: {name} must be a number between 0 and 1, not {text[:40]!r}")
    return share
