"""Over every stretch of time a bucket lets through its rate and a minute's worth at most, whatever is settled when."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.errors import ConfigError
from kvarn.server.errors import ApiError
from kvarn.server.keys.account import Account, OpenAccount
from kvarn.server.keys.bucket import TokenBucket
from kvarn.server.keys.records import Key


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def most_over(uses, per_minute):
    """By how much the uses, (time, amount), were more than the rate allows, in the worst stretch of time."""
    ordered = sorted(uses)
    return max(
        (
            sum(amount for _, amount in ordered[first : last + 1])
            - (ordered[last][0] - ordered[first][0]) * per_minute / 60
            for first in range(len(ordered))
            for last in range(first, len(ordered))
        ),
        default=0.0,
    )


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.sampled_from([1, 20, 60]) | st.floats(0, 90)),
        st.tuples(st.just("take"), st.sampled_from([10, 30, 60]) | st.floats(0.1, 70)),
        st.tuples(st.just("settle"), st.integers(0, 5), st.sampled_from([0, 0.5, 1]) | st.floats(0, 1)),
    ),
    max_size=40,
)


@settings(max_examples=400, deadline=None)
@given(STEPS)
def test_true_costs_stay_within_rate_and_burst(steps):
    clock, per_minute, uses, out = Clock(), 60, [], []
    bucket = TokenBucket(per_minute, clock)
    for step in steps:
        if step[0] == "wait":
            clock.now += step[1]
        elif step[0] == "take":
            taken = bucket.take(step[1])
            if taken is not None:
                out.append((clock.now, taken))
        elif out:
            at, taken = out.pop(step[1] % len(out))
            used = taken.amount * step[2]
            bucket.settle(taken, used)
            uses.append((at, used))
        assert bucket.level <= bucket.capacity + 1e-6
    for at, taken in out:
        bucket.settle(taken, taken.amount)
        uses.append((at, taken.amount))
    assert most_over(uses, per_minute) <= bucket.capacity + 1e-6


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 40), st.floats(0, 3)), max_size=40))
def test_what_exceeds_its_estimate_is_made_up_for(steps):
    """In the long run no more is used than the rate allows, the last costs aside."""
    clock, bucket, used_in_all, largest = Clock(), None, 0.0, 0.0
    bucket = TokenBucket(60, clock)
    started = clock.now
    for wait, amount, factor in steps:
        clock.now += wait
        taken = bucket.take(amount)
        if taken is not None:
            bucket.settle(taken, amount * factor)
            used_in_all += amount * factor
            largest = max(largest, amount * factor - amount)
    assert used_in_all <= (clock.now - started) + bucket.capacity + largest + 1e-6


@settings(max_examples=100, deadline=None)
@given(st.floats(0.1, 60), st.lists(st.floats(0.1, 60), max_size=5))
def test_it_says_when_to_come_again(amount, before):
    clock = Clock()
    bucket = TokenBucket(60, clock)
    for each in before:
        bucket.take(each)
    wait = bucket.seconds_until(amount)
    if wait > 0:
        assert bucket.take(amount) is None
    clock.now += wait + 1e-6
    assert bucket.take(amount) is not None


def test_what_was_not_used_comes_back():
    clock = Clock()
    bucket = TokenBucket(60, clock)
    for _ in range(100):  # as often as one likes, where nothing is used
        taken = bucket.take(60)
        bucket.settle(taken, 0)
    first = bucket.take(60)
    assert bucket.take(1) is None
    bucket.settle(first, 20)
    assert bucket.level == 40
    second = bucket.take(40)
    clock.now += 10  # in which the bucket, had it given nothing, would have stayed at 40 and filled to 50
    bucket.settle(second, 0)
    assert bucket.level == pytest.approx(50)


def test_what_would_have_run_over_does_not_come_back():
    clock = Clock()
    bucket = TokenBucket(60, clock)
    taken = bucket.take(60)
    clock.now += 60
    assert bucket.level == 60
    late = bucket.take(60)
    bucket.settle(taken, 0)  # had nothing been taken, the minute's worth would have run over
    assert bucket.level == 0
    bucket.settle(late, 0)
    assert bucket.level == 60


def test_more_than_a_minutes_worth_never_comes():
    bucket = TokenBucket(60, Clock())
    assert bucket.take(61) is None
    assert bucket.seconds_until(61) == float("inf")


def test_a_clock_that_goes_back_gives_nothing():
    clock = Clock()
    bucket = TokenBucket(60, clock)
    bucket.take(60)
    clock.now -= 500
    assert bucket.level == 0
    clock.now += 501
    assert bucket.level == pytest.approx(1)


def test_another_rate_keeps_what_is_spent():
    clock = Clock()
    bucket = TokenBucket(60, clock)
    bucket.take(50)
    bucket.retune(120)
    assert bucket.level == 10
    clock.now += 5
    assert bucket.level == 20
    bucket.retune(6)
    assert bucket.level == 6


def key(**fields):
    return Key("ann", b"x" * 32, **fields)


def test_an_account_counts_requests_tokens_and_those_at_a_time():
    clock = Clock()
    account = Account(key(requests_per_minute=3, tokens_per_minute=100, max_concurrency=2), clock)
    one, two = account.begin(), account.begin()
    with pytest.raises(ApiError, match="2 requests of this key are being answered, its limit \\(max_concurrency\\)"):
        account.begin()
    one.reserve(80)
    with pytest.raises(ApiError, match="100 tokens a minute \\(tokens_per_minute\\), and 30 are not left") as refused:
        two.reserve(30)
    assert refused.value.status == 429
    assert refused.value.headers["Retry-After"] == "6"
    with pytest.raises(ApiError, match="prompt and max_tokens are 101 tokens") as refused:
        two.reserve(101)
    assert (refused.value.status, refused.value.param) == (400, "max_tokens")
    one.end(10)
    clock.now += 6
    two.reserve(80, guessed=50)
    two.end(0)
    account.begin().end(0)
    with pytest.raises(ApiError, match="3 requests a minute \\(requests_per_minute\\); try again in 14 s"):
        account.begin()
    headers = {name.decode(): value.decode() for name, value in account.headers()}
    assert headers == {
        "x-ratelimit-limit-requests": "3", "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "54.000s", "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "100", "x-ratelimit-reset-tokens": "0.000s",
    }  # fmt: skip
    account.begin(counted=False).end(0)


def test_a_guess_is_no_reason_to_refuse_for_ever():
    account = Account(key(tokens_per_minute=100), Clock())
    visit = account.begin()
    visit.reserve(60, guessed=1000)
    assert account.reserve(0) is not None
    visit.end(250)  # a guess may be wrong: then it takes a while
    with pytest.raises(ApiError, match="try again in 91 s"):
        account.reserve(1)


def test_the_parts_of_a_request_are_settled_together():
    account = Account(key(tokens_per_minute=100), Clock())
    visit = account.begin()
    visit.reserve(30)
    visit.reserve(40)
    visit.end(35)
    assert dict(account.headers())[b"x-ratelimit-remaining-tokens"] == b"65"


def test_limits_may_change_while_requests_run():
    clock = Clock()
    account = Account(key(tokens_per_minute=100, max_concurrency=1), clock)
    visit = account.begin()
    visit.reserve(100)
    account.revise(key(max_concurrency=2))
    account.begin().reserve(10**9)
    account.revise(key(tokens_per_minute=50, max_concurrency=2))
    visit.end(10)
    assert dict(account.headers())[b"x-ratelimit-remaining-tokens"] == b"50"
    account.begin()


def test_priorities_are_bounded_by_the_keys():
    account = Account(key(priority=5))
    assert (account.priority(None), account.priority(5), account.priority(9)) == (5, 5, 9)
    with pytest.raises(ApiError, match="priority must be at least 5 with this key, not 4"):
        account.priority(4)
    assert OpenAccount().priority(-3) == -3


def test_a_key_checks_itself():
    for fields in ({"requests_per_minute": 0}, {"tokens_per_minute": -1}, {"max_concurrency": 10**13},
                   {"priority": 2**31}, {"tenant": "a\nb"}, {"cache_salt": "x" * 257}):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(fields))):
            key(**fields)
    for name in ("", "a b", "ü", "a.b", "x" * 65):
        with pytest.raises(ConfigError, match="name must be"):
            Key(name, b"")
