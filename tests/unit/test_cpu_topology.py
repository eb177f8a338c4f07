"""threads=0: physical cores that the process may use, from a made-up machine."""

from __future__ import annotations

import pytest

from kvarn.backends.cpu.topology import physical_cores


@pytest.fixture
def machine(tmp_path):
    def make(siblings: dict[int, str], quota: str | None = None):
        for cpu, text in siblings.items():
            folder = tmp_path / "cpu" / f"cpu{cpu}" / "topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(text + "\n")
        if quota is not None:
            (tmp_path / "cpu.max").write_text(quota + "\n")
        return lambda allowed: physical_cores(frozenset(allowed), tmp_path / "cpu", tmp_path)

    return make


def test_two_threads_of_one_core_are_one(machine):
    assert machine({0: "0-1", 1: "0-1"})({0, 1}) == ((0, 1),)


def test_cores_are_counted_once_whatever_their_numbering(machine):
    cores = machine({0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"})
    assert cores({0, 1, 2, 3}) == ((0, 2), (1, 3))
    assert cores({2, 3}) == ((2,), (3,))
    assert cores({1}) == ((1,),)


def test_a_quota_limits_the_cores(machine):
    cores = machine({i: str(i) for i in range(8)}, quota="250000 100000")
    assert len(cores(range(8))) == 3


@pytest.mark.parametrize("quota", ["max 100000", "", "rubbish", "100000 0"])
def test_without_a_quota_all_cores_count(machine, quota):
    assert len(machine({0: "0", 1: "1"}, quota=quota)({0, 1})) == 2


def test_an_unknown_topology_counts_processors(machine):
    assert machine({0: "nonsense"})({0, 5}) == ((0,), (5,))


def test_this_machine_has_at_least_one():
    assert len(physical_cores()) >= 1
