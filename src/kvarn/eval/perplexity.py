"""Perplexity of a text in chunks of one context length, the second half of each scored (llama-perplexity's method)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvarn.errors import ConfigError
from kvarn.eval.session import EvalSession


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """exp of the mean negative log-likelihood (nats) over `tokens` scored tokens, with its standard error."""

    perplexity: float
    standard_error: float
    tokens: int
    chunks: int
    context: int
    chunk_nll: tuple[float, ...]
    """Mean negative log-likelihood of each chunk."""


def token_nll(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Negative log-likelihood in nats of each target: logsumexp(logits[i]) - logits[i, targets[i]], in float64 sums.

    logits: float32[n, vocab]; targets: int64[n]; result: float64[n].
    """
    top = logits.max(axis=1, keepdims=True)
    total = np.exp(logits - top).sum(axis=1, dtype=np.float64)
    chosen = logits[np.arange(len(targets)), targets]
    result: NDArray[np.float64] = np.log(total) + top[:, 0].astype(np.float64) - chosen.astype(np.float64)
    return result


@dataclass(frozen=True, slots=True)
class Chunks:
    """Consecutive chunks of a text, int32[context] each; positions from `first` on are scored."""

    ids: tuple[NDArray[np.int32], ...]
    first: int

    @staticmethod
    def of(session: EvalSession, text: str, most: int | None = None) -> Chunks:
        """The whole text is tokenized once, special tokens in it being text; what fills no chunk is left out.

        In each chunk the first token is replaced by BOS where the vocabulary adds one, and positions context/2 …
        context-2 predict the tokens after them, so that each scored token has at least half a context before it. most:
        at most that many chunks. Raises ConfigError where the text is shorter than one chunk.
        """
        context = session.context
        if context < 4:
            raise ConfigError(f"context must be at least 4 tokens, not {context}")
        ids = np.asarray(session.tokenizer.encode(text), dtype=np.int32)
        bos = next(iter(session.tokenizer.encode("", add_special_tokens=True)), None)
        available = ids.size // context
        if available == 0:
            raise ConfigError(f"text has {ids.size} tokens, fewer than one chunk of context={context}")
        count = available if most is None else min(most, available)
        chunks = ids[: count * context].reshape(count, context).copy()
        if bos is not None and bos == session.tokenizer.bos_token_id:
            chunks[:, 0] = bos
        return Chunks(tuple(chunks), context // 2)


def perplexity(
    session: EvalSession,
    text: str,
    *,
    chunks: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Perplexity of `text` in consecutive chunks of `session.context` tokens (see `Chunks.of`).

    chunks: at most that many. progress(done, total) is called after each chunk. Raises ConfigError where the text is
    shorter than one chunk.
    """
    parts = Chunks.of(session, text, chunks)
    nlls: list[NDArray[np.float64]] = []
    for index, chunk in enumerate(parts.ids):
        scored: list[NDArray[np.float64]] = []
        for position, logits in session.logits(chunk[:-1], parts.first):
            targets = chunk[position + 1 : position + 1 + len(logits)].astype(np.int64)
            scored.append(token_nll(logits, targets))
        nlls.append(np.concatenate(scored))
        if progress is not None:
            progress(index + 1, len(parts.ids))
    every = np.concatenate(nlls)
    mean = float(every.mean())
    error = float(every.std(ddof=1) / math.sqrt(every.size)) if every.size > 1 else 0.0
    return PerplexityResult(
        perplexity=math.exp(mean),
        standard_error=math.exp(mean) * error,
        tokens=int(every.size),
        chunks=len(parts.ids),
        context=session.context,
        chunk_nll=tuple(float(chunk.mean()) for chunk in nlls),
    )
