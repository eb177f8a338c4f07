"""`Sequence`: one running stream of tokens, and why it ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvarn.cache import PrefixHit, PrefixPath, Tables
from kvarn.request import FinishReason, Request, SamplingParams
from kvarn.scheduler.acceptance import Acceptance
from kvarn.step import NewSequence, PromptTargets


@dataclass(slots=True, eq=False)
class Sequence:
    """One stream of a request (`n` of them share a prompt). Owned and mutated by the scheduler; others only read.

    There is no prefill state: `token_ids` are known, KV of the first `num_computed_tokens` is in the blocks of
    `table`, and each step catches up some of the rest. When all are computed, a token is sampled and appended.
    """

    sequence_id: int
    request: Request
    index: int
    """0 … n-1, the stream of the random counter."""
    arrival: int
    """Number of the request in order of arrival."""
    seed: int
    max_length: int
    """Most tokens, prompt and output together."""
    eos_token_ids: frozenset[int]
    """Tokens that end the sequence as the model's own end; empty with ignore_eos."""
    table: Tables
    prefix: PrefixPath
    """Its place in the prefix cache."""
    token_ids: list[int] = field(init=False)
    """Prompt, then output."""
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens whose KV was found in the prefix cache; not those found again after a preemption."""
    expected_hit: PrefixHit = field(default_factory=PrefixHit)
    """What the prefix cache had of the prompt when the sequence was queued. For forecasts."""
    num_prompt_logprobs: int = 0
    """Of the prompt's tokens whose logprobs are asked for, how many have come."""
    num_preemptions: int = 0
    prompt_charged: bool = field(init=False)
    """Whether the policy has been told of the prompt's tokens. Only the first of a request's sequences pays them."""
    draft: tuple[int, ...] = ()
    """Guesses of its next tokens, for the next step."""
    parents: tuple[int, ...] = ()
    """Of each guess the one that it follows (see `kvarn.draft_tree`)."""
    copied: bool = False
    """Whether they were looked up, not computed."""
    num_drafter_tokens: int = 0
    """Tokens that there were when a drafter was last asked and not held up by reading: it has read them."""
    drafter_reads: bool = False
    """Whether what a drafter has not read of it was found worth the time."""
    acceptance: dict[int, Acceptance] = field(default_factory=dict)
    """How often such guesses were right, by the draft's kind, where somebody asks."""
    num_draft_tokens: int = 0
    """Guesses that were verified."""
    num_accepted_tokens: int = 0
    """Those of them that are part of the output."""
    num_accepted_copies: int = 0
    """Of these those that were looked up."""
    announced: bool = False
    """Whether the runner has been told of it."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        self.prompt_charged = self.index > 0

    @property
    def sampling(self) -> SamplingParams:
        """The request's parameters."""
        return self.request.sampling

    @property
    def num_tokens(self) -> int:
        """Prompt and output."""
        return len(self.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Known tokens whose KV is not in the blocks; at least 1."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Sampled so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether it computes its prompt for what the model says of it, too: then no KV from elsewhere is of use.

        One sequence of a request does that for all.
        """
        asked = self.request.sampling.prompt_logprobs is not None and self.index == 0
        return asked and self.num_prompt_logprobs < self.num_prompt_tokens - 1

    def computable(self, free_rows: int) -> int:
        """Tokens that it may compute in a step that has so many rows of logits to give beside its own."""
        if not self.lacks_prompt_logprobs:
            return self.num_uncomputed_tokens
        known = max(0, self.num_prompt_logprobs - self.num_computed_tokens)
        return min(self.num_uncomputed_tokens, known + 1 + free_rows)

    def prompt_targets(self, start: int, end: int) -> PromptTargets | None:
        """Of a part that computes the tokens start … end - 1."""
        if not self.lacks_prompt_logprobs:
            return None
        first, last = max(start, self.num_prompt_logprobs), min(end, self.num_prompt_tokens - 1)
        tokens = self.request.prompt_token_ids[first + 1 : last + 1]
        return PromptTargets(tokens, self.request.sampling.prompt_logprobs or 0) if tokens else None

    @property
    def finished(self) -> bool:
        """No more tokens will come."""
        return self.finish_reason is not None

    def announcement(self) -> NewSequence:
        """What the runner is told once."""
        stop_ids = self.eos_token_ids.union(self.sampling.stop_token_ids)
        return NewSequence(
            sequence_id=self.sequence_id,
            prompt_token_ids=self.request.prompt_token_ids,
            sampling=self.sampling,
            seed=self.seed,
            stream=self.index,
            stop_token_ids=tuple(sorted(stop_ids)),
            salt=(self.request.tenant, self.request.cache_salt),
            pooling=self.request.pooling,
        )

    def end_at(self, token_id: int) -> tuple[FinishReason, int | None] | None:
        """Why the sequence ends with `token_id`, just appended, and the stop token that caused it; None: it goes on.

        The model's own end has no stop token named, as in OpenAI's API. A stop counts from `min_tokens` on.
        """
        if self.num_output_tokens > self.sampling.min_tokens:
            if token_id in self.eos_token_ids:
                return FinishReason.STOP, None
            if token_id in self.sampling.stop_token_ids:
                return FinishReason.STOP, token_id
        if self.num_tokens >= self.max_length:
            return FinishReason.LENGTH, None
        return None
