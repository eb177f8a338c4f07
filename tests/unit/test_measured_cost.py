"""What steps cost, learned while they are taken."""

import math
import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from virtual_time import LinearCost

from kvarn.scheduler import MeasuredCost, StepShape

MACHINE = LinearCost(fixed=0.003, token=0.0012, sampled=0.0004, attended=3e-7)


def decode(sequences, length=300):
    return StepShape(sequences, sequences, sequences, sequences * length)


def random_shape(rng):
    shape = decode(rng.randint(0, 30), rng.randint(10, 2000))
    for _ in range(rng.randint(0 if shape.num_tokens else 1, 2)):
        shape = shape.plus(rng.randint(0, 1000), rng.randint(1, 250))
    return shape


def taught(machine, steps, *, seed=0, noise=0.0):
    cost, rng = MeasuredCost(), random.Random(seed)
    for _ in range(steps):
        shape = random_shape(rng)
        cost.observe(shape, machine.seconds(shape) * rng.uniform(1 - noise, 1 + noise))
    return cost


def worst_error(cost, machine):
    rng = random.Random(99)
    shapes = [random_shape(rng) for _ in range(200)]
    return max(abs(cost.seconds(s) / machine.seconds(s) - 1) for s in shapes)


def test_it_learns_the_machine():
    assert worst_error(taught(MACHINE, 60), MACHINE) < 0.05
    assert worst_error(taught(MACHINE, 300, noise=0.2), MACHINE) < 0.15


def test_before_any_step_it_has_an_opinion():
    cost = MeasuredCost()
    assert cost.num_observed == 0
    assert 0 < cost.seconds(decode(1)) < cost.seconds(decode(8)) < cost.seconds(decode(8).plus(0, 200)) < 10


@pytest.mark.parametrize("scale", [0.01, 1, 100])
def test_one_step_tells_the_scale_of_the_machine(scale):
    cost = MeasuredCost()
    shape = StepShape(0, 0, 0, 0).plus(0, 400)
    cost.observe(shape, 0.4 * scale)
    assert cost.seconds(shape) == pytest.approx(0.4 * scale, rel=0.1)


def test_an_hour_of_decodes_does_not_make_it_forget_prompts():
    cost = taught(MACHINE, 100)
    for step in range(5000):
        cost.observe(decode(4, step % 900 + 1), MACHINE.seconds(decode(4, step % 900 + 1)))
    shape = decode(4).plus(200, 250)
    assert cost.seconds(shape) == pytest.approx(MACHINE.seconds(shape), rel=0.05)


def test_it_follows_a_machine_that_became_slower():
    cost, rng = taught(MACHINE, 200), random.Random(5)
    for _ in range(300):
        shape = random_shape(rng)
        cost.observe(shape, 3 * MACHINE.seconds(shape))
    shape = decode(10).plus(0, 200)
    assert cost.seconds(shape) == pytest.approx(3 * MACHINE.seconds(shape), rel=0.15)


def test_a_step_that_was_held_up_counts_little():
    cost = taught(MACHINE, 200)
    shape = decode(10).plus(0, 100)
    for _ in range(8):
        cost.observe(decode(10).plus(0, 100), MACHINE.seconds(shape))
    before = cost.seconds(shape)
    cost.observe(shape, 1000 * MACHINE.seconds(shape))
    for _ in range(7):
        cost.observe(decode(10).plus(0, 100), MACHINE.seconds(shape))
    assert cost.seconds(shape) < 1.3 * before


def test_what_is_no_measurement_is_ignored():
    cost = MeasuredCost()
    for shape, seconds in ((StepShape(0, 0, 0, 0), 1.0), (decode(1), 0.0), (decode(1), -1.0), (decode(1), math.nan)):
        cost.observe(shape, seconds)
    assert cost.num_observed == 0


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.integers(1, 64), st.integers(1, 4000), st.integers(0, 500), st.floats(1e-6, 100.0)), max_size=80
    )
)
def test_whatever_was_measured_more_tokens_never_cost_less(steps):
    cost = MeasuredCost()
    for sequences, length, chunk, seconds in steps:
        shape = decode(sequences, length)
        cost.observe(shape.plus(0, chunk) if chunk else shape, seconds)
    times = [cost.seconds(decode(4).plus(100, count)) for count in range(1, 400, 7)]
    assert all(0 < t < math.inf for t in times)
    assert times == sorted(times)
