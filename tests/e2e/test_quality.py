"""The CPU back-end on the real SmolLM2: greedy choices as the reference's, and a perplexity that stays where it was."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvarn.eval import perplexity
from kvarn.eval.session import open_session

pytestmark = [pytest.mark.e2e, pytest.mark.long]

ROOT = Path(__file__).parents[2]


def test_greedy_choices_are_the_references_up_to_ties(smollm2_path):
    script = ROOT / "bench/greedy_agreement.py"
    command = [sys.executable, str(script), str(smollm2_path), "--prompts", "4", "--tokens", "24", "--json"]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert result["faults"] == 0
    assert result["differing"] <= result["positions"] * 0.1


def test_perplexity_of_two_chunks_is_near_the_references(smollm2_path, test_data):
    text = (test_data / "wikitext2/wiki.test.raw").read_text()[:20000]
    figures = []
    for backend in ("reference", "cpu"):
        with open_session(smollm2_path, context=256, backend=backend) as session:
            figures.append(perplexity(session, text, chunks=2))
    exact, fast = figures
    assert exact.tokens == fast.tokens == 2 * 127
    assert fast.perplexity == pytest.approx(exact.perplexity, rel=0.02)
    assert np.isfinite(fast.standard_error)
