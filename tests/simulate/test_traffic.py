"""Traffic from files and from numbers: what is read, and what is refused with file, line and field."""

import json

import pytest

from kvarn.errors import ConfigError
from kvarn.simulate import Arrival, Synthetic, make_traffic, read_traffic
from kvarn.simulate.synthetic import BURST, KINDS, TAIL_LIMIT
from kvarn.traffic import MAX_LINE, MAX_TOKENS, cut, repeat, scale

CSV = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:47.6805900,374,44
2023-11-16 18:15:46.6805900,396,109
"""


def written(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_azures_traces_are_read_in_order_of_time(tmp_path):
    first, second = read_traffic(written(tmp_path, CSV, "trace.csv"))
    assert (first.time, first.prompt_tokens, first.output_tokens) == (0.0, 396, 109)
    assert second == Arrival(pytest.approx(1.0), 374, 44)


def test_objects_a_line_are_read(tmp_path):
    lines = [
        {"arrival": 5, "prompt_tokens": 10, "output_tokens": 2},
        {"arrival": 5.5, "prompt_tokens": 10, "output_tokens": 2, "tenant": "a", "prefix_group": "g",
         "prefix_tokens": 10},
    ]  # fmt: skip
    text = "\n".join(json.dumps(line) for line in lines) + "\n\n"
    assert read_traffic(written(tmp_path, text, "trace.jsonl")) == [
        Arrival(0.0, 10, 2), Arrival(0.5, 10, 2, "a", "g", 10),
    ]  # fmt: skip


HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
STAMP = "2023-11-16 18:15:46"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "line 1: there is no column TIMESTAMP"),
        ("t.csv", HEAD, "has no requests"),
        ("t.csv", "TIMESTAMP,ContextTokens\n", "line 1: there is no column GeneratedTokens"),
        ("t.csv", HEAD + f"{STAMP},1\n", "line 2: 2 fields where the header has 3"),
        ("t.csv", HEAD + f"{STAMP},1,2\nyesterday,1,2\n", "line 3: TIMESTAMP must be"),
        ("t.csv", HEAD + f"{STAMP},0,2\n", "line 2: ContextTokens must be a whole number from 1"),
        ("t.csv", HEAD + f"{STAMP},1,-2\n", "line 2: GeneratedTokens must be"),
        ("t.csv", HEAD + f"{STAMP},1,{MAX_TOKENS + 1}\n", "line 2: GeneratedTokens must be"),
        ("t.csv", HEAD + f"{STAMP},{'9' * 5000},1\n", "line 2: ContextTokens must be"),
        ("t.csv", HEAD + f"{STAMP},1e3,1\n", "line 2: ContextTokens must be"),
        ("t.csv", HEAD + "9" * MAX_LINE + "\n", "line 2: longer than"),
        ("t.csv", b"\xff\xfe\x00", "not a text file"),
        ("t.jsonl", "\n\n", "has no requests"),
        ("t.jsonl", "[1]\n", "line 1: not a JSON object"),
        ("t.jsonl", "{nonsense\n", "line 1: not a JSON object"),
        ("t.jsonl", "[" * 60_000 + "\n", "line 1: not a JSON object"),
        ("t.jsonl", '{"arrival": 1, "prompt_tokens": 1, "output_tokens": 1, "more": 2}', "line 1: there is no field"),
        ("t.jsonl", '{"prompt_tokens": 1, "output_tokens": 1}', "line 1: arrival must be seconds"),
        ("t.jsonl", '{"arrival": NaN, "prompt_tokens": 1, "output_tokens": 1}', "arrival must be seconds"),
        ("t.jsonl", '{"arrival": true, "prompt_tokens": 1, "output_tokens": 1}', "arrival must be seconds"),
        ("t.jsonl", '{"arrival": 1, "prompt_tokens": 1.5, "output_tokens": 1}', "prompt_tokens must be"),
        ("t.jsonl", '{"arrival": 1, "prompt_tokens": true, "output_tokens": 1}', "prompt_tokens must be"),
        ("t.jsonl", '{"arrival": 1, "prompt_tokens": 1}', "output_tokens must be"),
        ("t.jsonl", '{"arrival": 1, "prompt_tokens": 1, "output_tokens": 1, "tenant": 7}', "tenant must be a string"),
        ("t.jsonl", '{"arrival": 1, "prompt_tokens": 1, "output_tokens": 1, "prefix_group": "g", "prefix_tokens": 2}',
         "prefix_tokens must be at most prompt_tokens"),
        ("t.jsonl", '{"arrival": 1, "prompt_tokens": 3, "output_tokens": 1, "prefix_tokens": 2}',
         "prefix_group must be given"),
        ("t.txt", CSV, "must name a .csv or a .jsonl file"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, name, content, message):
    with pytest.raises(ConfigError, match=message):
        read_traffic(written(tmp_path, content, name))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_traffic(tmp_path / "none.csv")


def test_a_cut_begins_at_zero_and_ends_before_its_end():
    traffic = [Arrival(float(second), 1, 1) for second in range(10)]
    assert [arrival.time for arrival in cut(traffic, 3, 4)] == [0, 1, 2, 3]
    assert len(cut(traffic, 8, None)) == 2


def test_scaling_times_and_lengths():
    (arrival,) = scale([Arrival(10.0, 100, 3, "a", "g", 50)], speed=4, tokens=0.1)
    assert arrival == Arrival(2.5, 10, 1, "a", "g", 5)


def test_traffic_said_over_and_over_keeps_its_pace():
    again = repeat([Arrival(0.0, 1, 1), Arrival(2.0, 2, 2)], 5)
    assert [arrival.time for arrival in again] == [0, 2, 4, 6, 8]
    assert [arrival.prompt_tokens for arrival in again] == [1, 2, 1, 2, 1]
    assert len(repeat(again, 3)) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_made_up_traffic_has_the_averages_asked_for(kind):
    settings = Synthetic(kind, 4.0, 20_000, 500, 100, seed=3)
    traffic = make_traffic(settings)
    assert traffic == make_traffic(settings)
    assert traffic != make_traffic(Synthetic(kind, 4.0, 20_000, 500, 100, seed=4))
    assert [arrival.time for arrival in traffic] == sorted(arrival.time for arrival in traffic)
    assert traffic[-1].time == pytest.approx(5000, rel=0.1)
    assert sum(arrival.prompt_tokens for arrival in traffic) / 20_000 == pytest.approx(500, rel=0.05)
    assert sum(arrival.output_tokens for arrival in traffic) / 20_000 == pytest.approx(100, rel=0.05)


def test_bursts_come_at_once_and_tails_are_long():
    burst = make_traffic(Synthetic("burst", 4.0, 10 * BURST, 500, 100))
    assert len({arrival.time for arrival in burst}) == 10
    tail = sorted(arrival.output_tokens for arrival in make_traffic(Synthetic("long-tail", 4.0, 5000, 500, 100)))
    assert tail[2500] < 50 and tail[-1] == TAIL_LIMIT * 100


def test_tenants_and_groups_take_turns():
    traffic = make_traffic(Synthetic("poisson", 1.0, 6, 10, 10, tenants=2, prefix_groups=3, prefix_tokens=40))
    assert [arrival.tenant for arrival in traffic] == ["tenant-0", "tenant-1"] * 3
    assert [arrival.prefix_group for arrival in traffic] == ["group-0", "group-1", "group-2"] * 2
    assert all(arrival.prompt_tokens > arrival.prefix_tokens == 40 for arrival in traffic)


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "flood"}, {"rate": 0}, {"rate": float("nan")}, {"requests": 0}, {"prompt_tokens": 0}, {"tenants": 0},
     {"prefix_groups": 2}, {"prefix_tokens": 5}],
)  # fmt: skip
def test_settings_out_of_range_are_named(wrong):
    settings = {"kind": "poisson", "rate": 1.0, "requests": 1, "prompt_tokens": 1, "output_tokens": 1, **wrong}
    name = "traffic" if "kind" in wrong else next(iter(wrong))
    with pytest.raises(ConfigError, match=name):
        Synthetic(**settings)
