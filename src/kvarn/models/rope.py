"""Rotary frequencies: every scaling kind ends as a table of radians per position (`RopeTable`)."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvarn.errors import UnsupportedModelError
from kvarn.models.config import ConfigReader
from kvarn.program import RopeTable

Style = Literal["halves", "interleaved"]
Frequencies = NDArray[np.float64]


def base_frequencies(rotary_dim: int, theta: float) -> Frequencies:
    """theta^(-2i/d) for i = 0 … d/2 - 1 (Su et al. 2021, section 3.2.2)."""
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim
    result: Frequencies = theta**-exponents
    return result


def make_table(frequencies: Frequencies, style: Style, attention_factor: float = 1.0) -> RopeTable:
    """The table with these frequencies."""
    return RopeTable(tuple(float(x) for x in frequencies), style, attention_factor)


def llama3_frequencies(base: Frequencies, scaling: ConfigReader) -> Frequencies:
    """Long waves are stretched by `factor`, short ones kept, those between blended (Llama 3.1's model code)."""
    factor = scaling.number("factor")
    low, high = scaling.number("low_freq_factor", 1.0), scaling.number("high_freq_factor", 4.0)
    original = scaling.integer("original_max_position_embeddings", 8192)
    if high <= low:
        raise scaling.fail("high_freq_factor", f"must be above low_freq_factor ({low:g}), not {high:g}")
    waves = 2 * math.pi / base
    smooth = np.clip((original / waves - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * base / factor + smooth * base


def yarn(base: Frequencies, theta: float, scaling: ConfigReader, max_positions: int) -> tuple[Frequencies, float]:
    """Frequencies and attention factor of YaRN (Peng et al. 2023, sections 3.2 to 3.4, "NTK-by-parts")."""
    original = scaling.integer("original_max_position_embeddings", max_positions)
    factor = scaling.number("factor", max_positions / original)
    fast, slow = scaling.number("beta_fast", 32.0), scaling.number("beta_slow", 1.0)
    dim = 2 * len(base)

    def dimension_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(fast), dimension_of(slow)
    if scaling.boolean("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    frequencies = base / factor * ramp + base * (1 - ramp)

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    given = scaling.optional_number("attention_factor")
    mscale, mscale_all = scaling.optional_number("mscale"), scaling.optional_number("mscale_all_dim")
    if given is not None:
        attention = given
    elif mscale is not None and mscale_all is not None:
        attention = magnitude(mscale) / magnitude(mscale_all)
    else:
        attention = magnitude(1.0)
    return frequencies, attention


def longrope(
    base: Frequencies, scaling: ConfigReader, max_positions: int, max_model_len: int | None, original: int
) -> tuple[Frequencies, float]:
    """Per-dimension factors (Ding et al. 2024, section 3.3).

    A model has one set for contexts up to its original length and one for longer ones. A running server cannot change
    the set without making its cached keys wrong, so the choice is made once, by the longest sequence it will take.
    """
    original = scaling.integer("original_max_position_embeddings", original)
    longest = max_positions if max_model_len is None else min(max_positions, max_model_len)
    key = "long_factor" if longest > original else "short_factor"
    factors = scaling.get(key)
    if not isinstance(factors, list) or len(factors) != len(base) or not all(_positive(f) for f in factors):
        raise scaling.fail(key, f"must be {len(base)} positive numbers")
    scale = scaling.number("factor", max_positions / original)
    given = scaling.optional_number("attention_factor")
    if given is None:
        given = 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(original))
    return base / np.asarray(factors, dtype=np.float64), given


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def table_from_hf(
    reader: ConfigReader,
    rotary_dim: int,
    *,
    theta: float,
    scaling: ConfigReader | None,
    max_positions: int,
    max_model_len: int | None,
) -> RopeTable:
    """The table that a config.json describes, in its old (`rope_scaling`) or new (`rope_parameters`) spelling."""
    if scaling is not None:
        theta = scaling.number("rope_theta", theta)
    base = base_frequencies(rotary_dim, theta)
    if scaling is None:
        return make_table(base, "halves")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind in ("default", "dynamic"):
        # Dynamic NTK changes the base beyond max_positions only, and no sequence is let beyond that.
        return make_table(base, "halves")
    if kind == "linear":
        return make_table(base / scaling.number("factor"), "halves")
    if kind == "llama3":
        return make_table(llama3_frequencies(base, scaling), "halves")
    if kind == "yarn":
        frequencies, attention = yarn(base, theta, scaling, max_positions)
        return make_table(frequencies, "halves", attention)
    if kind == "longrope":
        original = reader.integer("original_max_position_embeddings", max_positions)
        frequencies, attention = longrope(base, scaling, max_positions, max_model_len, original)
        return make_table(frequencies, "halves", attention)
    raise UnsupportedModelError(
        f"{reader.path}: rope scaling {kind!r} is not supported (default, linear, dynamic, llama3, yarn, longrope are)"
    )


def table_from_gguf(
    reader: ConfigReader, rotary_dim: int, style: Style, factors: NDArray[np.float32] | None
) -> RopeTable:
    """The table that GGUF metadata describes. factors: the tensor rope_freqs.weight (Llama 3), one per frequency."""
    theta = reader.number("rope.freq_base", 10000.0)
    base = base_frequencies(rotary_dim, theta)
    if factors is not None:
        if factors.shape != base.shape or not np.all(np.isfinite(factors) & (factors > 0)):
            raise reader.fail("rope_freqs.weight", f"must be {len(base)} positive numbers")
        base = base / factors
    kind = reader.get("rope.scaling.type")
    legacy = reader.optional_number("rope.scale_linear")
    if kind in (None, "none"):
        return make_table(base if legacy is None else base / legacy, style)
    if kind == "linear":
        return make_table(base / reader.number("rope.scaling.factor"), style)
    if kind == "yarn":
        values = {
            "factor": reader.number("rope.scaling.factor"),
            "original_max_position_embeddings": reader.integer("rope.scaling.original_context_length"),
            "beta_fast": reader.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": reader.number("rope.scaling.yarn_beta_slow", 1.0),
        }
        scaling = ConfigReader(values, path=reader.path)
        frequencies, attention = yarn(base, theta, scaling, reader.integer("context_length"))
        return make_table(frequencies, style, attention * reader.number("rope.scaling.attn_factor", 1.0))
    raise UnsupportedModelError(f"{reader.path}: rope scaling {kind!r} is not supported (linear and yarn are)")
