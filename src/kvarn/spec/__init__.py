"""Guesses what comes next, so that several tokens of a sequence can be computed in one step.

A drafter implements `kvarn.runner.Drafter`; the sampler verifies what it says (`Sampler.verify`), the scheduler decides
how much of it (`kvarn.scheduler.Speculation`).
"""

from kvarn.spec.build import make_drafter
from kvarn.spec.corpus import Corpora
from kvarn.spec.index import NgramIndex
from kvarn.spec.lookahead import LookaheadDrafter, LookaheadWindow
from kvarn.spec.ngram import NgramDrafter
from kvarn.spec.ngram_pool import NgramPool

__all__ = ["Corpora", "LookaheadDrafter", "LookaheadWindow", "NgramDrafter", "NgramIndex", "NgramPool", "make_drafter"]
