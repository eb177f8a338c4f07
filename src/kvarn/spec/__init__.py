"""Guesses what comes next, so that several tokens of a sequence can be computed in one step.

A drafter implements `kvarn.runner.Drafter`; the sampler verifies what it says (`Sampler.verify`), the scheduler decides
how much of it (`kvarn.scheduler.Speculation`). Each drafter is imported where it is asked for: few starts need one, and
imports are a part of every start.
"""

from kvarn.spec.build import make_drafter, open_heads

__all__ = ["make_drafter", "open_heads"]
