"""A loaded program outside the engine: one sequence at a time, logits of every position."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvarn.backends import Executable, InputBatch, KvCacheSpec, StepLimits
from kvarn.config import CudaConfig
from kvarn.engine import make_backend
from kvarn.errors import ConfigError
from kvarn.models import Model, load_model
from kvarn.text import Tokenizer, load_tokenizer
from kvarn.weights import open_model

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class EvalSession:
    """A model, its tokenizer and a cache for one sequence of up to `context` tokens."""

    model: Model
    tokenizer: Tokenizer
    executable: Executable
    context: int
    chunk: int

    def logits(self, token_ids: NDArray[np.int32], first: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Runs one sequence from its start and yields (position, logits float32[n, vocab]) for positions >= first.

        Arrays are valid until the next is asked for. token_ids: at most `context`.
        """
        total = int(token_ids.size)
        if total > self.context:
            raise ValueError(f"{total} tokens in a session for {self.context}")
        for start in range(0, total, self.chunk):
            end = min(start + self.chunk, total)
            wanted = max(0, end - max(first, start))
            groups = len(self.model.program.kv_groups)
            batch = InputBatch.of_one(
                token_ids[start:end], start, num_outputs=wanted, block_size=BLOCK_SIZE, num_groups=groups
            )
            out = self.executable.execute(batch)
            if wanted:
                yield end - wanted, out[self.model.program.output]


@contextmanager
def open_session(
    path: Path,
    *,
    context: int,
    backend: str = "cpu",
    threads: int = 0,
    kv_dtype: str = "float16",
    cuda: CudaConfig | None = None,
) -> Iterator[EvalSession]:
    """Loads the model at `path` for sequences of up to `context` tokens and closes it afterwards. cuda: of that
    back-end, see `CudaConfig`."""
    chunk = min(64, context)
    with open_model(path) as files:
        model = load_model(files)
        if context > model.config.max_positions:
            raise ConfigError(f"context must be at most {model.config.max_positions} for this model, not {context}")
        blocks = (context + BLOCK_SIZE - 1) // BLOCK_SIZE * len(model.program.kv_groups)
        cache = KvCacheSpec(blocks, BLOCK_SIZE, kv_dtype)
        executable = make_backend(backend, threads, cuda=cuda).load(
            model.program, model.weights, cache, StepLimits(chunk, chunk, context)
        )
        try:
            yield EvalSession(model, load_tokenizer(files), executable, context, chunk)
        finally:
            executable.close()
