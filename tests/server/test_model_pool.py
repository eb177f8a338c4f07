"""Which models are in memory: on demand, within one budget, and never taken from those who have them."""

import asyncio

import pytest
from virtual_loop import VirtualLoop

from kvarn.errors import CapacityError, ConfigError
from kvarn.server.errors import ApiError
from kvarn.server.keep_alive import FOREVER, parse_keep_alive
from kvarn.server.models import ModelPool, ModelState, PooledModel, PoolLimits

LOAD_SECONDS, CLOSE_SECONDS = 2.0, 0.5


class FakeModel:
    def __init__(self, name, book) -> None:
        self.name, self.book, self.is_running = name, book, True

    async def close(self) -> None:
        await asyncio.sleep(CLOSE_SECONDS)
        self.book.append(f"-{self.name}")


class FakeLoader:
    """Takes its time, and fails as often as it is told to."""

    def __init__(self) -> None:
        self.book: list[str] = []
        self.failures: dict[str, int] = {}

    async def load(self, name):
        await asyncio.sleep(LOAD_SECONDS)
        if self.failures.get(name, 0):
            self.failures[name] -= 1
            raise CapacityError(f"no room for {name}")
        self.book.append(f"+{name}")
        return FakeModel(name, self.book)


def run(test, sizes="a1 b1 c1", budget=None, **limits):
    """Runs `test(pool, loader)` in virtual time. sizes: names, each with its bytes in one digit."""
    models = [PooledModel(text[:-1], int(text[-1]), (f"{text[:-1]}-alias",)) for text in sizes.split()]

    async def main():
        loader = FakeLoader()
        pool = ModelPool(models, loader, budget=budget, limits=PoolLimits(**limits))
        await test(pool, loader)
        await pool.close()
        assert pool.loaded() == []

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())



def now():
    return asyncio.get_running_loop().time()


def test_a_model_is_loaded_when_it_is_asked_for_and_stays():
    async def test(pool, loader):
        assert {status.state for status in pool.statuses()} == {ModelState.UNLOADED}
        lease = await pool.acquire("b")
        assert (lease.name, lease.hosted.name, now()) == ("b", "b", LOAD_SECONDS)
        lease.release()
        again = await pool.acquire("b-alias")
        assert (again.name, again.hosted, now()) == ("b", lease.hosted, LOAD_SECONDS)
        again.release()
        first = await pool.acquire(None)
        assert first.name == "a"
        first.release()
        assert loader.book == ["+b", "+a"]

    run(test)


def test_all_who_wait_get_it_at_once_and_it_is_loaded_once():
    async def test(pool, loader):
        leases = await asyncio.gather(*(pool.acquire("a") for _ in range(5)))
        assert pool.status("a").in_flight == 5
        for lease in leases:
            lease.release()
            lease.release()
        assert pool.status("a").in_flight == 0
        assert loader.book == ["+a"]

    run(test)


def test_the_least_recently_used_goes():
    async def test(pool, loader):
        for name in "aba":
            (await pool.acquire(name)).release()
            await asyncio.sleep(1)
        (await pool.acquire("c")).release()
        assert loader.book == ["+a", "+b", "-b", "+c"]

    run(test, budget=2)


def test_no_more_go_than_must():
    async def test(pool, loader):
        for name in ("a", "b", "c", "d"):
            (await pool.acquire(name)).release()
            await asyncio.sleep(1)
        (await pool.acquire("e")).release()
        assert loader.book == ["+a", "+b", "+c", "+d", "-a", "-b", "+e"]

    run(test, sizes="a1 b2 c1 d2 e3", budget=6)


def test_a_model_that_somebody_has_goes_when_the_last_is_done_and_newcomers_wait():
    async def test(pool, loader):
        held = await pool.acquire("a")
        other = asyncio.create_task(pool.acquire("b"))
        await asyncio.sleep(10)
        assert pool.status("a").state is ModelState.UNLOADING
        again = asyncio.create_task(pool.acquire("a"))
        await asyncio.sleep(10)
        assert loader.book == ["+a"]
        assert not other.done() and not again.done()
        held.release()
        (await other).release()
        assert loader.book == ["+a", "-a", "+b"]
        (await again).release()
        assert loader.book == ["+a", "-a", "+b", "-b", "+a"]

    run(test, budget=1)


def test_an_unused_model_goes_before_one_that_somebody_has():
    async def test(pool, loader):
        held = await pool.acquire("a")
        (await pool.acquire("b")).release()
        (await pool.acquire("c")).release()
        assert loader.book == ["+a", "+b", "-b", "+c"]
        held.release()

    run(test, budget=2)


def test_nobody_has_to_go_for_those_who_do_not_wait_any_more():
    async def test(pool, loader):
        held = await pool.acquire("a")
        left = asyncio.create_task(pool.acquire("b"))
        await asyncio.sleep(1)
        again = asyncio.create_task(pool.acquire("a"))
        await asyncio.sleep(1)
        assert not again.done()
        left.cancel()
        (await again).release()
        held.release()
        assert loader.book == ["+a"]
        assert [status.state.value for status in pool.statuses()] == ["loaded", "unloaded", "unloaded"]

    run(test, budget=1)


def test_waiting_is_bounded_in_number_and_time():
    async def test(pool, loader):
        held = await pool.acquire("a")
        waiting = [asyncio.create_task(pool.acquire(name)) for name in "bc"]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="2 requests wait for models to be loaded, the limit is 2") as caught:
            await pool.acquire("b")
        assert caught.value.status == 429
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [error.status for error in results] == [503, 503]
        assert "not loaded in time" in results[0].message
        assert "Retry-After" in results[0].headers
        assert now() == LOAD_SECONDS + 30
        held.release()
        (await pool.acquire("a")).release()
        assert loader.book == ["+a"]

    run(test, budget=1, max_waiting=2, wait_seconds=30.0)


def test_idle_models_are_unloaded():
    async def test(pool, loader):
        (await pool.acquire("a")).release()
        await asyncio.sleep(299)
        lease = await pool.acquire("a")
        await asyncio.sleep(1000)
        assert pool.status("a").state is ModelState.LOADED
        lease.release()
        await asyncio.sleep(299)
        assert pool.status("a").state is ModelState.LOADED
        await asyncio.sleep(2)
        assert pool.status("a").state is ModelState.UNLOADED

    run(test, keep_seconds=300.0)


@pytest.mark.parametrize(("keep", "after"), [(0.0, 0), (5.0, 5), (FOREVER, None), (None, 300)])
def test_a_request_may_say_how_long_its_model_stays(keep, after):
    async def test(pool, loader):
        (await pool.acquire("a", keep)).release()
        assert pool.status("a").keep_seconds == (300 if keep is None else keep)
        await asyncio.sleep(max(0.0, (10_000 if after is None else after) - 0.1))
        assert pool.status("a").state is (ModelState.UNLOADING if after == 0 else ModelState.LOADED)
        await asyncio.sleep(CLOSE_SECONDS + 0.2)
        assert (pool.status("a").state is ModelState.LOADED) == (after is None)
        (await pool.acquire("a")).release()
        assert pool.status("a").keep_seconds == (FOREVER if after is None else 300), "it says so until it is unloaded"

    run(test, keep_seconds=300.0)


def test_a_load_that_fails_is_told_and_not_tried_again_with_every_request():
    async def test(pool, loader):
        loader.failures["a"] = 1
        for _ in range(2):
            with pytest.raises(ApiError, match="no room for a") as caught:
                await pool.acquire("a")
            assert caught.value.status == 503
            assert now() == LOAD_SECONDS
        assert pool.status("a").state is ModelState.FAILED
        assert pool.status("a").reason == "no room for a"
        (await pool.acquire("b")).release()
        await asyncio.sleep(10)
        (await pool.acquire("a")).release()
        assert pool.status("a").state is ModelState.LOADED

    run(test)


def test_an_engine_that_has_stopped_is_a_failure_until_it_is_loaded_again():
    async def test(pool, loader):
        lease = await pool.acquire("a")
        lease.hosted.is_running = False
        lease.release()
        assert pool.status("a").state is ModelState.FAILED
        with pytest.raises(ApiError, match="the engine of a has stopped"):
            await pool.acquire("a")
        await pool.load("a")
        assert loader.book == ["+a", "-a", "+a"]
        assert pool.status("a").state is ModelState.LOADED

    run(test)


def test_unloading_waits_for_those_who_have_it():
    async def test(pool, loader):
        await pool.unload("b")
        held = await pool.acquire("a")
        unloading = asyncio.create_task(pool.unload("a"))
        await asyncio.sleep(100)
        assert not unloading.done()
        held.release()
        await unloading
        assert loader.book == ["+a", "-a"]
        loading = asyncio.create_task(pool.load("a"))
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="is being loaded") as caught:
            await pool.unload("a")
        assert caught.value.status == 409
        await loading

    run(test)


def test_close_refuses_who_waits_and_waits_for_the_load():
    async def test(pool, loader):
        waiting = [asyncio.create_task(pool.acquire(name)) for name in "ab"]
        await asyncio.sleep(LOAD_SECONDS / 2)
        await pool.close()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [error.status for error in results] == [503, 503]
        assert loader.book == ["+a", "-a"]
        with pytest.raises(ApiError, match="the server ends"):
            await pool.acquire("c")

    run(test)


def test_names():
    async def test(pool, loader):
        assert pool.names == ("a", "a-alias", "b", "b-alias", "c", "c-alias")
        with pytest.raises(ApiError, match="the model 'x' is not served here; known: a, a-alias") as caught:
            await pool.acquire("x")
        assert (caught.value.status, caught.value.param) == (404, "model")

    run(test)
    with pytest.raises(ConfigError, match="the name 'x' is given to two models"):
        ModelPool([PooledModel("x"), PooledModel("y", aliases=("x",))], FakeLoader())
    with pytest.raises(ConfigError, match="y takes 11 bytes, but the budget is 10"):
        ModelPool([PooledModel("x", 10), PooledModel("y", 11)], FakeLoader(), budget=10)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [(0, 0), (30, 30), (1.5, 1.5), (-1, FOREVER), ("-1", FOREVER), ("0", 0), ("90s", 90), ("10m", 600),
     ("1h30m", 5400), ("250ms", 0.25), (" 5m ", 300), ("-1m", FOREVER), ("1.5h", 5400)],
)  # fmt: skip
def test_keep_alive_is_understood(given, seconds):
    assert parse_keep_alive(given) == seconds


@pytest.mark.parametrize("given", ["", "m", "5 m", "5x", "1e9", None, True, [], "9" * 400 + "h", 1e9, "nan", "5m-1s"])
def test_keep_alive_that_is_none_is_refused(given):
    with pytest.raises(ValueError, match="must be seconds"):
        parse_keep_alive(given)
