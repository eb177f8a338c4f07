"""kvarn's engine over a random model, as `kvarn serve` has it: scheduler, cache and sampler, on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gpu_parts.loaded import BLOCK_SIZE, settings
from gpu_parts.native import ensure_native
from gpu_parts.shapes import Sizes
from kvarn.config import CacheConfig, EngineConfig, SchedulerConfig
from kvarn.models.in_memory import InMemoryModel

if TYPE_CHECKING:
    from kvarn.engine import LLM

ROOT = Path(__file__).resolve().parents[2]
MOST_TOKENS = 8192
"""Of a step: prompts are computed in chunks beside the answers that are under way."""


@contextmanager
def engine(model: InMemoryModel, device: torch.device, sizes: Sizes) -> Iterator[LLM]:
    """With bf16 weights and room for all streams at once. No prefix is kept: no prompt comes twice."""
    ensure_native(ROOT)
    from kvarn.engine import LLM, build_engine
    from kvarn.testing import byte_tokenizer

    streams = sizes.streams
    length = streams.prompt + streams.output
    config = EngineConfig(
        max_model_len=length,
        backend="cuda",
        cuda=settings(device, sizes, "bf16"),
        cache=CacheConfig(
            block_size=BLOCK_SIZE, num_blocks=streams.count * -(-length // BLOCK_SIZE), dtype=sizes.kv_type,
            enable_prefix_caching=False,
        ),
        scheduler=SchedulerConfig(streams.count, max(streams.count, min(MOST_TOKENS, streams.count * streams.prompt))),
    )  # fmt: skip
    llm = LLM.from_engine(build_engine(model, byte_tokenizer(model.config.vocab_size), config))
    try:
        yield llm
    finally:
        llm.close()
