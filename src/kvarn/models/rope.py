"""Rotary frequencies: every scaling kind ends as a table of radians per position (`RopeTable`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvarn.models.config import ConfigReader, is_number
from kvarn.program import RopeTable

Style = Literal["halves", "interleaved"]
Frequencies = NDArray[np.float64]
Scaled = tuple[Frequencies, float]
"""Frequencies, and the factor on sine and cosine."""

DEFAULT_THETA = 10000.0


@dataclass(frozen=True, slots=True)
class Scaling:
    """What a scaling kind reads. base: unscaled frequencies; fields: its own section of the config.

    original: positions the model was trained for before it was stretched. longest: positions it will be run with.
    """

    base: Frequencies
    theta: float
    fields: ConfigReader
    max_positions: int
    original: int
    longest: int

    def factor(self, default: float | None = None) -> float:
        """How far positions are stretched, at least 1."""
        value = self.fields.number("factor", default)
        if value < 1:
            raise self.fields.fail("factor", f"must be at least 1, not {value:g}")
        return value


def base_frequencies(rotary_dim: int, theta: float) -> Frequencies:
    """theta^(-2i/d) for i = 0 … d/2 - 1 (Su et al. 2021, section 3.2.2)."""
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim
    result: Frequencies = theta**-exponents
    return result


def make_table(frequencies: Frequencies, style: Style, attention_factor: float = 1.0) -> RopeTable:
    """The table with these frequencies."""
    return RopeTable(tuple(float(x) for x in frequencies), style, attention_factor)


def unscaled(scaling: Scaling) -> Scaled:
    """The base frequencies. Also for "dynamic", which changes the base beyond max_positions only: no sequence is let
    beyond that."""
    return scaling.base, 1.0


def linear(scaling: Scaling) -> Scaled:
    """Positions divided by the factor (Chen et al. 2023, "position interpolation")."""
    return scaling.base / scaling.factor(), 1.0


def llama3(scaling: Scaling) -> Scaled:
    """Long waves are stretched by `factor`, short ones kept, those between blended (Llama 3.1's model code)."""
    base, fields = scaling.base, scaling.fields
    low, high = fields.number("low_freq_factor", 1.0), fields.number("high_freq_factor", 4.0)
    if high <= low:
        raise fields.fail("high_freq_factor", f"must be above low_freq_factor ({low:g}), not {high:g}")
    waves = 2 * math.pi / base
    smooth = np.clip((scaling.original / waves - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * base / scaling.factor() + smooth * base, 1.0


def yarn(scaling: Scaling) -> Scaled:
    """YaRN's frequencies ("NTK by parts") and attention factor (Peng et al. 2023, sections 3.2 to 3.4)."""
    base, fields, dim = scaling.base, scaling.fields, 2 * len(scaling.base)
    factor = scaling.factor(scaling.max_positions / scaling.original)

    def dimension_of(rotations: float) -> float:
        return dim * math.log(scaling.original / (rotations * 2 * math.pi)) / (2 * math.log(scaling.theta))

    low, high = dimension_of(fields.number("beta_fast", 32.0)), dimension_of(fields.number("beta_slow", 1.0))
    if fields.boolean("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    return base / factor * ramp + base * (1 - ramp), _yarn_attention(factor, fields)


def _yarn_attention(factor: float, fields: ConfigReader) -> float:
    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    given = fields.optional_number("attention_factor")
    if given is not None:
        return given
    if fields.get("mscale") and fields.get("mscale_all_dim"):  # DeepSeek's; 0 means absent
        return magnitude(fields.number("mscale")) / magnitude(fields.number("mscale_all_dim"))
    return magnitude(1.0)


def longrope(scaling: Scaling) -> Scaled:
    """A factor per dimension (Ding et al. 2024, section 3.3).

    A model has one set for contexts up to its original length and one for longer ones. A running server cannot change
    the set without making its cached keys wrong, so the choice is made once, by the longest sequence it will take.
    """
    base, fields, original = scaling.base, scaling.fields, scaling.original
    key = "long_factor" if scaling.longest > original else "short_factor"
    factors = fields.get(key)
    if not isinstance(factors, list) or len(factors) != len(base) or not all(_sound_factor(f) for f in factors):
        raise fields.fail(key, f"must be {len(base)} positive numbers")
    scale = fields.number("factor", scaling.max_positions / original)
    attention = fields.optional_number("attention_factor")
    if attention is None:
        attention = 1.0 if scale <= 1 or original == 1 else math.sqrt(1 + math.log(scale) / math.log(original))
    return base / np.asarray(factors, dtype=np.float64), attention


def _sound_factor(value: Any) -> bool:
    return is_number(value) and 1e-6 <= value <= 1e6


KINDS: Mapping[str, Callable[[Scaling], Scaled]] = {
    "default": unscaled,
    "dynamic": unscaled,
    "linear": linear,
    "llama3": llama3,
    "yarn": yarn,
    "longrope": longrope,
}


def hf_section(reader: ConfigReader) -> ConfigReader | None:
    """The rope section of a config.json, in its old (`rope_scaling`) or new (`rope_parameters`) spelling."""
    return reader.section("rope_scaling") or reader.section("rope_parameters")


def hf_max_positions(section: ConfigReader | None, max_positions: int) -> int:
    """The longest sequence. YaRN configs often keep the original length in max_position_embeddings: see their
    model cards, which tell to add the section and nothing else."""
    if section is None or _kind(section) != "yarn" or section.get("factor") is None:
        return max_positions
    original = section.integer("original_max_position_embeddings", max_positions, high=1 << 31)
    return max(max_positions, min(int(original * section.number("factor")), 1 << 31))


def table_from_hf(
    reader: ConfigReader,
    section: ConfigReader | None,
    rotary_dim: int,
    *,
    theta: float,
    max_positions: int,
    max_model_len: int | None,
) -> RopeTable:
    """The table that a rope section of a config.json describes; without one, plain frequencies of base `theta`.

    Raises ModelFileError naming the field, UnsupportedModelError naming the kind.
    """
    _require_even(reader, "head_dim", rotary_dim)
    _refuse_partial(reader)
    if section is None:
        return make_table(base_frequencies(rotary_dim, theta), "halves")
    _refuse_partial(section)
    nested = [key for key, value in section.values.items() if isinstance(value, Mapping)]
    if nested or section.get("mrope_section") is not None:
        raise section.unsupported(nested[0] if nested else "mrope_section", "is not supported in this family")
    theta = section.number("rope_theta", theta, low=1.0)
    kind = _kind(section)
    if kind not in KINDS:
        raise section.unsupported("rope_type", f"{kind!r} is not supported ({', '.join(KINDS)} are)")
    named = reader if reader.get("original_max_position_embeddings") is not None else section
    scaling = Scaling(
        base_frequencies(rotary_dim, theta),
        theta,
        section,
        max_positions,
        named.integer("original_max_position_embeddings", max_positions, high=1 << 31),
        max_positions if max_model_len is None else min(max_positions, max_model_len),
    )
    frequencies, attention = KINDS[kind](scaling)
    return make_table(frequencies, "halves", attention)


def _kind(section: ConfigReader) -> str:
    kind = section.get("rope_type") or section.get("type") or "default"
    if not isinstance(kind, str):
        raise section.fail("rope_type", "must be a string")
    return kind[:60]


def _require_even(reader: ConfigReader, key: str, rotary_dim: int) -> None:
    if rotary_dim % 2:
        raise reader.fail(key, f"must be even to be rotated in pairs, not {rotary_dim}")


def _refuse_partial(reader: ConfigReader) -> None:
    if reader.number("partial_rotary_factor", 1.0) != 1.0:
        raise reader.unsupported("partial_rotary_factor", "heads that rotate in part are not supported")


def gguf_max_positions(reader: ConfigReader, max_positions: int) -> int:
    """The longest sequence (see `hf_max_positions`)."""
    if reader.get("rope.scaling.type") != "yarn":
        return max_positions
    original = reader.integer("rope.scaling.original_context_length", max_positions, high=1 << 31)
    return max(max_positions, min(int(original * reader.number("rope.scaling.factor", 1.0)), 1 << 31))


def table_from_gguf(
    reader: ConfigReader, rotary_dim: int, style: Style, factors: NDArray[np.float32] | None
) -> RopeTable:
    """The table that GGUF metadata describes. factors: the tensor rope_freqs.weight (Llama 3), one per frequency.

    Raises ModelFileError naming the field, UnsupportedModelError naming the kind.
    """
    _require_even(reader, "rope.dimension_count", rotary_dim)
    theta = reader.number("rope.freq_base", DEFAULT_THETA, low=1.0)
    base = base_frequencies(rotary_dim, theta)
    if factors is not None:
        if factors.shape != base.shape or not all(_sound_factor(float(f)) for f in factors):
            raise reader.fail("rope_freqs.weight", f"must be {len(base)} positive numbers")
        base = base / factors
    kind = reader.get("rope.scaling.type") or "none"
    legacy = reader.number("rope.scale_linear", 1.0, low=1e-6)
    factor = reader.number("rope.scaling.factor", legacy, low=1e-6) if kind != "none" else legacy
    if kind in ("none", "linear"):
        return make_table(base / factor, style)
    if kind != "yarn":
        raise reader.unsupported("rope.scaling.type", f"{str(kind)[:60]!r} is not supported (none, linear, yarn are)")
    if reader.number("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        raise reader.unsupported("rope.scaling.yarn_ext_factor", "other values than 1 are not supported")
    frequencies, attention = yarn(_gguf_yarn(reader, base, theta, factor))
    for key in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        attention *= reader.number(key, 1.0)
    return make_table(frequencies, style, attention)


def _gguf_yarn(reader: ConfigReader, base: Frequencies, theta: float, factor: float) -> Scaling:
    longest = reader.integer("context_length", high=1 << 31)
    fields = {
        "factor": factor,
        "beta_fast": reader.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": reader.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    original = reader.integer("rope.scaling.original_context_length", longest, high=1 << 31)
    return Scaling(base, theta, ConfigReader(fields, path=reader.path), longest, original, longest)
