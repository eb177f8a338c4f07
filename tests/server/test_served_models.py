"""Real engines in a pool: planned before they are loaded, within one budget, over HTTP."""

import asyncio
import contextlib
import gc
import weakref

import httpx
import pytest
from ending_server import running
from live_server import posted, wait_until

from kvarn.config import CacheConfig, EngineConfig, SchedulerConfig
from kvarn.errors import CapacityError
from kvarn.planning import Available
from kvarn.server import create_app
from kvarn.server.models import ModelPool, PooledModel, PoolLimits
from kvarn.server.models.budget import share_out
from kvarn.server.models.hosted import EngineLoader, ModelSpec
from kvarn.testing import write_tiny_gguf

MACHINE = Available(1 << 30, "a machine of a test")
ENGINE = EngineConfig(
    max_model_len=64,
    threads=1,
    cache=CacheConfig(num_blocks=16),
    scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64),
    packed_cache_bytes=0,
)
BODY = {"prompt": "abc", "max_tokens": 6, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    names = {"one": "llama", "two": "qwen2", "three": "llama"}
    return tuple(
        ModelSpec(name, str(write_tiny_gguf(folder / f"{name}.gguf", family, seed=seed)), ENGINE, (f"{name}-alias",))
        for seed, (name, family) in enumerate(names.items())
    )


@contextlib.contextmanager
def served(specs, budget=None, **limits):
    """Yields a function that posts a completion, one that lists states, and the server's state."""
    shared = share_out(specs, budget, available=lambda: MACHINE)
    models = ModelPool(
        shared.pooled(), EngineLoader(shared.specs, shared.rooms), budget=shared.num_bytes, limits=PoolLimits(**limits)
    )
    app = create_app(None, models=models)
    app.state.server.open()
    with running(app) as url, httpx.Client(base_url=url, timeout=60) as client:

        def states():
            return {card["id"]: card["state"] for card in client.get("/v1/models").json()["data"]}

        yield client, states


def text(client, model, **more):
    response = client.post("/v1/completions", json={**BODY, "model": model, **more})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"], response.json()["model"]


def test_models_are_loaded_when_they_are_asked_for_under_all_names(specs):
    with served(specs) as (client, states):
        assert set(states().values()) == {"unloaded"}
        assert [card["max_model_len"] for card in client.get("/v1/models").json()["data"]] == [64] * 6
        texts = {spec.name: text(client, spec.name)[0] for spec in specs}
        assert len(set(texts.values())) == 3, "they are three models"
        assert text(client, "two-alias") == (texts["two"], "two-alias")
        assert text(client, None) == (texts["one"], "one")
        assert set(states().values()) == {"loaded"}
        missing = client.post("/v1/completions", json={**BODY, "model": "four"})
        assert missing.status_code == 404


def test_within_a_budget_they_take_turns_and_say_the_same(specs):
    plans = share_out(specs, None, available=lambda: MACHINE).plans
    with served(specs) as (client, _):
        expected = {spec.name: text(client, spec.name)[0] for spec in specs}
    two = sum(sorted(plan.total for plan in plans.values())[-2:])
    with served(specs, budget=two) as (client, states):
        for name in ("one", "two", "three", "one", "three", "two"):
            assert text(client, name)[0] == expected[name]
            assert list(states().values()).count("loaded") <= 4, "two models of two names each"
            assert states()[name] == "loaded"


def test_many_clients_of_more_models_than_fit_are_all_answered(specs):
    plans = share_out(specs, None, available=lambda: MACHINE).plans

    async def ask(client, name):
        return name, (await client.post("/v1/completions", json={**BODY, "model": name})).json()["choices"][0]["text"]

    async def ask_all(url):
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            names = [spec.name for spec in specs for _ in range(8)]
            return await asyncio.gather(*(ask(client, name) for name in names[::3] + names[1::3] + names[2::3]))

    with served(specs, budget=max(plan.total for plan in plans.values())) as (client, _):
        expected = {spec.name: text(client, spec.name)[0] for spec in specs}
        answers = asyncio.run(ask_all(str(client.base_url)))
        assert len(answers) == 24
        assert all(answer == expected[name] for name, answer in answers)


def test_keep_alive_of_a_request(specs):
    with served(specs) as (client, states):
        text(client, "one", keep_alive="10m")
        text(client, "two", keep_alive=0)
        wait_until(lambda: states()["two"] == "unloaded")
        assert states()["one"] == "loaded"
        wrong = client.post("/v1/completions", json={**BODY, "keep_alive": "soon"})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "keep_alive")
        assert "or a duration" in wrong.json()["error"]["message"]


def test_memory_that_others_have_taken_meanwhile_is_not_counted_on(specs):
    shared = share_out(specs, None, available=lambda: MACHINE)
    loader = EngineLoader(shared.specs, shared.rooms, available=lambda: Available(1000, "a full machine"))
    app = create_app(None, models=ModelPool(shared.pooled(), loader, budget=shared.num_bytes))
    app.state.server.open()
    with running(app) as url:
        refused = httpx.post(f"{url}/v1/completions", json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_unavailable")
        assert "1.0 KiB are available now (a full machine)" in refused.json()["error"]["message"]


class SlowLoader(EngineLoader):
    may = False

    async def load(self, name):
        while not self.may:
            await asyncio.sleep(0.01)
        return await super().load(name)


def test_a_client_that_leaves_does_not_go_on_waiting_for_its_model(specs):
    loader = SlowLoader(specs, {})
    models = ModelPool([PooledModel(spec.name) for spec in specs], loader, limits=PoolLimits(max_waiting=2))
    app = create_app(None, models=models)
    app.state.server.open()
    with running(app) as url:
        with posted(url, "/v1/completions", {**BODY, "stream": True}), posted(url, "/v1/completions", BODY):
            wait_until(lambda: models.status("one").waiting == 2)
            assert httpx.post(f"{url}/v1/completions", json=BODY).status_code == 429
            assert httpx.get(f"{url}/health/ready").status_code == 200
        wait_until(lambda: models.status("one").waiting == 0)
        wait_until(lambda: app.state.server.door.inside == 0)
        loader.may = True
        assert httpx.post(f"{url}/v1/completions", json=BODY).status_code == 200
        wait_until(lambda: models.status("one").in_flight == 0)


def test_what_never_fits_is_refused_with_the_numbers(specs):
    with pytest.raises(CapacityError, match=r"one does not fit: .*KiB.* may be used"):
        share_out(specs, 100_000, available=lambda: MACHINE)
    with pytest.raises(CapacityError, match=r"memory_budget is 2\.00 GiB, but 1\.00 GiB are available"):
        share_out(specs, 2 << 30, available=lambda: MACHINE)


def test_a_model_that_needs_more_than_a_share_may_have_all(specs):
    open_specs = tuple(
        ModelSpec(s.name, s.source, EngineConfig(max_model_len=64, threads=1, packed_cache_bytes=0)) for s in specs
    )
    shared = share_out(open_specs, 6 << 20, available=lambda: MACHINE)
    assert shared.num_bytes == 6 << 20
    for spec in shared.specs:
        assert shared.plans[spec.name].max_model_len == 64
        assert shared.plans[spec.name].total <= shared.rooms[spec.name].num_bytes <= 6 << 20


def test_one_model_alone_plans_for_itself(specs):
    shared = share_out(specs[:1], None)
    assert (shared.num_bytes, shared.rooms, shared.plans, shared.specs) == (None, {}, {}, specs[:1])


def test_collections_leave_out_what_is_loaded_and_find_what_an_unloaded_model_has_left(specs):
    async def swap():
        loader = EngineLoader(specs, {})
        first = await loader.load("one")
        assert gc.get_freeze_count() > 10_000
        first.itself = first
        left = weakref.ref(first)
        await first.close()
        del first
        second = await loader.load("two")
        assert left() is None
        assert gc.get_freeze_count() > 10_000
        await second.close()

    gc.disable()  # what is found is found by the loader
    try:
        asyncio.run(swap())
    finally:
        gc.enable()
