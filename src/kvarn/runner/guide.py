"""What grammars do with the guesses of a drafter."""

from __future__ import annotations

from collections.abc import Sequence

from kvarn.draft_tree import chain, path, pruned
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
        wanted = max(part.num_drafts_wanted, part.num_copies_wanted)
        if wanted and part.sequence_id in grammars:
            proposal = found.get(part.sequence_id, Proposal(part.sequence_id, ()))
            found[part.sequence_id] = _guided(grammars, proposal, wanted)
    return [proposal for proposal in found.values() if proposal.token_ids]


def _guided(grammars: GrammarMasks, proposal: Proposal, wanted: int) -> Proposal:
    number, tokens, drawn = proposal.sequence_id, proposal.token_ids, proposal.probabilities
    parents = chain(len(tokens)) if proposal.parents is None else proposal.parents
    forced = grammars.forced(number, wanted)
    if len(path(tokens, parents, forced)) < len(forced):
        return Proposal(number, forced, copied=True)
    allowed = grammars.allowed(number, tokens, parents)
    if drawn is None:
        tokens, parents = pruned(tokens, parents, lambda place, _level: place in allowed)
        return Proposal(number, tokens, parents=parents, copied=proposal.copied)
    count = min(len(allowed) + 1, len(tokens))
    return Proposal(number, tokens[:count], drawn[:count])
