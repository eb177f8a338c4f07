"""Cost models: what is fitted, read and refused; and percentiles of values that are there several times."""

import dataclasses
import json
import random

import numpy as np
import pytest

from kvarn.errors import ConfigError
from kvarn.scheduler import StepShape
from kvarn.scheduler.fitted_cost import FittedStepCost
from kvarn.simulate.fit import fit, read_steps
from kvarn.simulate.results import jain, percentiles

TRUE = FittedStepCost((1, 2, 4, 8, 16, 32, 64), (1e-3, 1.1e-3, 1.4e-3, 2e-3, 4e-3, 9e-3, 2e-2), 1e-4, 1e-7, 5e-7)


def steps(count, noise=0.0):
    numbers = random.Random(1)
    shapes = []
    for _ in range(count):
        tokens = numbers.choice([1, 2, 3, 4, 8, 12, 16, 24, 32, 50, 64])
        sampled = numbers.choice([1, tokens])
        context = numbers.randrange(tokens, 4000)
        shapes.append(StepShape(tokens, sampled, sampled, context * numbers.randrange(1, 30), context))
    return [(shape, TRUE.seconds(shape) * (1 + numbers.uniform(-noise, noise))) for shape in shapes]


def test_what_is_exactly_such_a_model_is_found_again():
    found = fit(steps(400))
    assert found.p95_error < 1e-6
    assert found.cost.per_sampled == pytest.approx(TRUE.per_sampled, rel=1e-4)
    assert found.cost.per_attended == pytest.approx(TRUE.per_attended, rel=1e-4)
    assert found.cost.per_context == pytest.approx(TRUE.per_context, rel=1e-4)


def test_noise_does_not_turn_costs_negative():
    found = fit(steps(200, noise=0.3)).cost
    assert min(*found.at_knots, found.per_sampled, found.per_attended, found.per_context) >= 0
    assert list(found.at_knots) == sorted(found.at_knots)


def test_a_run_of_decodes_costs_what_its_steps_do():
    run = list(TRUE.decode_run(3, 100, 5))
    each = [TRUE.seconds(StepShape(3, 3, 3, 100 + 3 * step, 100 + 3 * step)) for step in range(5)]
    assert run == each


def test_beyond_the_knots_the_last_slope_goes_on():
    cost = FittedStepCost((2, 4), (1.0, 2.0), 0.0, 0.0, 0.0)
    assert [cost.seconds(StepShape(n, 1, 1, 1)) for n in (0, 1, 2, 3, 4, 8)] == [1.0, 1.0, 1.0, 1.5, 2.0, 4.0]


@pytest.mark.parametrize(
    "wrong",
    [((1,), (1.0,)), ((1, 2), (1.0,)), ((2, 1), (1.0, 1.0)), ((1, 2), (0.0, 1.0)), ((1, 2), (1.0, float("nan")))],
)
def test_numbers_that_are_no_model_are_refused(wrong):
    with pytest.raises(ConfigError):
        FittedStepCost(*wrong, 0.0, 0.0, 0.0)
    with pytest.raises(ConfigError):
        FittedStepCost((1, 2), (1.0, 1.0), -1.0, 0.0, 0.0)


def test_too_few_steps_or_sizes_are_refused():
    with pytest.raises(ConfigError, match="too few"):
        fit(steps(3))
    with pytest.raises(ConfigError, match="all steps have 5 tokens"):
        fit([(StepShape(5, 1, 1, 5, 5), 0.1)] * 20)


def test_what_bench_printed_is_read(tmp_path):
    path = tmp_path / "steps.json"
    items = [{"shape": dataclasses.asdict(shape), "seconds": taken} for shape, taken in steps(20)]
    path.write_text(json.dumps({"model": "m", "steps": items}))
    assert read_steps(path) == steps(20)


SHAPE = {"num_tokens": 1, "num_sequences": 1, "num_sampled": 1, "num_attended": 1, "num_context": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a JSON file"),
        ("[" * 100_000, "is not a JSON file"),
        ("[]", "has no steps"),
        ('{"steps": 3}', "has no steps"),
        ('{"steps": [3]}', "step 1 has no shape"),
        (json.dumps({"steps": [{"shape": SHAPE, "seconds": 1}, {"shape": {**SHAPE, "num_sampled": -1}}]}),
         "step 2: num_sampled"),
        (json.dumps({"steps": [{"shape": {**SHAPE, "num_tokens": 1.5}, "seconds": 1}]}), "step 1: num_tokens"),
        (json.dumps({"steps": [{"shape": SHAPE, "seconds": 0}]}), "step 1: seconds"),
        (json.dumps({"steps": [{"shape": SHAPE, "seconds": float("nan")}]}), "step 1: seconds"),
        (json.dumps({"steps": [{"shape": SHAPE}]}), "step 1: seconds"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_with_the_place(tmp_path, content, message):
    path = tmp_path / "steps.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_steps(path)


def test_percentiles_of_values_that_are_there_several_times():
    values = np.array([3.0, 1.0, 2.0])
    counts = np.array([1, 94, 5])
    assert percentiles(values, counts) == {50: 1.0, 95: 2.0, 99: 2.0}
    repeated = np.repeat(values, counts)
    assert percentiles(repeated) == percentiles(values, counts)
    assert percentiles(np.array([])) is None


def test_jains_index():
    assert jain([1, 1, 1]) == 1
    assert jain([1, 0, 0, 0]) == 0.25
    assert jain([0, 0]) == 1
