"""The example says what it says that it says."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "speculative_decoding.py"
VOCAB = 8


@pytest.fixture(scope="module")
def example():
    """Its functions."""
    spec = importlib.util.spec_from_file_location("speculative_decoding", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["speculative_decoding"] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["speculative_decoding"]


@pytest.mark.e2e
def test_the_example_on_a_real_model(smollm2_path):
    command = [sys.executable, str(EXAMPLE), str(smollm2_path), "--tokens", "40", "--temperatures", "0", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the same tokens" in result.stdout
    assert "p, to within" in result.stdout
    assert "[On Thursday at 9 o'clock the miller opens the gate" in result.stdout
    greedy = result.stdout.splitlines()[1].split()
    alpha, guesses, length = float(greedy[1]), float(greedy[2]), float(greedy[4])
    assert 0 < alpha <= 1 and 0 < guesses <= 4
    assert 1 < length <= 1 + guesses


def distributions(seed):
    random = np.random.default_rng(seed)
    p, q = random.dirichlet(np.full(VOCAB, 0.5), size=2)
    q[seed % VOCAB] = 0
    return p, q / q.sum()


@pytest.mark.parametrize("seed", range(20))
def test_what_is_said_is_distributed_as_the_model_says(example, seed):
    p, q = distributions(seed)
    assert example.said_distribution(p, q) == pytest.approx(p, abs=1e-12)
    assert example.said_distribution(p, p) == pytest.approx(p, abs=1e-12)


def test_what_is_drawn_passes_a_chi_square_test(example):
    """Two guesses in a row, so that the first and the second token are judged, and the one after both."""
    (p0, q0), (p1, q1), (p2, _) = (distributions(seed) for seed in (3, 4, 5))
    random = np.random.default_rng(0)
    counts = np.zeros((3, VOCAB))
    for _ in range(20_000):
        guesses = [example.draw(q0, random), example.draw(q1, random)]
        said = example.accept(guesses, [q0, q1], [p0, p1, p2], random)
        for place, token in enumerate(said):
            counts[place, token] += 1
    for p, seen in zip((p0, p1, p2), counts, strict=True):
        expected = p * seen.sum()
        told = expected > 5
        chi_square = ((seen - expected)[told] ** 2 / expected[told]).sum()
        assert chi_square < 26  # 0.9995 of the distribution with 7 degrees of freedom
    assert counts[0].sum() > counts[1].sum() > counts[2].sum() > 0


def test_a_guess_is_what_followed_the_longest_context(example):
    text = [1, 2, 3, 4, 5, 2, 3, 6, 1, 2, 3]
    assert example.guess_distribution(text, 8).tolist() == [0, 0, 0, 0, 1, 0, 0, 0]  # after 1 2 3
    assert example.guess_distribution([9, *text[1:-3], 2, 3], 10)[[4, 6]].tolist() == [0.5, 0.5]  # after 2 3
    assert example.guess_distribution([1, 2, 3], 8) is None
    guesses, qs = example.guess(text, 4, 8, np.random.default_rng(0))
    assert guesses[:1] == [4] and len(guesses) == len(qs) == 4
