"""What a lossy choice costs: how far its next-token distributions are from those of its source."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvarn.eval.perplexity import Chunks, token_nll
from kvarn.eval.session import EvalSession


@dataclass(frozen=True, slots=True)
class Divergence:
    """A candidate against its source, over `tokens` scored positions. KL(source || candidate) in nats."""

    perplexity: float
    """The candidate's own."""
    source_perplexity: float
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    """Share of positions at which both find the same token most probable."""
    tokens: int


def kl_divergence(source: NDArray[np.float32], candidate: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(source || candidate) in nats of each row. source, candidate: logits float32[n, vocab]; result: float64[n]."""
    p, q = _log_softmax(source), _log_softmax(candidate)
    result: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=1)
    return np.maximum(result, 0.0)


def divergence(
    source: EvalSession,
    candidates: dict[str, EvalSession],
    text: str,
    *,
    chunks: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Divergence]:
    """Each candidate against the source over the same chunks of a text (see `Chunks.of`), in one pass of the source.

    All sessions are of one model and one context. progress(done, total) is called after each chunk. Raises ConfigError
    where the text is shorter than one chunk.
    """
    parts = Chunks.of(source, text, chunks)
    seen: dict[str, list[_Scores]] = {name: [] for name in candidates}
    for index, chunk in enumerate(parts.ids):
        wanted = [(position, logits.copy()) for position, logits in source.logits(chunk[:-1], parts.first)]
        for name, session in candidates.items():
            for (position, logits), (_, given) in zip(wanted, session.logits(chunk[:-1], parts.first), strict=True):
                targets = chunk[position + 1 : position + 1 + len(logits)].astype(np.int64)
                seen[name].append(_Scores.of(logits, given, targets))
        if progress is not None:
            progress(index + 1, len(parts.ids))
    return {name: _summary(scores) for name, scores in seen.items()}


@dataclass(frozen=True, slots=True)
class _Scores:
    kl: NDArray[np.float64]
    agree: NDArray[np.bool_]
    nll: NDArray[np.float64]
    source_nll: NDArray[np.float64]

    @staticmethod
    def of(source: NDArray[np.float32], given: NDArray[np.float32], targets: NDArray[np.int64]) -> _Scores:
        agree = source.argmax(axis=1) == given.argmax(axis=1)
        return _Scores(kl_divergence(source, given), agree, token_nll(given, targets), token_nll(source, targets))


def _summary(scores: list[_Scores]) -> Divergence:
    kl = np.concatenate([s.kl for s in scores])
    return Divergence(
        perplexity=math.exp(np.concatenate([s.nll for s in scores]).mean()),
        source_perplexity=math.exp(np.concatenate([s.source_nll for s in scores]).mean()),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        top1_agreement=float(np.concatenate([s.agree for s in scores]).mean()),
        tokens=int(kl.size),
    )


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
