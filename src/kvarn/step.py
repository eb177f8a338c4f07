"""The two records in which deciding (scheduler, cache) and executing (runner) meet. Standard library only.

One step: `Scheduler.schedule() -> SchedulerOutput`, `Runner.execute(SchedulerOutput) -> StepOutput`,
`Scheduler.update(SchedulerOutput, StepOutput)`. There is no prefill or decode here: each `ScheduledSequence` says
which of its tokens to compute in this step, and whether a token is to be sampled after the last of them. Tokens that
are only guessed may follow them (`draft`): those that turn out to be what is sampled are gained in the same step.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from kvarn.request import Pooling, SamplingParams, TokenLogprob

PENDING = -1
"""In place of a token that the step before samples, whose result is not there yet."""


@dataclass(frozen=True, slots=True)
class PromptTargets:
    """What a prompt has after some of its tokens, whose logprobs are asked for."""

    token_ids: tuple[int, ...]
    """After each of the last tokens of the part, but for the one that is sampled from."""
    count: int
    """Likeliest tokens to tell in each place."""


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """One sequence's share of a step: compute tokens `start … start + len(token_ids)`."""

    sequence_id: int
    """Unique until the engine is reset."""
    token_ids: tuple[int, ...]
    """The tokens whose KV is computed in this step. The last may be `PENDING`."""
    start: int
    """Position of token_ids[0]; equals the sequence's num_computed_tokens."""
    block_tables: tuple[tuple[int, ...], ...]
    """For each KV group the ids of the blocks that hold positions 0 … start + num_rows; -1 where no token of the step
    sees the block."""
    sample: bool
    """Whether the last token's logits are needed and a token is to be sampled from them."""
    draft: tuple[int, ...] = ()
    """Guesses of the tokens after token_ids, computed like those and verified; only with `sample`."""
    parents: tuple[int, ...] = ()
    """Of each guess the one that it follows (see `kvarn.draft_tree`). Positions `end` … are the guesses' slots, in
    their order, whatever their places in the text are."""
    num_drafts_wanted: int = 0
    """How many tokens ahead a drafter is asked to guess for the next step, at most."""
    num_nodes_wanted: int = 0
    """How many guesses it may make where it makes a tree of them."""
    num_copies_wanted: int = 0
    """How many it may copy from what is known, where it looks there first; then the others are not wanted."""
    least_copied: int = 0
    """A shorter copy is worth less than what the drafter guesses otherwise."""
    least_sure: float = 0.0
    """A drafter that computes goes on guessing only where it holds what it has guessed right with this probability."""
    guess_cost: float = 0.0
    """And only where all that go on exceed theirs by as much together as these are together, of all that want guesses:
    what one guess more for all takes, counted in tokens."""
    prompt: PromptTargets | None = None
    """Of the prompt's tokens that are computed in this step."""

    @property
    def end(self) -> int:
        """Number of known tokens with KV after this step; accepted ones of the draft come on top."""
        return self.start + len(self.token_ids)

    @property
    def num_rows(self) -> int:
        """Tokens computed for it in this step."""
        return len(self.token_ids) + len(self.draft)

    @property
    def num_logits(self) -> int:
        """Rows of them that logits are needed of: the last ones."""
        return (1 + len(self.draft) if self.sample else 0) + self.num_prompt_logits

    @property
    def num_prompt_logits(self) -> int:
        """Those of these rows, the first, that are of the prompt."""
        return 0 if self.prompt is None else len(self.prompt.token_ids)


@dataclass(frozen=True, slots=True)
class NewSequence:
    """Told to the runner once, when a sequence is first scheduled: what the sampler must know of it."""

    sequence_id: int
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    stream: int
    """Index of the sequence in its request (0 … n-1); with `seed` and the position it keys the random counter."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that `min_tokens` masks: end-of-sequence ids (unless ignore_eos) and the request's stop_token_ids."""
    salt: tuple[str, str] = ("", "")
    """The request's (tenant, cache_salt): nothing that is learned from one salt's texts may serve another."""
    pooling: Pooling | None = None
    """How the prompt's hidden states become a vector, where that is asked for."""


@dataclass(frozen=True, slots=True)
class BlockSave:
    """Copy a block into a slot of the second tier, before anything writes to it."""

    block: int
    slot: int
    name: bytes
    """Of the block's keys and values: 32 bytes that no other values have."""


@dataclass(frozen=True, slots=True)
class BlockLoad:
    """Copy slots of the second tier into consecutive blocks of one sequence, which computes nothing in this step.

    Those of all KV groups for the same tokens stand together."""

    sequence_id: int
    blocks: tuple[int, ...]
    slots: tuple[int, ...]
    names: tuple[bytes, ...]
    """What the slots should hold; the first that holds something else ends the load."""


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """What to run in one step. The runner mutates nothing in it."""

    step: int
    sequences: tuple[ScheduledSequence, ...]
    new: tuple[NewSequence, ...] = ()
    finished: tuple[int, ...] = ()
    """Sequence ids the runner may forget."""
    block_copies: tuple[tuple[int, int], ...] = ()
    """(source, destination) blocks to copy before the step (copy-on-write)."""
    block_saves: tuple[BlockSave, ...] = ()
    """To be done before all else, in order."""
    block_loads: tuple[BlockLoad, ...] = ()
    """To be done after the saves and the copies, of which a block that is loaded into may be a source."""

    @property
    def num_tokens(self) -> int:
        """Tokens computed in the step, drafts among them; at most the token budget."""
        return sum(s.num_rows for s in self.sequences)

    def asking_nothing_of(self, sequence_ids: Collection[int]) -> SchedulerOutput:
        """The step as a drafter is told of it that is to guess nothing for some of its sequences."""
        if not sequence_ids:
            return self
        parts = (
            replace(part, num_drafts_wanted=0, num_nodes_wanted=0, num_copies_wanted=0)
            if part.sequence_id in sequence_ids
            else part
            for part in self.sequences
        )
        return replace(self, sequences=tuple(parts))


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token sampled for one sequence, with its logprobs where they were asked for."""

    sequence_id: int
    token_id: int
    """Below 0, between sampler and runner only: a mark of `kvarn.backends.row_rules` that says why there is none."""
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """What the model says of some of a prompt's tokens, in order: `PromptTargets` of one part."""

    sequence_id: int
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class DraftTokens:
    """What a drafter proposes to follow all that is known of a sequence after a step: a tree, the best guesses first.

    So the first of them are a tree, too, the one to verify where there is no room for all."""

    sequence_id: int
    token_ids: tuple[int, ...]
    parents: tuple[int, ...]
    """See `kvarn.draft_tree`."""
    copied: bool = False
    """Whether they were looked up, not computed."""


@dataclass(frozen=True, slots=True)
class FailedSequence:
    """A sequence that cannot go on; the others do.

    message: for who sent its request, where a parameter or its numbers are at fault; else for the log.
    """

    sequence_id: int
    message: str
    field: str = "grammar"
    """The parameter at fault; "" where none is."""
    finite: bool = True
    """Whether the model computed numbers for it; if not, nothing that was computed of its text is to be believed."""


@dataclass(frozen=True, slots=True)
class PooledSequence:
    """The vector of a sequence with `NewSequence.pooling`, all of whose prompt is computed."""

    sequence_id: int
    vector: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step produced, for each scheduled sequence with `sample`, in schedule order.

    That is one `SampledToken`, or several in order of position: those of its draft that were right, then one more.
    """

    step: int
    sampled: tuple[SampledToken, ...]
    loaded: tuple[int, ...] = ()
    """For each of `block_loads` how many of its blocks were loaded, from the first."""
    move_seconds: float = 0.0
    """What saves and loads took, which the step's shape does not tell."""
    drafts: tuple[DraftTokens, ...] = ()
    """For the next step, of sequences with num_drafts_wanted."""
    draft_seconds: float = 0.0
    """What proposing them took."""
    prepare_seconds: float = 0.0
    """What bringing the drafter up to date took before the step: one with KV of its own may lack some of the text."""
    failed: tuple[FailedSequence, ...] = ()
    """Sequences that cannot go on; they have no tokens among `sampled`."""
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    pooled: tuple[PooledSequence, ...] = ()

    @property
    def aside_seconds(self) -> float:
        """What the step took beside computing and sampling its tokens, and its shape does not tell."""
        return self.move_seconds + self.draft_seconds + self.prepare_seconds
