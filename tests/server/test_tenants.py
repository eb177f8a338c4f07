"""Keys, tenants, priorities and refusals for too much load, over HTTP."""

import contextlib
import logging

import httpx
import pytest
from gated_engine import gated_llm
from live_server import posted, serving, wait_until
from test_bad_requests import check_shape
from test_metrics import values

from kvarn.engine import AsyncLLM
from kvarn.errors import ConfigError
from kvarn.server.keys.ring import KeyRing

COMPLETIONS = "/v1/completions"
BODY = {"prompt": "four", "max_tokens": 5, "ignore_eos": True}
ALPHA, BETA = "alpha-secret", "beta-secret"


def post(url, *, key=None, headers=None, **body):
    headers = {**(headers or {}), **({"Authorization": f"Bearer {key}"} if key else {})}
    return httpx.post(url + COMPLETIONS, json={**BODY, **body}, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def guarded(llm):
    with serving(llm, api_keys=(ALPHA, BETA)) as url:
        yield url


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer wrong", f"Basic {ALPHA}", f"Bearer {ALPHA}x", f"Bearer {ALPHA[:-1]}", ALPHA,
     f"Bearer {ALPHA},{BETA}", "Bearer \xfc"],
)  # fmt: skip
def test_without_a_good_key_there_is_no_answer(guarded, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    for response in (
        httpx.post(guarded + COMPLETIONS, json=BODY, headers=headers),
        httpx.get(f"{guarded}/v1/models", headers=headers),
        httpx.get(f"{guarded}/v1/nothing", headers=headers),
    ):
        check_shape(response, 401)
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert ALPHA not in response.text


def test_two_keys_in_one_request_are_none(guarded):
    headers = [("Authorization", f"Bearer {ALPHA}"), ("Authorization", f"Bearer {BETA}")]
    check_shape(httpx.post(guarded + COMPLETIONS, json=BODY, headers=headers), 401)


@pytest.mark.parametrize("key", [ALPHA, BETA])
def test_each_key_is_good(guarded, key):
    assert post(guarded, key=key).status_code == 200
    assert httpx.get(f"{guarded}/v1/models", headers={"authorization": f"bearer {key}"}).status_code == 200


def test_all_but_health_and_the_page_itself_needs_a_key(guarded):
    for path in ("/", "/dashboard", "/static/chat.js", "/static/base.css", "/health"):
        assert httpx.get(guarded + path).status_code == 200
    assert httpx.get(f"{guarded}/health/nothing").status_code == 404
    for path in ("/metrics", "/version", "/openapi.json", "/nothing", "/healthy", "//health"):
        check_shape(httpx.get(guarded + path), 401)
        assert httpx.get(guarded + path, headers={"authorization": f"Bearer {ALPHA}"}).status_code in (200, 404)


def test_numbers_may_be_left_open(llm):
    with serving(llm, api_keys=(ALPHA,), metrics_open=True) as url:
        assert httpx.get(f"{url}/metrics").status_code == 200
        check_shape(httpx.get(f"{url}/version"), 401)


def test_a_key_may_come_as_anthropics_clients_send_it(guarded):
    assert httpx.get(f"{guarded}/v1/models", headers={"x-api-key": ALPHA}).status_code == 200
    both = {"x-api-key": ALPHA, "authorization": f"Bearer {ALPHA}"}
    assert httpx.get(f"{guarded}/v1/models", headers=both).status_code == 200
    check_shape(httpx.get(f"{guarded}/v1/models", headers={**both, "x-api-key": BETA}), 401)


def test_without_keys_any_key_will_do(url):
    assert post(url).status_code == 200
    assert post(url, key="whatever").status_code == 200


@contextlib.contextmanager
def recorded(llm, monkeypatch):
    """The requests that reach the engine."""
    seen, generate = [], AsyncLLM.generate
    monkeypatch.setattr(AsyncLLM, "generate", lambda llm, r, **more: seen.append(r) or generate(llm, r, **more))
    yield seen


def test_a_key_is_a_tenant_and_user_is_not(guarded, url, llm, monkeypatch, caplog):
    with caplog.at_level(logging.DEBUG), recorded(llm, monkeypatch) as seen:
        for key in (ALPHA, BETA, ALPHA):
            post(guarded, key=key, user="somebody else")
        post(url, user="somebody")
    first, second, again, open_to_all = (request.tenant for request in seen)
    assert first == again != second
    assert first and second
    assert open_to_all == ""
    said = caplog.text + httpx.get(f"{guarded}/metrics", headers={"x-api-key": ALPHA}).text
    for secret in (ALPHA, BETA, first, second):
        assert secret not in said
    assert not {first, second} & {ALPHA, BETA}


def test_tenants_keep_their_names_whatever_the_order_of_keys():
    names = [KeyRing(keys).find(ALPHA).tenant for keys in ((ALPHA, BETA), (BETA, "gamma", ALPHA))]
    assert names[0] == names[1]
    assert KeyRing((ALPHA,)).find(BETA) is None
    assert KeyRing((ALPHA,)).find("") is None


def test_all_keys_are_compared_whichever_it_is(monkeypatch):
    keys = KeyRing([f"key {number}" for number in range(9)])
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append(len(a)) or a == b)
    for key in ("key 0", "key 8", "none of them", "x" * 500):
        compared.clear()
        keys.find(key)
        assert compared == [32] * 9


def test_too_many_keys_are_refused():
    with pytest.raises(ConfigError, match="at most 1024 keys, not 1025"):
        KeyRing([str(number) for number in range(1025)])


def test_priority_reaches_the_engine_and_is_refused_by_other_policies(url):
    response = post(url, priority=3)
    check_shape(response, 400)
    assert response.json()["error"]["param"] == "priority"
    assert "fcfs" in response.json()["error"]["message"]
    assert post(url, priority=0).status_code == 200
    check_shape(post(url, priority="high"), 400)


def answer_all(gate, url, llm, requests):
    """Posts (body, key) one after the other while the engine stands in its first step, then lets it answer."""
    with contextlib.ExitStack() as stack:
        connections = []
        for number, (body, key) in enumerate(requests, 1):
            connections.append(stack.enter_context(posted(url, COMPLETIONS, {**BODY, **body}, key=key)))
            if number == 1:
                gate.stand_in_step(1)
            # The first one counts as queued until its step has ended.
            wait_until(lambda wanted=number: llm.stats().queued == wanted)
        gate.open()
        bodies = [connection.getresponse().read() for connection in connections]
    assert all(b"choices" in body for body in bodies)


def admitted(llm, monkeypatch):
    """Priority and tenant of each request in the order in which the scheduler admits them."""
    order = []
    scheduler = llm._engine.core._scheduler
    admit = scheduler._admit
    monkeypatch.setattr(
        scheduler, "_admit", lambda step, sequence: order.append(sequence.request) or admit(step, sequence)
    )
    return order


def test_smaller_priorities_are_served_first(monkeypatch):
    with gated_llm(max_num_seqs=1, policy="priority") as (llm, gate), serving(llm) as url:
        order = admitted(llm, monkeypatch)
        answer_all(gate, url, llm, [({"priority": p}, None) for p in (0, 5, -1, 5, 2)])
        assert [request.priority for request in order] == [0, -1, 2, 5, 5]


def test_keys_take_turns(monkeypatch):
    with gated_llm(max_num_seqs=1, policy="fair") as (llm, gate), serving(llm, api_keys=(ALPHA, BETA)) as url:
        order = admitted(llm, monkeypatch)
        answer_all(gate, url, llm, [({}, ALPHA)] * 5 + [({}, BETA)] * 2)
        tenants = ["ab"[request.tenant == KeyRing((BETA,)).find(BETA).tenant] for request in order]
        assert "".join(tenants) == "ababaaa"


def test_queued_tokens_are_limited_by_name_and_counted():
    with (
        gated_llm(max_num_seqs=1, max_num_queued_tokens=30) as (llm, gate),
        serving(llm, served_model_names=["served"]) as url,
    ):
        with posted(url, COMPLETIONS, BODY):
            gate.stand_in_step(2)
            with posted(url, COMPLETIONS, {**BODY, "prompt": "x" * 40}):
                wait_until(lambda: llm.stats().queued_tokens == 40)
                response = post(url)
                check_shape(response, 429)
                assert "40 prompt tokens are waiting" in response.text
                assert "limit of 30 (max_num_queued_tokens)" in response.text
                assert response.headers["retry-after"] == "1"
                assert values(url)["kvarn:num_tokens_queued"] == 40
                gate.open()
                wait_until(lambda: llm.stats().queued == 0)
        assert post(url).status_code == 200
        found = values(url)
        assert found["kvarn:request_rejections_total.queued_tokens"] == 1
        assert found["kvarn:request_rejections_total.queued_requests"] == 0
        assert found["kvarn:num_tokens_queued"] == 0


def test_too_many_requests_name_their_limit():
    with (
        gated_llm(max_num_seqs=1, max_num_queued_requests=1) as (llm, gate),
        serving(llm) as url,
        posted(url, COMPLETIONS, BODY),
    ):
        gate.stand_in_step(2)
        with posted(url, COMPLETIONS, BODY):
            wait_until(lambda: llm.stats().queued == 1)
            assert "the limit is 1 (max_num_queued_requests)" in post(url).text
            assert llm.stats().rejections["queued_requests"] == 1
            gate.open()


class SlowMachine:
    """A cost that expects every step to take ten seconds."""

    def seconds(self, shape):
        return 10.0

    def observe(self, shape, seconds):
        pass


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["X-SLO-TTFT-MS", "x-llm-d-slo-ttft-ms"])
def test_a_deadline_that_will_not_be_met_is_refused_with_the_time_to_come_back(name, stream):
    with (
        gated_llm(max_num_seqs=1, cost=SlowMachine()) as (llm, gate),
        serving(llm, served_model_names=["served"]) as url,
    ):
        with posted(url, COMPLETIONS, BODY):
            gate.stand_in_step(2)
            # The engine takes requests in between two steps.
            with posted(url, COMPLETIONS, {**BODY, "stream": stream}, headers={name: "2500"}) as late:
                wait_until(lambda: llm.stats().queued == 1)
                gate.finish_step()
                response = late.getresponse()
                assert response.status == 429
                said = response.read()
                assert b"deadline_not_met" in said
                assert b"later than the 2500 ms" in said
                # Three steps of the running answer are left, then one of its own: 40 s.
                assert response.headers["retry-after"] == "38"
            gate.open()
            assert post(url).status_code == 200
        assert values(url)["kvarn:request_rejections_total.ttft_slo"] == 1


def test_an_idle_server_takes_a_request_whatever_its_deadline():
    with gated_llm(cost=SlowMachine(), ttft_slo_ms=1) as (llm, gate), serving(llm) as url:
        gate.open()
        assert post(url, headers={"x-slo-ttft-ms": "0.001"}).status_code == 200
        assert post(url).status_code == 200


@pytest.mark.parametrize("value", ["", "soon", "0", "-5", "nan", "inf", "1" * 400])
def test_a_deadline_that_is_no_time_is_refused_by_name(url, value):
    response = post(url, headers={"x-slo-ttft-ms": value})
    check_shape(response, 400)
    assert response.json()["error"]["param"] == "x-slo-ttft-ms"
