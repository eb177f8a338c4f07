"""Tiny models on the CUDA back-end, and beside it on the reference back-end."""

from __future__ import annotations

from typing import Any

import numpy as np
from op_programs import groups_of, ragged

from kvarn.backends import Backend, Executable, KvCacheSpec, StepLimits
from kvarn.backends.cuda import CudaBackend
from kvarn.config import CudaConfig
from kvarn.models.in_memory import InMemoryModel

BLOCK = 16
LIMITS = StepLimits(max_num_tokens=64, max_num_sequences=8, max_model_len=128, max_num_drafts=56)


def card(device: str, dtype: str = "float32", weights: str = "dense", group: int = 32) -> CudaBackend:
    """The back-end, on the card or in the interpreter."""
    return CudaBackend(CudaConfig(dtype, weights, group, device))


def load(
    backend: Backend, model: InMemoryModel, kv: str = "float32", blocks: int = 8, limits: StepLimits = LIMITS
) -> Executable:
    """A model with a cache of so many blocks for each KV group."""
    return backend.load(model.program, model, KvCacheSpec(blocks * groups_of(model), BLOCK, kv), limits)


def run(executable: Executable, parts: Any, tables: Any, **more: Any) -> np.ndarray:
    """The logits of all rows of sequences given as (token ids, position of the first)."""
    batch = ragged(parts, tables=tables, num_groups=groups_of(executable), **more)
    return executable.execute(batch)["logits"].copy()


def assert_near(got: np.ndarray, wanted: np.ndarray, share: float = 1e-5) -> None:
    """Equal up to a share of the largest value."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=share * np.abs(wanted).max(initial=0))
