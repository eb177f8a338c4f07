"""Hypothesis' state machines, run until a number of operations has been carried out and checked."""

import itertools

from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

SHARE = 5_300
"""Steps of each machine over the cache or the scheduler: the nineteen of them take more than 100,000."""


class CountedMachine(RuleBasedStateMachine):
    """Counts its steps: operations, each with a check of everything behind it."""

    num_steps = 0

    def count_step(self):
        type(self).num_steps += 1


def run_machine(machine, *, length, steps=SHARE):
    """Runs machines of `length` rules at most, as many as it takes for so many steps. In CI they are the same in every
    run, as Hypothesis has it there with all other tests."""
    machine.num_steps = 0
    some = settings(
        max_examples=40, stateful_step_count=length, derandomize=False, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    numbers = itertools.count()
    while machine.num_steps < steps:
        if settings.default.derandomize:
            seed(next(numbers))(machine)
        run_state_machine_as_test(machine, settings=some)
