"""What bench/gpu.py keeps of parts that fail, crash or hang, and how it judges figures. Needs no GPU."""

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from gpu_parts.apart import run_apart
from gpu_parts.results import Results, Row, Wanted, table

PART = """
import os, sys, time
sys.path.insert(0, {bench!r})
from pathlib import Path
from gpu_parts.results import Results, Row
folder = Path(sys.argv[sys.argv.index("--out") + 1])
results = Results({{"name": "a card"}}, folder)
results.add(Row("decode", "the first", 3.0, "ms"))
results.point("decode", batch=1)
{ends}
"""


@pytest.fixture
def part(tmp_path):
    """Writes a script that measures one row, and then ends as it is told to."""

    def write(ends):
        path = tmp_path / "part.py"
        path.write_text(PART.format(bench=str(Path(__file__).parents[2] / "bench"), ends=ends))
        return path

    return write


def test_a_part_that_crashes_leaves_what_it_measured(part, tmp_path):
    results = Results({}, tmp_path)
    run_apart(results, part("os.abort()"), "decode", [], 60)
    assert [(row.what, row.mark) for row in results.rows] == [("the first", ""), ("the rest of the part", "failed")]
    assert results.rows[0].value == 3.0
    assert results.curves == {"decode": [{"batch": 1}]}
    assert results.machine == {"name": "a card"}
    assert not results.held


def test_a_part_that_hangs_is_ended(part, tmp_path):
    results = Results({}, tmp_path)
    started = time.monotonic()
    run_apart(results, part("time.sleep(60)"), "decode", [], 1)
    assert time.monotonic() - started < 50
    assert results.rows[-1].mark == "failed" and "1 s" in results.rows[-1].failed


def test_a_part_that_ends_well_is_all_there_is(part, tmp_path):
    results = Results({}, tmp_path)
    run_apart(results, part(""), "decode", [], 60)
    assert [row.what for row in results.rows] == ["the first"]
    assert results.held


def test_what_raises_is_a_row_and_the_rest_goes_on(tmp_path):
    results = Results({}, tmp_path)
    with results.attempt("decode", "the first"):
        raise ValueError("a kernel\nfails")
    results.add(Row("decode", "the second", 1.0))
    told = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["mark"] for row in told] == ["failed", ""]
    assert told[0]["failed"] == "ValueError: a kernel fails"
    assert any("test_gpu_results" in line for line in told[0]["detail"]["traceback"])
    with pytest.raises(KeyboardInterrupt), results.attempt("decode", "the third"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("figure", "mark"), [(0.75, "held"), (0.74, "did not hold"), (float("nan"), "did not hold"), (None, "")]
)
def test_figures_are_judged_by_what_is_wanted(figure, mark):
    assert Row("decode", "8B", figure=figure, wanted=Wanted(least=0.75)).mark == mark


def test_a_row_survives_its_json():
    row = Row("memory", "8B", 3.0, "GiB", judged="measured / planned", figure=1.0, wanted=Wanted(0.95, 1.05))
    assert Row.from_json(json.loads(json.dumps(row.as_json()))) == row
    half = Row("decode", "8B", figure=0.8, wanted=Wanted(least=0.75))
    assert Row.from_json(json.loads(json.dumps(half.as_json()))) == half


def test_where_figures_mean_nothing_none_is_judged():
    results = Results({}, judging=False)
    results.add(Row("decode", "tiny", figure=0.1, wanted=Wanted(least=0.75)))
    assert results.held and results.rows[0].mark == ""


def test_the_table_says_what_was_wanted_and_what_came():
    rows = [
        Row("decode", "8B", 4.2, "ms", 0.8, "copy bandwidth", "of copy bandwidth", 0.81, Wanted(least=0.75)),
        Row("decode", "1.5B", failed="OutOfMemoryError: a | b"),
    ]
    head, _, first, second = table(rows).splitlines()
    assert [cell.strip() for cell in head.split("|")[1:-1]] == [
        "part", "what", "measured", "share", "wanted", "came", "",
    ]  # fmt: skip
    assert [cell.strip() for cell in first.split("|")[1:-1]] == [
        "decode", "8B", "4.2 ms", "80 % of copy bandwidth", "of copy bandwidth >= 0.75", "0.81", "held",
    ]  # fmt: skip
    assert len(first) == len(second) == len(head)
    assert "**failed**" in second and "a / b" in second
