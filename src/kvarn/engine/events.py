"""What comes out of the engine: outputs and failures of requests, and its statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from kvarn.engine.histogram import HistogramSnapshot
from kvarn.engine.meter import NO_HISTOGRAMS
from kvarn.errors import KvarnError, OverloadError
from kvarn.request import FinishReason, Request, RequestOutput, SequenceOutput


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """A request that ends without an answer. The last event of its request."""

    request_id: str
    error: KvarnError


Event = RequestOutput | RequestFailed


_NONE_ENDED = MappingProxyType({reason.value: 0 for reason in FinishReason})


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine. Counters count since its start; they never go down."""

    running: int = 0
    """Sequences that take part in the steps."""
    waiting: int = 0
    """Sequences that do not: new or preempted."""
    queued: int = 0
    """Requests of which nothing has been computed; the queue's limits count these and their prompts' tokens."""
    queued_tokens: int = 0
    num_blocks: int = 0
    free_blocks: int = 0
    """Blocks that a sequence can have: empty ones, and those that only the prefix cache holds."""
    cached_blocks: int = 0
    """Those of `free_blocks` that the prefix cache holds."""
    steps: int = 0
    prompt_tokens: int = 0
    """Of the requests that have got their first token; those found in the prefix cache included."""
    generated_tokens: int = 0
    preemptions: int = 0
    failed_steps: int = 0
    restarts: int = 0
    """Times that the engine began anew after a failure."""
    busy_seconds: float = 0.0
    """For which the engine has been at what it does now: a step, mostly; 0 while there is nothing to do."""
    prefix_queries: int = 0
    """Tokens looked up in the prefix cache: those of each sequence when it is admitted, again after a preemption."""
    prefix_hits: int = 0
    """Those of them whose KV was there."""
    evicted_tokens: int = 0
    """Tokens whose KV the prefix cache let go of to make room."""
    saved_tokens: int = 0
    """Tokens whose KV was saved to the second tier."""
    loaded_tokens: int = 0
    """Those of the hits whose KV was loaded from it."""
    drafts: int = 0
    """Drafts that were verified: one a sequence and step at most."""
    draft_tokens: int = 0
    """Their tokens."""
    accepted_tokens: int = 0
    """Those of them that became output."""
    accepted_by_position: tuple[int, ...] = ()
    """The same by how far ahead they were guessed, the next token at 0."""
    copied_tokens: int = 0
    """Of draft_tokens those that were looked up in what was known, not computed."""
    accepted_copies: int = 0
    """Of accepted_tokens the same."""
    draft_seconds: float = 0.0
    """Spent on proposing drafts."""
    grammars_compiled: int = 0
    grammar_cache_hits: int = 0
    """Requests whose grammar was compiled already."""
    grammars_refused: int = 0
    """Those that could not be compiled, or not within their limits."""
    grammar_compile_seconds: float = 0.0
    """Spent on compiling, beside the engine."""
    grammar_mask_seconds: float = 0.0
    """Spent on finding the tokens that grammars allow, beside the model."""
    grammar_wait_seconds: float = 0.0
    """For which steps waited for that."""
    rejections: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(OverloadError.REASONS, 0))
    """Requests that were refused because there was too much to do, by `OverloadError.reason`."""
    ended: Mapping[str, int] = field(default_factory=lambda: _NONE_ENDED)
    """Answers (`n` of a request) that ended, by `FinishReason`."""
    histograms: Mapping[str, HistogramSnapshot] = field(default_factory=lambda: NO_HISTOGRAMS)
    """How long requests and steps took and how large they were: see `kvarn.engine.meter`."""


def never_started(request: Request) -> RequestOutput:
    """The last output of a request that was aborted before it was queued."""
    ended = tuple(SequenceOutput(i, (), "", finish_reason=FinishReason.ABORT) for i in range(request.sampling.n))
    return RequestOutput(request.request_id, ended, len(request.prompt_token_ids), 0, finished=True)


def join_parts(parts: Sequence[SequenceOutput]) -> tuple[SequenceOutput, ...]:
    """Consecutive gains of sequences, each sequence's as one."""
    by_index: dict[int, list[SequenceOutput]] = {}
    for part in parts:
        by_index.setdefault(part.index, []).append(part)
    if len(by_index) == len(parts):
        return tuple(parts)
    return tuple(
        SequenceOutput(
            index=index,
            token_ids=tuple(token for part in own for token in part.token_ids),
            text="".join(part.text for part in own),
            logprobs=tuple(logprob for part in own for logprob in part.logprobs),
            finish_reason=own[-1].finish_reason,
            stop_reason=own[-1].stop_reason,
        )
        for index, own in by_index.items()
    )


def merge_outputs(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """Consecutive outputs of one request as one, for a reader that is slower than the engine. At least one."""
    last = outputs[-1]
    if len(outputs) == 1:
        return last
    merged = join_parts([part for output in outputs for part in output.outputs])
    prompt = next((output.prompt_logprobs for output in outputs if output.prompt_logprobs), ())
    return replace(last, outputs=tuple(sorted(merged, key=lambda part: part.index)), prompt_logprobs=prompt)
