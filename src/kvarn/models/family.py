"""`Family`: what a model family gives the rest of kvarn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvarn.models.config import ConfigReader
from kvarn.models.decoder import (
    GGUF_IGNORED,
    GGUF_NAMES,
    HF_IGNORED,
    HF_NAMES,
    HF_PREFIXES,
    Blueprint,
    decoder_program,
)
from kvarn.models.source import NameMap
from kvarn.program import Program


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What beside the config decides a program. rope_factors: the tensor rope_freqs.weight, where a GGUF has it."""

    max_model_len: int | None = None
    rope_factors: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """One model family: how its configs are read, its program, and where its tensors lie."""

    name: str
    hf_types: tuple[str, ...]
    gguf_architectures: tuple[str, ...]
    from_hf: Callable[[ConfigReader, LoadOptions], Blueprint]
    from_gguf: Callable[[ConfigReader, LoadOptions], Blueprint]
    build: Callable[[Blueprint], Program] = decoder_program
    hf_names: NameMap = field(default_factory=lambda: HF_NAMES)
    gguf_names: NameMap = field(default_factory=lambda: GGUF_NAMES)
    hf_prefixes: tuple[str, ...] = HF_PREFIXES
    hf_ignored: str = HF_IGNORED
    gguf_ignored: str = GGUF_IGNORED
