"""Machines, tables and JSON."""

import dataclasses
import json

import pytest

from kvarn.bench import report
from kvarn.bench.machine import Machine, cpu_name, last_cache_bytes
from kvarn.bench.roofline import MIB, Roof, Rooflines, buffer_bytes, default_threads, middle

MACHINE = Machine("Test CPU", ((0, 1), (2, 3), (4, 5)), 32 * MIB, 8 << 30, "Linux", 0.5)


def test_a_table_can_be_pasted():
    assert report.table(("what", "a"), [("x", "1"), ("longer", "20")]) == (
        "what     a\n------  --\nx        1\nlonger  20"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.0123"), (0.5, "0.500"), (9.876, "9.88"), (98.76, "98.8"), (12345.6, "12,346")],
)
def test_numbers_have_three_digits(value, text):
    assert report.number(value) == text


def test_shares_are_per_cent():
    assert (report.percent(0.425), report.percent(None)) == ("42 %", "–")


def test_threads_are_said_to_share_cores():
    assert MACHINE.sharing == "6 threads on 3 physical cores (one core: 0+1, 2+3, 4+5)"
    many = dataclasses.replace(MACHINE, cores=tuple((i, i + 8) for i in range(8)))
    assert many.sharing == "16 threads on 8 physical cores (one core: 0+8, 1+9, 2+10, 3+11, …)"
    alone = dataclasses.replace(MACHINE, cores=((0,),))
    assert alone.sharing == "1 thread on 1 physical core, one each"


def test_a_busy_machine_is_said_to_be_one():
    assert "at work" not in report.machine_line(MACHINE, "avx2")
    busy = dataclasses.replace(MACHINE, load=2.5)
    assert "at work before this (load 2.5)" in report.machine_line(busy, "avx2").splitlines()[1]


def test_what_the_system_says_of_processor_and_caches(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Some CPU @ 3 GHz\n")
    assert cpu_name(tmp_path / "cpuinfo") == "Some CPU @ 3 GHz"
    assert cpu_name(tmp_path / "missing")
    for index, size in enumerate(("48K", "2048K", "30M", "rubbish")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert last_cache_bytes(tmp_path) == 30 * MIB
    assert last_cache_bytes(tmp_path / "missing") == 0


def test_the_buffer_lies_beyond_the_caches_and_within_memory():
    assert buffer_bytes(MACHINE) == 256 * MIB
    assert buffer_bytes(dataclasses.replace(MACHINE, last_cache_bytes=100 * MIB)) == 400 * MIB
    assert buffer_bytes(dataclasses.replace(MACHINE, memory_bytes=1 << 30)) == 128 * MIB


def test_numbers_of_threads_that_are_measured():
    assert default_threads(MACHINE) == (1, 2, 3, 4, 6)
    assert default_threads(dataclasses.replace(MACHINE, cores=((0,),))) == (1,)


def test_the_middle_of_roofs_in_each_figure():
    assert middle([Roof(2, 1, 5, 3), Roof(2, 2, 4, 3)]) == Roof(2, 1.5, 4.5, 3)
    assert middle([Roof(2, 1, 5, 3), Roof(2, 2, 4, 3), Roof(2, 9, 9, 9)]) == Roof(2, 2, 5, 3)


def test_rooflines_as_text_and_json(roof):
    result = Rooflines("avx2", 256 * MIB, (dataclasses.replace(roof, threads=1, integer_macs=80e9), roof))
    lines = report.rooflines_text(MACHINE, result).splitlines()
    assert lines[0].startswith("Test CPU, 6 threads on 3 physical cores")
    assert lines[-1].split() == ["2", "10.0", "100", "20.0", "1.25×", "10.0"]
    plain = json.loads(report.to_json({"machine": MACHINE, "roofline": result}))
    assert plain["roofline"]["roofs"][1] == {
        "threads": 2, "read_bytes": 10e9, "integer_macs": 100e9, "float_macs": 20e9,
    }  # fmt: skip
    assert plain["machine"]["cores"] == [[0, 1], [2, 3], [4, 5]]
