"""The search for the highest load, on servers that are made up."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.bench.serve.metrics import ClientLoad, Window, summarize
from kvarn.bench.serve.point import Point
from kvarn.bench.serve.slo import Slo
from kvarn.bench.serve.sweep import Search, find_highest
from kvarn.errors import ConfigError

EMPTY = summarize([], Window(0, 1), Slo(), ClientLoad(1, 0, None))


def swept(search, highest):
    """The sweep of a server that holds up to `highest`."""

    async def measure(size):
        return Point(f"{size:g}", size, EMPTY, "" if size <= highest else "too slow", [])

    return asyncio.run(find_highest(measure, search))


def test_doubles_then_halves_between():
    found = swept(Search(1.0, precision=0.1), 11.0)
    assert [point.size for point in found.points[:5]] == [1, 2, 4, 8, 16]
    assert found.points[5].size == pytest.approx((8 * 16) ** 0.5)
    assert found.best.size <= 11.0 <= found.best.size * 1.1
    assert found.bracketed
    assert [point.size for point in found.curve] == sorted(point.size for point in found.points)


def test_goes_down_where_the_first_breaks():
    found = swept(Search(8.0), 1.3)
    assert [point.size for point in found.points[:4]] == [8, 4, 2, 1]
    assert 1.0 <= found.best.size <= 1.3


def test_whole_numbers_are_found_exactly_and_none_is_measured_twice():
    for highest in range(1, 40):
        found = swept(Search(4, precision=0.005, whole=True, most_points=50), highest)
        assert found.best.size == highest
        sizes = [point.size for point in found.points]
        assert len(sizes) == len(set(sizes))


def test_where_nothing_holds_there_is_no_best():
    found = swept(Search(4, whole=True), 0)
    assert found.best is None
    assert [point.size for point in found.points] == [4, 2, 1]


def test_ends_after_the_most_points():
    found = swept(Search(1.0, most_points=4), 1e9)
    assert len(found.points) == 4
    assert found.best.size == 8 and not found.bracketed


@given(st.floats(0.01, 1000), st.floats(0.1, 100), st.floats(0.01, 0.5))
def test_the_best_is_as_close_as_asked(highest, start, precision):
    found = swept(Search(start, precision, most_points=200), highest)
    assert found.best.size <= highest <= found.best.size * (1 + precision) * (1 + 1e-9)


@pytest.mark.parametrize("settings", [{"precision": 0}, {"precision": 2}, {"most_points": 0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match="must be between"):
        Search(1.0, **settings)
