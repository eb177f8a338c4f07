"""From a `SchedulerOutput` to arrays, through the program and the sampler, to a `StepOutput`."""

from kvarn.runner.batch import BatchBuilder
from kvarn.runner.runner import Runner

__all__ = ["BatchBuilder", "Runner"]
