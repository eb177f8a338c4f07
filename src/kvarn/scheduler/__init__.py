"""Decides who computes how many tokens in each step. Standard library only: ids and counts, no arrays.

`Scheduler` is the token-budget loop, `Sequence` one running stream, `Policy` the order in which sequences are served.
"""

from kvarn.scheduler.admission import Limits
from kvarn.scheduler.observer import Hold, NullObserver, Observer, StepTimes
from kvarn.scheduler.policy import FirstComeFirstServed, Policy
from kvarn.scheduler.scheduler import Scheduler
from kvarn.scheduler.sequence import Sequence

__all__ = [
    "FirstComeFirstServed", "Hold", "Limits", "NullObserver", "Observer", "Policy", "Scheduler", "Sequence",
    "StepTimes",
]  # fmt: skip
