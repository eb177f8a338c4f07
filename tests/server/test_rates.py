"""Keys of a file over HTTP: their rates, priorities and tenants, and changes of the file while requests run."""

import contextlib
import json

import httpx
import openai
import pytest
from gated_engine import gated_llm
from live_server import posted, serving, wait_until
from test_bad_requests import check_shape
from test_limits import counts
from test_logs import logged

from kvarn.server.keys import ring as ring_module
from kvarn.server.keys.file import add_key, remove_key
from kvarn.server.keys.ring import KeyRing

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODY = {"prompt": "four", "max_tokens": 6, "ignore_eos": True}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.toml"


def auth(key):
    return {"authorization": f"Bearer {key}"}


def post(url, key, **body):
    return httpx.post(url + COMPLETIONS, json={**BODY, **body}, headers=auth(key), timeout=60)


def left(response, what):
    return int(response.headers[f"x-ratelimit-remaining-{what}"])


def test_requests_a_minute(llm, path):
    key, other = add_key(path, "ann", requests_per_minute=2), add_key(path, "bob")
    with serving(llm, keys=KeyRing((), path), metrics_open=True) as url:
        first, second, third = (post(url, key) for _ in range(3))
        assert [first.status_code, second.status_code] == [200, 200]
        assert [left(first, "requests"), left(second, "requests")] == [1, 0]
        check_shape(third, 429)
        assert third.json()["error"]["code"] == "rate_limit_exceeded"
        assert "2 requests a minute (requests_per_minute)" in third.json()["error"]["message"]
        assert 1 <= int(third.headers["retry-after"]) <= 30
        assert third.headers["x-ratelimit-limit-requests"] == "2"
        assert "x-ratelimit-limit-tokens" not in third.headers
        for _ in range(5):
            assert httpx.get(f"{url}/v1/models", headers=auth(key)).status_code == 200
        free = post(url, other)
        assert free.status_code == 200
        assert not any(name.startswith("x-ratelimit") for name in free.headers)
        assert counts(url)["requests_per_minute"] == 1


def test_how_long_a_model_stays_is_for_keys_that_may_say_it(llm, path):
    key, other = add_key(path, "ann", keep_alive=True), add_key(path, "bob")
    with serving(llm, keys=KeyRing(("plain",), path)) as url:
        assert [post(url, each, keep_alive="10m").status_code for each in (key, "plain")] == [200, 200]
        refused = post(url, other, keep_alive=0)
        check_shape(refused, 403)
        assert refused.json()["error"]["param"] == "keep_alive"
        assert "keep_alive = true in the keys file" in refused.json()["error"]["message"]
        assert post(url, other).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_a_minute_are_taken_ahead_and_settled_when_they_are_known(llm, path, stream):
    key = add_key(path, "ann", tokens_per_minute=100)
    with serving(llm, keys=KeyRing((), path), metrics_open=True) as url:
        long = post(url, key, max_tokens=40, ignore_eos=False, stop=["".join(map(chr, range(97, 99)))], stream=stream)
        assert long.status_code == 200
        assert left(long, "tokens") >= 56 if not stream else left(long, "tokens") in (56, 57, 58)
        wait_until(lambda: left(httpx.get(f"{url}/v1/models", headers=auth(key)), "tokens") >= 56)
        check_shape(post(url, key, max_tokens=200), 400)
        for _ in range(60):
            refused = post(url, key, max_tokens=30)
            if refused.status_code != 200:
                break
        check_shape(refused, 429)
        assert "(tokens_per_minute)" in refused.text
        assert counts(url)["tokens_per_minute"] == 2


def test_prompts_count_and_so_does_every_answer(path):
    key = add_key(path, "ann", tokens_per_minute=60)
    with gated_llm() as (llm, gate), serving(llm, keys=KeyRing((), path)) as url:
        def remaining():
            return left(httpx.get(f"{url}/v1/models", headers=auth(key)), "tokens")

        with posted(url, COMPLETIONS, {**BODY, "prompt": ["four", "fourteen letter"[:14]], "n": 3}, key=key) as asked:
            gate.stand_in_step(1)
            assert 60 - remaining() in range(50, 55)  # 4 + 14 + 6 x 6, less what some seconds bring
            gate.open()
            assert json.loads(asked.getresponse().read())["usage"]["total_tokens"] == 54


def test_what_was_refused_by_the_queue_costs_no_tokens(path):
    key = add_key(path, "ann", tokens_per_minute=1000)
    with (
        gated_llm(max_num_seqs=1, max_num_queued_requests=1) as (llm, gate),
        serving(llm, keys=KeyRing((), path)) as url,
        contextlib.ExitStack() as stack,
    ):
        stack.enter_context(posted(url, COMPLETIONS, BODY, key=key))
        gate.stand_in_step(2)
        stack.enter_context(posted(url, COMPLETIONS, BODY, key=key))
        wait_until(lambda: llm.stats().queued == 1)
        before = left(httpx.get(f"{url}/v1/models", headers=auth(key)), "tokens")
        for _ in range(20):
            check_shape(post(url, key), 429)
        assert left(httpx.get(f"{url}/v1/models", headers=auth(key)), "tokens") >= before
        gate.open()


def test_requests_at_a_time(path):
    key, other = add_key(path, "ann", max_concurrency=1), add_key(path, "bob")
    with gated_llm() as (llm, gate), serving(llm, keys=KeyRing((), path), metrics_open=True) as url:
        with posted(url, COMPLETIONS, BODY, key=key):
            gate.stand_in_step(1)
            refused = post(url, key)
            check_shape(refused, 429)
            assert "(max_concurrency)" in refused.text
            assert refused.headers["retry-after"] == "1"
            with posted(url, COMPLETIONS, BODY, key=other) as second:
                wait_until(lambda: llm.stats().queued >= 1)
                gate.open()
                assert second.getresponse().status == 200
        # Its place is free again when its client has left.
        wait_until(lambda: post(url, key).status_code == 200)
        assert counts(url)["max_concurrency"] >= 1


def test_the_openai_client_understands_a_refusal(llm, path):
    key = add_key(path, "ann", requests_per_minute=1)
    with (
        serving(llm, keys=KeyRing((), path)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client,
    ):
        client.completions.create(model=llm.model_name, prompt="a", max_tokens=1)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model=llm.model_name, prompt="a", max_tokens=1)
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
    assert refused.value.code == "rate_limit_exceeded"
    assert refused.value.request_id.startswith("req_")


@contextlib.contextmanager
def requests_seen(llm, monkeypatch):
    seen, generate = [], type(llm).generate
    monkeypatch.setattr(type(llm), "generate", lambda own, r, **more: seen.append(r) or generate(own, r, **more))
    yield seen


def test_priority_tenant_and_salt_are_the_keys(path, monkeypatch):
    urgent = add_key(path, "urgent", priority=-2, tenant="lab", cache_salt="pepper")
    batch = add_key(path, "batch", priority=7, tenant="lab")
    with gated_llm(policy="priority") as (llm, gate), serving(llm, keys=KeyRing((), path)) as url:
        gate.open()
        with requests_seen(llm, monkeypatch) as seen:
            for key, asked in ((urgent, None), (urgent, -2), (urgent, 0), (batch, None), (batch, 9)):
                assert post(url, key, **({} if asked is None else {"priority": asked})).status_code == 200
            post(url, urgent, cache_salt="mine")
        assert [request.priority for request in seen] == [-2, -2, 0, 7, 9, -2]
        assert {request.tenant for request in seen} == {"lab"}
        assert [request.cache_salt for request in seen] == ["pepper"] * 3 + ["", "", "mine"]
        refused = post(url, batch, priority=6)
        check_shape(refused, 400)
        assert refused.json()["error"]["param"] == "priority"
        assert "at least 7 with this key" in refused.text


def test_a_key_is_known_by_its_name_in_the_log(llm, path):
    key = add_key(path, "ann")
    with serving(llm, api_keys=(), keys=KeyRing(("plain",), path)) as url, logged() as lines:
        post(url, key)
        post(url, "plain")
        post(url, "wrong")
        wait_until(lambda: len(lines) == 3)
    assert [line.get("key") for line in lines] == ["ann", "api-key-1", None]
    assert [line["status"] for line in lines] == [200, 200, 401]
    said = json.dumps(lines)
    assert not any(secret in said for secret in (key, "plain", "wrong"))


def test_a_change_of_the_file_is_taken_while_requests_run(path, monkeypatch):
    monkeypatch.setattr(ring_module, "CHECK_SECONDS", 0.0)
    ann, bob = add_key(path, "ann"), add_key(path, "bob", requests_per_minute=1)
    with gated_llm() as (llm, gate), serving(llm, keys=KeyRing((), path)) as url:
        with posted(url, COMPLETIONS, BODY, key=ann) as running:
            gate.stand_in_step(2)
            remove_key(path, "ann")
            check_shape(post(url, ann), 401)
            path.write_text(path.read_text().replace("requests_per_minute = 1", "requests_per_minute = 1000"))
            gate.open()
            response = running.getresponse()
            assert response.status == 200
            assert json.loads(response.read())["usage"]["completion_tokens"] == 6
        # What bob's key has used is kept, his new rate fills it up.
        assert post(url, bob).headers["x-ratelimit-limit-requests"] == "1000"
        path.write_text("nonsense")
        assert httpx.get(f"{url}/v1/models", headers=auth(bob)).status_code == 200
