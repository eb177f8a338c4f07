"""ARCHITECTURE.md shows the program that runs, not one that ran once."""

import re
from pathlib import Path

import pytest

from kvarn.models import load_model
from kvarn.program.listing import op_line
from kvarn.weights import open_model

PAGE = Path(__file__).parents[2] / "ARCHITECTURE.md"


@pytest.mark.e2e
def test_the_page_shows_smollm2s_first_layer(smollm2_path):
    with open_model(smollm2_path) as files:
        program = load_model(files).program
    lines = [op_line(program, op) for op in program.ops]
    end = next(i for i, line in enumerate(lines) if "layers.1." in line)
    tail = next(i for i, line in enumerate(lines) if line.startswith("select_rows"))
    shown = re.search(r"<!-- program:begin -->\n```\n(.*?)\n```\n<!-- program:end -->", PAGE.read_text(), re.DOTALL)
    assert shown is not None
    expected = [*lines[:end], "… 29 more layers …", *lines[tail:]]
    assert shown.group(1).splitlines() == expected
