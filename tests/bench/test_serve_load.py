"""Loads on a server by script: what goes wrong there is counted by kind, and nothing there holds the client up."""

import asyncio
import itertools

import pytest
from fake_openai import end, event, fake_server, head, piece, stream, token, whole

from kvarn.bench.serve.arrivals import Arrivals
from kvarn.bench.serve.client import ServerError, Target
from kvarn.bench.serve.datasets import RandomWords
from kvarn.bench.serve.lengths import Lengths
from kvarn.bench.serve.load import Extent
from kvarn.bench.serve.offer import AtOnce, AtRate, AtTimes
from kvarn.bench.serve.point import Bench
from kvarn.bench.serve.session import run_sweep, run_turns
from kvarn.bench.serve.slo import Slo
from kvarn.bench.serve.sweep import Search

WORDS = RandomWords(Lengths.parse("x", "25"), Lengths.parse("x", "4"))


def bench(requests=8, **extent):
    return Bench(WORDS, Extent(requests, **extent), Slo())


def after_probes(script):
    """The two probes are answered, then the script is called with the number of the request."""
    numbers = itertools.count(-2)

    async def answer(writer, body):
        number = next(numbers)
        await (stream(writer, body) if number < 0 else script(writer, body, number))

    return answer


def run(script, offer, load, **target):
    with fake_server(script) as (url, fake):
        done = run_turns([Target(url, **target)], load, offer, 1)
    return done.points[0][0], fake


def test_every_request_is_answered_and_counted():
    point, fake = run(stream, AtOnce(3), bench(8))
    summary = point.summary
    assert (summary.requests, summary.completed, summary.failed) == (8, 8, 0)
    assert summary.output_tokens == 32 and summary.counted
    assert summary.prompt_tokens == 8 * 25  # the scale was measured: 2 tokens a word and 5 around
    assert len(fake.bodies) == 2 + 8
    assert fake.bodies[2]["model"] == "fake-model"
    assert all(len(answer.stamps) == 4 for answer in point.answers)


def test_the_same_seed_sends_the_same_requests():
    first, second = (run(stream, AtOnce(1), bench(5))[1].bodies for _ in range(2))
    assert first == second


def test_each_kind_of_failure_is_counted():
    async def script(writer, body, number):
        if number == 0:
            await whole(writer, 429, {"error": {"message": "slow down"}})
        elif number == 1:
            await whole(writer, 500, {"error": "broken"})
        elif number == 2:  # an answer cut in the middle of a chunk
            await head(writer)
            await piece(writer, token("a"))
            writer.write(b"ff\r\ndata: {")
            writer.close()
        elif number == 3:  # an end of the HTTP answer, but not of the stream
            await head(writer)
            await piece(writer, token("a"))
            writer.write(b"0\r\n\r\n")
        elif number == 4:
            await head(writer)
            await piece(writer, token("a") + event({"error": {"message": "engine failed"}}))
            await end(writer)
        elif number == 5:
            writer.close()
        elif number == 6:
            await whole(writer, 200, {"choices": []})
        elif number == 7:
            writer.write(b"nonsense\r\n\r\n")
        else:
            await stream(writer, body)

    point, _ = run(after_probes(script), AtOnce(1), bench(10))
    assert point.summary.errors == {
        "truncated": 2, "http 429": 1, "http 500": 1, "error in stream": 1, "disconnected": 2, "not an event stream": 1,
    }  # fmt: skip
    assert point.summary.details["http 429"] == "slow down"
    assert point.summary.details["error in stream"] == "engine failed"
    assert point.summary.completed == 2
    assert point.broken.startswith("8 of 10 failed (")


def test_a_timeout_ends_a_request_and_no_other():
    async def script(writer, body, number):
        if number == 1:
            await head(writer)
            await piece(writer, token("a"))
            await asyncio.sleep(30)
        else:
            await stream(writer, body)

    point, _ = run(after_probes(script), AtOnce(2), bench(5), timeout=2.0)
    assert point.summary.errors == {"timeout": 1}
    assert point.summary.completed == 4


def test_an_open_loop_does_not_wait_for_answers():
    """All requests are there before the server gives the first of them a byte."""
    count, waiting, all_there = 12, [], asyncio.Event()

    async def script(writer, body, number):
        waiting.append(number)
        if len(waiting) == count:
            all_there.set()
        await all_there.wait()
        await stream(writer, body)

    point, _ = run(after_probes(script), AtRate(200.0, Arrivals("constant")), bench(count), timeout=30)
    assert point.summary.completed == count
    first_answer = min(answer.stamps[0] for answer in point.answers)
    assert all(answer.sent <= first_answer for answer in point.answers)


def test_a_closed_loop_never_has_more_than_so_many():
    now, most = 0, 0

    async def script(writer, body, number):
        nonlocal now, most
        now += 1
        most = max(most, now)
        await stream(writer, body, between=0.002)
        now -= 1

    run(after_probes(script), AtOnce(3), bench(20))
    assert most == 3


def test_a_slow_first_byte_is_ttft_and_slow_tokens_are_itl():
    async def script(writer, body, number):
        await stream(writer, body, first=0.2, between=0.05)

    point, _ = run(after_probes(script), AtOnce(1), bench(2))
    times = point.summary.times
    assert times["ttft"].p50 >= 0.2
    assert times["e2e"].p50 >= 0.2 + 3 * 0.05
    assert times["tpot"].count == 2 and times["itl"].count == 6


def test_moments_of_a_trace_are_kept():
    point, _ = run(stream, AtTimes([0.0, 0.3, 0.35]), bench(3))
    planned = sorted(answer.planned for answer in point.answers)
    assert planned == pytest.approx([0.0, 0.3, 0.35])
    assert all(answer.lag >= 0 for answer in point.answers)


def test_seconds_bound_a_closed_loop_and_the_warm_up_is_not_counted():
    async def script(writer, body, number):
        await stream(writer, body, between=0.01)

    load = Bench(WORDS, Extent(seconds=0.4, warmup=0.2), Slo())
    point, fake = run(after_probes(script), AtOnce(2), load)
    assert point.summary.seconds == pytest.approx(0.4)
    assert 0 < point.summary.requests < len(fake.bodies) - 2
    assert all(answer.planned <= 0.6 + 1e-9 for answer in point.answers)


def test_a_server_that_says_no_usage_is_still_measured():
    async def script(writer, body):
        await stream(writer, body, usage=False)

    point, _ = run(script, AtOnce(1), bench(3))
    assert not point.summary.counted
    assert point.summary.output_tokens == 12


def test_the_key_is_sent():
    _, fake = run(stream, AtOnce(1), bench(1), api_key="of-ann")
    assert fake.headers[-1]["authorization"] == "Bearer of-ann"


def test_two_servers_have_the_same_requests_in_turns():
    with fake_server(stream) as (a, first), fake_server(stream) as (b, second):
        done = run_turns([Target(a), Target(b)], bench(3), AtOnce(1), 2)
    assert first.bodies == second.bodies
    assert [len(points) for points in done.points] == [2, 2]
    # Turns: all of A's first three come before B's, and B's before A's next.
    assert max(first.came[2:5]) < min(second.came[2:5]) <= max(second.came[2:5]) < min(first.came[5:8])
    assert first.bodies[2] != first.bodies[5]  # each turn has requests of its own: no prefix is found again


def test_a_sweep_finds_what_a_server_can_take():
    """One that gives 429 to whoever comes beside two others."""
    now = 0

    async def script(writer, body, number):
        nonlocal now
        now += 1
        try:
            await (whole(writer, 429, {"error": "full"}) if now > 2 else stream(writer, body, between=0.005))
        finally:
            now -= 1

    with fake_server(after_probes(script)) as (url, _):
        lane, found = run_sweep(Target(url), bench(30), lambda size: AtOnce(int(size)), Search(1, whole=True))
    assert lane.model == "fake-model"
    assert found.best.size == 2
    assert "http 429" in found.curve[-1].broken


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (lambda writer, body: whole(writer, 400, {"error": {"message": "ignore_eos is unknown"}}), "--no-ignore-eos"),
        (lambda writer, body: whole(writer, 401, {"error": {"message": "no key"}}), "http 401: no key"),
    ],
)
def test_a_server_that_refuses_is_told_before_the_load(script, said):
    with fake_server(script) as (url, _), pytest.raises(ServerError, match=said):
        run_turns([Target(url)], bench(1), AtOnce(1), 1)


def test_no_server_is_one_clear_line():
    with pytest.raises(ServerError, match="cannot be reached"):
        run_turns([Target("http://127.0.0.1:9")], bench(1), AtOnce(1), 1)
