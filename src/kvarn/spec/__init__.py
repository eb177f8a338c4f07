"""Guesses what comes next, so that several tokens of a sequence can be computed in one step.

A drafter implements `kvarn.runner.Drafter`; the sampler verifies what it says (`Sampler.verify`), the scheduler decides
how much of it (`kvarn.scheduler.Speculation`).
"""

from kvarn.spec.build import make_drafter, open_heads
from kvarn.spec.corpus import Corpora
from kvarn.spec.head_model import HeadModel
from kvarn.spec.heads import Heads, HeadsShape, Training, read_heads, save_heads
from kvarn.spec.index import NgramIndex
from kvarn.spec.ngram import NgramDrafter

__all__ = [
    "Corpora", "HeadModel", "Heads", "HeadsShape", "NgramDrafter", "NgramIndex", "Training", "make_drafter",
    "open_heads", "read_heads", "save_heads",
]  # fmt: skip
