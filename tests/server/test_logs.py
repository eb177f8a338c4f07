"""Each request has an id, in its answer, its errors and its line of the log; that says all but what was said."""

import contextlib
import io
import json
import logging
import re

import httpx
import pytest
from gated_engine import gated_llm
from live_server import posted, serving, wait_until

from kvarn.server.logs import ACCESS, JsonFormatter, TextFormatter, configure_logging
from kvarn.server.record import request_id_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODY = {"prompt": "a secret question", "max_tokens": 5, "ignore_eos": True}
MADE = re.compile(r"req_[0-9a-f]{24}")


@contextlib.contextmanager
def logged():
    """The fields of the requests that are finished meanwhile."""
    lines: list[dict] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.fields)
    logger = logging.getLogger(ACCESS)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def the_only(lines):
    wait_until(lambda: lines)
    assert len(lines) == 1
    return lines[0]


def test_every_answer_has_an_id(url):
    for response in (
        httpx.get(f"{url}/health"),
        httpx.get(f"{url}/"),
        httpx.get(f"{url}/nothing"),
        httpx.post(url + COMPLETIONS, json=BODY),
        httpx.post(url + COMPLETIONS, json={**BODY, "stream": True}),
        httpx.post(url + COMPLETIONS, json={}),
    ):
        assert MADE.fullmatch(response.headers["x-request-id"])
        assert len(response.headers.get_list("x-request-id")) == 1
        if response.status_code >= 400:
            assert response.json()["request_id"] == response.headers["x-request-id"]


def test_an_id_that_is_plain_is_kept(url):
    for name in ("abc", "a" * 128, "0f4b-1:2/3.4_5=6@7+8"):
        response = httpx.get(f"{url}/health", headers={"X-Request-ID": name})
        assert response.headers["x-request-id"] == name


@pytest.mark.parametrize("name", ["", "a" * 129, "a b", "a\tb", "ü", '"', "<script>", "a;b", "a,b", "a\\nb"])
def test_others_are_replaced(url, name):
    response = httpx.get(f"{url}/health", headers={"X-Request-ID": name.encode("latin-1")})
    assert MADE.fullmatch(response.headers["x-request-id"])


def test_ids_are_not_made_twice():
    assert len({request_id_of(None) for _ in range(100)}) == 100


def test_a_line_says_what_was_done_and_not_what_was_said(url):
    with logged() as lines:
        body = httpx.post(url + COMPLETIONS, json=BODY, headers={"x-request-id": "mine"}).json()
        line = the_only(lines)
    assert line["request_id"] == "mine"
    assert (line["method"], line["path"], line["status"]) == ("POST", COMPLETIONS, 200)
    assert (line["model"], line["answer_id"]) == ("served", body["id"])
    usage = body["usage"]
    assert line["prompt_tokens"] == usage["prompt_tokens"] == len(BODY["prompt"])
    assert line["completion_tokens"] == usage["completion_tokens"] == 5
    assert line["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert line["finish"] == "length"
    assert 0 < line["ttft_ms"] <= line["e2e_ms"]
    assert "error" not in line
    assert "secret" not in json.dumps(line)


def test_a_line_of_what_was_refused_has_the_code_and_nothing_of_the_body(url):
    with logged() as lines:
        httpx.post(url + COMPLETIONS + "?token=secret", json={"prompt": "a", "model": "secret"})
        line = the_only(lines)
    assert (line["status"], line["error"]) == (404, "model_not_found")
    assert "secret" not in json.dumps(line)
    assert not {"prompt_tokens", "ttft_ms", "finish"} & set(line)


def test_an_error_in_a_stream_is_in_the_line_and_has_the_id(llm):
    with gated_llm() as (llm, gate), serving(llm) as url, logged() as lines:
        with posted(url, COMPLETIONS, {**BODY, "stream": True, "max_tokens": 50}, headers={"x-request-id": "one"}) as c:
            gate.stand_in_step(3)
            gate.inner.execute = None  # no step works from now on
            gate.open()
            said = c.getresponse().read().decode()
        line = the_only(lines)
    assert json.loads(said.splitlines()[-4][6:])["request_id"] == "one"
    assert (line["status"], line["error"], line["request_id"]) == (200, "engine_error", "one")


def test_a_client_that_left_is_logged_as_such():
    with gated_llm() as (llm, gate), serving(llm) as url, logged() as lines:
        with posted(url, COMPLETIONS, BODY):
            gate.stand_in_step(1)
        line = the_only(lines)
        assert line["status"] == 499
        gate.open()


def test_an_unexpected_error_is_a_500_with_the_id(url, monkeypatch, caplog):
    def broken(*_):
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr("kvarn.server.answering.check_entries", broken)
    with logged() as lines:
        response = httpx.post(url + COMPLETIONS, json=BODY)
        line = the_only(lines)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["request_id"] == response.headers["x-request-id"] == line["request_id"]
    assert (line["status"], line["error"]) == (500, "internal_error")
    assert len([r for r in caplog.records if r.exc_info]) == 1, "one traceback in the log"


def test_what_is_polled_is_logged_only_where_it_fails(llm):
    with serving(llm) as url, serving(None) as loading, logged() as lines:
        for path in ("/health", "/metrics", "/", "/static/chat.js"):
            assert httpx.get(url + path).status_code == 200
        httpx.get(f"{url}/version")
        wait_until(lambda: lines)
        httpx.get(f"{loading}/health")
        wait_until(lambda: len(lines) == 2)
    assert [(line["path"], line["status"]) for line in lines] == [("/version", 200), ("/health", 503)]


def made(formatter, message="request", level=logging.INFO, **fields):
    record = logging.LogRecord("kvarn.access", level, "", 0, message, (), None)
    record.fields = fields
    record.created = 1_800_000_000.125
    return formatter.format(record)


def test_text_and_json_are_one_line_whatever_is_in_them():
    hostile = 'a "b"\nstatus=200 \x1b[31m ü'
    text = made(TextFormatter(), path=hostile, status=404)
    assert text == (
        '2027-01-15T08:00:00.125Z INFO request path="a \\"b\\"\\nstatus=200 \\u001b[31m \\u00fc" status=404'
    )
    line = made(JsonFormatter(), path=hostile, status=404)
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "2027-01-15T08:00:00.125Z", "level": "info", "message": "request", "path": hostile, "status": 404,
    }  # fmt: skip


@pytest.fixture
def own_loggers():
    """Loggers are as before afterwards."""
    names = ("kvarn", "kvarn.server", ACCESS, "uvicorn", "uvicorn.error")
    before = [(logging.getLogger(n), list(logging.getLogger(n).handlers), logging.getLogger(n).level,
               logging.getLogger(n).propagate) for n in names]  # fmt: skip
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.mark.parametrize("access", [True, False])
def test_the_access_log_can_be_left_out(own_loggers, access):
    stream = io.StringIO()
    configure_logging("json", access=access, stream=stream)
    logging.getLogger(ACCESS).info("request", extra={"fields": {"status": 200}})
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("kvarn.engine.loop").exception("a step failed")
    logging.getLogger("kvarn.engine.commit").info("of no interest")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["message"] for line in lines] == ["request"] * access + ["a step failed"]
    assert "ValueError: why" in lines[-1]["traceback"]
