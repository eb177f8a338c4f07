"""Guesses what comes next, so that several tokens of a sequence can be computed in one step.

A drafter implements `kvarn.runner.Drafter`; the sampler verifies what it says (`Sampler.verify`), the scheduler decides
how much of it (`kvarn.scheduler.Speculation`).
"""

from kvarn.spec.build import make_drafter, open_heads
from kvarn.spec.corpus import Corpora
from kvarn.spec.draft_kv import DraftKv
from kvarn.spec.draft_model import DraftModelDrafter, draft_limits
from kvarn.spec.index import NgramIndex
from kvarn.spec.lookahead import LookaheadDrafter, LookaheadWindow
from kvarn.spec.ngram import NgramDrafter
from kvarn.spec.ngram_pool import NgramPool
from kvarn.spec.same_vocabulary import check_same_vocabulary

__all__ = [
    "Corpora", "DraftKv", "DraftModelDrafter", "LookaheadDrafter", "LookaheadWindow", "NgramDrafter", "NgramIndex",
    "NgramPool", "check_same_vocabulary", "draft_limits", "make_drafter", "open_heads",
]  # fmt: skip
