"""Figures of loads whose events are made up: exact to the digit."""

import json

import pytest

from kvarn.bench.serve.answers import Answer, read_answer
from kvarn.bench.serve.client import Reply
from kvarn.bench.serve.compare import ratios
from kvarn.bench.serve.metrics import ClientLoad, Window, summarize
from kvarn.bench.serve.point import Point
from kvarn.bench.serve.ranks import Distribution, ranked
from kvarn.bench.serve.slo import Slo
from kvarn.bench.serve.tables import doubts, to_json
from kvarn.bench.statistics import Interval
from kvarn.errors import ConfigError

IDLE = ClientLoad(10.0, 0.1, None)


def answer(sent, stamps, *, end=None, tokens=None, failure="", prompt=10, planned=None):
    stamps = tuple(float(stamp) for stamp in stamps)
    last = stamps[-1] if stamps else sent
    return Answer(
        sent if planned is None else planned, sent, last if end is None else end, stamps, prompt,
        len(stamps) if tokens is None else tokens, failure=failure, detail="said",
    )  # fmt: skip


def test_percentiles_are_values_that_were_measured():
    hundred = [float(number) for number in range(1, 101)]
    assert [ranked(hundred, p) for p in (1, 50, 95, 99, 100)] == [1, 50, 95, 99, 100]
    assert ranked([3.0], 50) == 3.0
    assert ranked([1.0, 2.0, 3.0], 50) == 2.0
    assert ranked([1.0, 2.0, 3.0], 99) == 3.0
    assert Distribution.of(reversed(hundred)) == Distribution(100, 50.5, 50, 95, 99, 100)
    assert Distribution.of([]) is None


def test_times_of_one_answer():
    one = answer(1.0, [1.5, 1.7, 2.5], end=2.75, tokens=6)
    assert one.ttft == 0.5
    assert one.gaps == pytest.approx([0.2, 0.8])
    assert one.tpot == pytest.approx(1.0 / 5)
    assert one.e2e == 1.75
    assert one.time("itl", 50) == pytest.approx(0.2)
    assert one.time("itl", 99) == pytest.approx(0.8)
    assert answer(1.0, [2.0]).tpot is None
    assert answer(1.0, []).ttft is None
    assert answer(3.5, [4], planned=3.0).lag == 0.5


def test_a_summary_counts_what_was_planned_and_what_came_in_the_window():
    answers = [
        answer(1, [2, 11]),                    # before the window; its second token comes in it
        answer(10, [11, 12, 13]),
        answer(12, [16, 18], end=18.5),
        answer(19, [21, 23]),                  # planned in it, answered after it
        answer(13, [], failure="http 429", prompt=0),
        answer(14, [15], failure="truncated", prompt=10),
        answer(25, [26]),                      # after it
    ]  # fmt: skip
    found = summarize(answers, Window(10, 20), Slo.parse("ttft:2000"), IDLE)
    assert (found.requests, found.completed, found.failed) == (5, 3, 2)
    assert found.errors == {"http 429": 1, "truncated": 1}
    assert found.details == {"http 429": "said", "truncated": "said"}
    assert found.times["ttft"] == Distribution(3, 7 / 3, 2, 4, 4, 4)
    assert found.times["itl"] == Distribution(4, 1.5, 1, 2, 2, 2)
    assert found.times["e2e"].most == 6.5
    assert found.requests_per_s == 0.3  # the one sent before it ends in it, too
    assert found.offered_per_s == 0.5
    assert found.output_tokens_per_s == pytest.approx((1 + 3 + 2 + 1) / 10)
    assert found.prompt_tokens_per_s == pytest.approx((10 + 10 + 10) / 10)
    assert (found.good, found.goodput) == (2, 0.2)
    assert (found.prompt_tokens, found.output_tokens) == (30, 7)


def test_an_slo_is_judged_for_one_answer_and_for_a_load():
    slo = Slo.parse("ttft:1000,itl:300")
    assert slo.limits == {"ttft": 1.0, "itl": 0.3}
    assert slo.good(answer(0, [1.0, 1.25]))
    assert not slo.good(answer(0, [1.01, 1.25]))
    assert not slo.good(answer(0, [1.0, 1.5]))
    assert not slo.good(answer(0, [1.0], failure="timeout"))
    assert not slo.good(answer(0, []))
    assert Slo().good(answer(0, []))
    window = Window(0, 100)
    quick = [answer(t, [t + 0.5, t + 0.75]) for t in range(99)]
    slow = answer(99, [109.0])
    assert slo.broken(summarize([*quick, slow], window, slo, IDLE)) == ""  # P99 of a hundred leaves one out
    assert "P99 TTFT" in slo.broken(summarize([*quick[:50], slow], window, slo, IDLE))
    failed = answer(50, [], failure="connect")
    assert slo.broken(summarize([*quick, failed], window, slo, IDLE)) == "1 of 100 failed (connect: 1)"
    assert slo.broken(summarize([], window, slo, IDLE)) == "nothing was answered"


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:x", "ttft:-5", "ttft:nan", "p99:5", "ttft:5;itl:3", ","])
def test_bad_slos_are_refused_with_an_example(text):
    with pytest.raises(ConfigError, match="ttft:500,itl:30"):
        Slo.parse(text)


def test_intervals_are_students():
    assert Interval.of([5.0]) == Interval(5.0, None)
    several = Interval.of([9.0, 10.0, 11.0])
    assert several.mean == 10.0
    assert several.half == pytest.approx(4.303 * 1.0 / 3**0.5)
    assert Interval.of([1.0, 2.0] * 50).half == pytest.approx(1.96 * 0.50252 / 10, rel=1e-4)


def point(*answers, window=None):
    summary = summarize(answers, window or Window(0, 10), Slo(), IDLE)
    return Point("load", 1.0, summary, "", list(answers))


def test_ratios_are_of_the_second_to_the_first_and_say_who_is_better():
    first = [point(answer(0, [1.0, 2.0])), point(answer(0, [1.1, 2.0])), point(answer(0, [0.9, 2.0]))]
    second = [point(answer(0, [0.5, 2.0])), point(answer(0, [0.55, 2.0])), point(answer(0, [0.45, 2.0]))]
    found = {ratio.figure.name: ratio for ratio in ratios(first, second)}
    assert found["TTFT P50, ms"].ratio == pytest.approx(0.5)
    assert found["TTFT P50, ms"].better == "second"
    assert found["TTFT P50, ms"].first == pytest.approx(1000.0)
    assert found["requests/s"].ratio == 1.0
    assert found["requests/s"].better == ""
    worse = {ratio.figure.name: ratio for ratio in ratios(second, first)}
    assert worse["TTFT P50, ms"].better == "first"


def test_a_late_client_is_told():
    late = point(answer(1.02, [2.0], planned=1.0))
    assert any("late, P99 20.0 ms (limit 10)" in said for said in doubts([late], 0.010))
    assert not any("late" in said for said in doubts([late], 0.030))


def test_json_has_no_single_answers_and_no_nan():
    text = to_json({"turns": [point(answer(0, [1.0]))], "x": float("inf")})
    loaded = json.loads(text)
    assert loaded["x"] is None
    assert loaded["turns"][0]["times"]["ttft"]["p50"] == 1.0
    assert "answers" not in loaded["turns"][0]


def reply(*pieces, status=200, failure=""):
    return Reply(0.0, 0.0, 9.0, status, [(float(n + 1), piece) for n, piece in enumerate(pieces)], failure)


def data(item):
    return b"data: " + json.dumps(item).encode() + b"\n\n"


def chunk(text, finish=None):
    return data({"choices": [{"delta": {"content": text}, "finish_reason": finish}]})


DONE = b"data: [DONE]\n\n"


def test_events_are_stamped_with_the_piece_that_completes_them():
    usage = data({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4,
                                           "prompt_tokens_details": {"cached_tokens": 3}}})  # fmt: skip
    last = chunk("c", "stop")
    found = read_answer(reply(chunk(""), chunk("a") + chunk("b"), last[:20], last[20:], usage, DONE))
    assert found.failure == ""
    assert found.stamps == (2.0, 2.0, 4.0)
    assert (found.prompt_tokens, found.output_tokens, found.cached_tokens) == (7, 4, 3)
    assert found.text == "abc"
    assert found.end == 9.0


def test_completions_thoughts_and_calls_are_parts_of_the_answer():
    parts = [
        {"choices": [{"text": "x"}]},
        {"choices": [{"delta": {"reasoning_content": "y"}}]},
        {"choices": [{"delta": {"tool_calls": [{"function": {"arguments": "{}"}}]}}]},
        {"choices": [{"delta": {"role": "assistant"}}]},
    ]
    found = read_answer(reply(*(data(part) for part in parts), DONE))
    assert found.stamps == (1.0, 2.0, 3.0)
    assert not found.counted and found.output_tokens == 3


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (reply(b'{"error": {"message": "slow down"}}', status=429), "http 429"),
        (reply(b"<html>", status=502), "http 502"),
        (reply(chunk("a")), "truncated"),
        (reply(chunk("a"), failure="truncated"), "truncated"),
        (reply(failure="timeout", status=0), "timeout"),
        (reply(chunk("a"), failure="timeout"), "timeout"),
        (reply(chunk("a"), data({"error": {"message": "engine failed"}}), DONE), "error in stream"),
        (reply(b"data: {nonsense\n\n"), "not an event stream"),
        (reply(b"data: []\n\n"), "not an event stream"),
        (reply(b'{"choices": []}'), "not an event stream"),
        (reply(b"data: " + b"[" * 100_000 + b"\n\n"), "not an event stream"),
        (reply(data({"choices": [5]})), "not an event stream"),
        (reply(), "not an event stream"),
    ],
)
def test_what_goes_wrong_has_a_kind(given, kind):
    assert read_answer(given).failure == kind


def test_what_a_server_says_is_kept():
    assert read_answer(reply(b'{"error": {"message": "slow down"}}', status=429)).detail == "slow down"
