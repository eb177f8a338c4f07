"""What grammars do with the guesses of a drafter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kvarn.grammar import GrammarMasks
from kvarn.runner.drafter import Proposal
from kvarn.step import SchedulerOutput


def guided(grammars: GrammarMasks, scheduled: SchedulerOutput, proposals: Sequence[Proposal]) -> Sequence[Proposal]:
    """The proposals without what the sequences' grammars forbid, and what grammars leave no choice of in their place.

    What is forced is guessed like everything else: a mask that allows one token lets the sampler choose no other, so
    that these guesses are always right. A proposal that was drawn from probabilities keeps the first token that is
    forbidden, or the token in its place would not have the distribution that it should: it is for the sampler to
    reject what was drawn.
    """
    if not grammars.active:
        return proposals
    found = {proposal.sequence_id: proposal for proposal in proposals}
    for part in scheduled.sequences:
        if part.num_drafts_wanted and part.sequence_id in grammars:
            proposal = found.get(part.sequence_id, Proposal(part.sequence_id, ()))
            found[part.sequence_id] = _guided(grammars, proposal, part.num_drafts_wanted)
    return [proposal for proposal in found.values() if proposal.token_ids]


def _guided(grammars: GrammarMasks, proposal: Proposal, wanted: int) -> Proposal:
    forced = grammars.forced(proposal.sequence_id, wanted)
    if proposal.token_ids[: len(forced)] != forced:
        return Proposal(proposal.sequence_id, forced)
    count = grammars.count_allowed(proposal.sequence_id, proposal.token_ids)
    if proposal.probabilities is None:
        return dataclasses.replace(proposal, token_ids=proposal.token_ids[:count])
    count = min(count + 1, len(proposal.token_ids))
    return Proposal(proposal.sequence_id, proposal.token_ids[:count], proposal.probabilities[:count])
