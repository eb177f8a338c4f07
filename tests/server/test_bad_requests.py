"""Whatever a client sends, it gets an answer in OpenAI's shape that names the field; never a 5xx."""

import json
import socket
import threading

import httpx
import pytest
from gated_engine import PATIENCE, Broken, gated_llm
from live_server import posted, serving, wait_until

HELLO = [{"role": "user", "content": "hi"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def message(**fields):
    return {"messages": [{**HELLO[0], **fields}]}


BAD = [
    # path, body, status, param
    (CHAT, b"", 400, None),
    (CHAT, b"{", 400, None),
    (CHAT, b"[]", 400, None),
    (CHAT, b"null", 400, None),
    (CHAT, b'"text"', 400, None),
    (CHAT, b"\xff\xfe", 400, None),
    (CHAT, b"[" * 100_000, 400, None),
    (CHAT, b'{"messages": NaN}', 400, None),
    (CHAT, {}, 400, "messages"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": "hi"}, 400, "messages"),
    (CHAT, {"messages": [{}] * 20_000}, 400, "messages"),
    (CHAT, {"messages": [1]}, 400, "messages[0]"),
    (CHAT, {"messages": [{}]}, 400, "messages[0].role"),
    (CHAT, message(role=3), 400, "messages[0].role"),
    (CHAT, message(role="<|im_start|>"), 400, "messages[0].role"),
    (CHAT, message(content=5), 400, "messages[0].content"),
    (CHAT, message(content=None), 400, "messages[0].content"),
    (
        CHAT,
        message(content=[{"type": "image_url", "image_url": {"url": "http://x"}}]),
        400,
        "messages[0].content[0].type",
    ),
    (CHAT, {"messages": HELLO, "model": "gpt-4"}, 404, "model"),
    (CHAT, {"messages": HELLO, "model": 4}, 400, "model"),
    (CHAT, {"messages": HELLO, "temperature": -1}, 400, "temperature"),
    (CHAT, {"messages": HELLO, "temperature": "hot"}, 400, "temperature"),
    (CHAT, {"messages": HELLO, "temperature": True}, 400, "temperature"),
    (CHAT, {"messages": HELLO, "top_p": 0}, 400, "top_p"),
    (CHAT, {"messages": HELLO, "top_p": 1.5}, 400, "top_p"),
    (CHAT, {"messages": HELLO, "top_k": -2}, 400, "top_k"),
    (CHAT, {"messages": HELLO, "top_k": 10**30}, 400, "top_k"),
    (CHAT, {"messages": HELLO, "cache_salt": ""}, 400, "cache_salt"),
    (CHAT, {"messages": HELLO, "cache_salt": "x" * 257}, 400, "cache_salt"),
    (COMPLETIONS, {"prompt": "hi", "cache_salt": 5}, 400, "cache_salt"),
    (CHAT, {"messages": HELLO, "min_p": 2}, 400, "min_p"),
    (CHAT, {"messages": HELLO, "n": 0}, 400, "n"),
    (CHAT, {"messages": HELLO, "n": 1000}, 400, "n"),
    (CHAT, {"messages": HELLO, "n": 1.5}, 400, "n"),
    (CHAT, {"messages": HELLO, "max_tokens": 0}, 400, "max_tokens"),
    (CHAT, {"messages": HELLO, "max_tokens": -5}, 400, "max_tokens"),
    (CHAT, {"messages": HELLO, "max_tokens": 10**9}, 400, "max_tokens"),
    (CHAT, {"messages": HELLO, "min_tokens": 5, "max_tokens": 2}, 400, "min_tokens"),
    (CHAT, {"messages": HELLO, "presence_penalty": 3}, 400, "presence_penalty"),
    (CHAT, {"messages": HELLO, "frequency_penalty": -3}, 400, "frequency_penalty"),
    (CHAT, {"messages": HELLO, "repetition_penalty": 0}, 400, "repetition_penalty"),
    (CHAT, {"messages": HELLO, "repetition_penalty": 5e-324}, 400, "repetition_penalty"),
    (CHAT, {"messages": HELLO, "logit_bias": {"x": 1}}, 400, "logit_bias"),
    (CHAT, {"messages": HELLO, "logit_bias": {"99999": 1}}, 400, "logit_bias"),
    (CHAT, {"messages": HELLO, "logit_bias": {"5": 1000}}, 400, "logit_bias"),
    (CHAT, {"messages": HELLO, "logit_bias": {str(i): 1 for i in range(2000)}}, 400, "logit_bias"),
    (CHAT, {"messages": HELLO, "stop": [""]}, 400, "stop"),
    (CHAT, {"messages": HELLO, "stop": ["x"] * 100}, 400, "stop"),
    (CHAT, {"messages": HELLO, "stop": [1]}, 400, "stop"),
    (CHAT, {"messages": HELLO, "stop_token_ids": [-1]}, 400, "stop_token_ids"),
    (CHAT, {"messages": HELLO, "allowed_token_ids": []}, 400, "allowed_token_ids"),
    (CHAT, {"messages": HELLO, "allowed_token_ids": [1, 9999]}, 400, "allowed_token_ids"),
    (CHAT, {"messages": HELLO, "allowed_token_ids": [1] * 70_000}, 400, "allowed_token_ids"),
    (COMPLETIONS, {"prompt": "hi", "allowed_token_ids": ["a"]}, 400, "allowed_token_ids[0]"),
    (CHAT, {"messages": HELLO, "bad_words": [""]}, 400, "bad_words"),
    (CHAT, {"messages": HELLO, "bad_words": ["x"] * 300}, 400, "bad_words"),
    (CHAT, {"messages": HELLO, "bad_words": ["x" * 200]}, 400, "bad_words"),
    (COMPLETIONS, {"prompt": "hi", "bad_words": [[1]]}, 400, "bad_words[0]"),
    (CHAT, {"messages": HELLO, "allowed_token_ids": [257], "min_tokens": 3}, 400, "allowed_token_ids"),
    (CHAT, {"messages": HELLO, "seed": 2**70}, 400, "seed"),
    (CHAT, {"messages": HELLO, "seed": "x"}, 400, "seed"),
    (CHAT, {"messages": HELLO, "stream": "yes"}, 400, "stream"),
    (CHAT, {"messages": HELLO, "stream_options": {"include_usage": True}}, 400, "stream_options"),
    (CHAT, {"messages": HELLO, "stream": True, "stream_options": {"x": 1}}, 400, "stream_options.x"),
    (CHAT, {"messages": HELLO, "top_logprobs": 3}, 400, "top_logprobs"),
    (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 50}, 400, "top_logprobs"),
    (CHAT, {"messages": HELLO, "logprobs": 3}, 400, "logprobs"),
    (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, 400, "tools[0].function"),
    (CHAT, {"messages": HELLO, "functions": [{"name": "x"}]}, 400, "functions"),
    (CHAT, {"messages": HELLO, "response_format": {"type": "json_schema"}}, 400, "response_format.json_schema.schema"),
    (COMPLETIONS, {"prompt": "x", "tools": [{"type": "function"}]}, 400, "tools"),
    (CHAT, {"messages": HELLO, "tempature": 1}, 400, "tempature"),
    (CHAT, {"messages": HELLO, "chat_template": "{{ 1 }}"}, 400, "chat_template"),
    (CHAT, message(content="x" * 5000), 400, "messages"),
    (CHAT, message(content="x" * 1_000_000), 400, "messages"),
    (CHAT, message(content=[{"type": "text", "text": "x" * 1_000_000}]), 400, "messages"),
    (CHAT, message(content=[{"type": "text"}]), 400, "messages[0].content[0].text"),
    (CHAT, {"messages": HELLO, "max_completion_tokens": 0}, 400, "max_completion_tokens"),
    (CHAT, {"messages": HELLO, "max_completion_tokens": 10**9}, 400, "max_completion_tokens"),
    (CHAT, {"messages": HELLO, "max_tokens": 3, "max_completion_tokens": 5}, 400, "max_tokens"),
    (
        CHAT,
        {"messages": HELLO, "add_generation_prompt": True, "continue_final_message": True},
        400,
        "add_generation_prompt",
    ),
    (CHAT, {"messages": HELLO, "chat_template_kwargs": [1]}, 400, "chat_template_kwargs"),
    (CHAT, {"messages": HELLO, "echo": True}, 400, "echo"),
    (CHAT, {"messages": HELLO, "a b": 1}, 400, "a b"),
    (CHAT, {"messages": HELLO, "\ud800": 1}, 400, "\ud800"),
    (CHAT, {"messages": HELLO, "model": "\ud800"}, 404, "model"),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 5000 + b"}", 400, None),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 4000 + b"}", 400, "seed"),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}', 400, "temperature"),
    (
        CHAT,
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": ' + b"9" * 4000 + b"}",
        400,
        "temperature",
    ),
    (CHAT, {"messages": HELLO, "logit_bias": {"5": "x"}}, 400, "logit_bias.5"),
    (CHAT, {"messages": HELLO, "logit_bias": [1]}, 400, "logit_bias"),
    (CHAT, {"messages": HELLO, "stop": 5}, 400, "stop"),
    (CHAT, {"messages": HELLO, "stop_token_ids": ["a"]}, 400, "stop_token_ids[0]"),
    (CHAT, {"messages": HELLO, "stop_token_ids": [1] * 2000}, 400, "stop_token_ids"),
    (
        CHAT,
        {"messages": HELLO, "stream": True, "stream_options": {"include_obfuscation": True}},
        400,
        "stream_options.include_obfuscation",
    ),
    (CHAT, {"messages": HELLO, "stream": True, "stream_options": 5}, 400, "stream_options"),
    (CHAT, {"messages": HELLO, "verbosity": "low"}, 400, "verbosity"),
    (COMPLETIONS, {}, 400, "prompt"),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": ["a"] * 100}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [[1]] * 100}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [1, "a"]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [1, True]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [[1], ["a"]]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [[1], 1]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": None}, 400, "prompt"),
    (COMPLETIONS, {"prompt": "x" * 600}, 400, "prompt"),
    (COMPLETIONS, {"prompt": ["a", "x" * 600]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": "a", "messages": HELLO}, 400, "messages"),
    (COMPLETIONS, {"prompt": "a", "top_logprobs": 2}, 400, "top_logprobs"),
    (COMPLETIONS, {"prompt": [99999]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": {"a": 1}}, 400, "prompt"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "echo": True, "max_tokens": -1}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "echo": True, "logprobs": 21}, 400, "logprobs"),
    (COMPLETIONS, {"prompt": "a", "prompt_logprobs": -1}, 400, "prompt_logprobs"),
    (CHAT, {"messages": HELLO, "prompt_logprobs": 21}, 400, "prompt_logprobs"),
    (CHAT, {"messages": HELLO, "prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs"),
    (COMPLETIONS, {"prompt": "a", "suffix": "b"}, 400, "suffix"),
    (COMPLETIONS, {"prompt": "a", "best_of": 65}, 400, "best_of"),
    (COMPLETIONS, {"prompt": "a", "best_of": 2, "n": 3}, 400, "best_of"),
    (COMPLETIONS, {"prompt": "a", "best_of": 0}, 400, "best_of"),
    (COMPLETIONS, {"prompt": "a", "best_of": 2, "stream": True}, 400, "best_of"),
    (CHAT, {"messages": HELLO, "best_of": 2}, 400, "best_of"),
    (CHAT, {"messages": HELLO, "length_penalty": 2.0}, 400, "length_penalty"),
    *((COMPLETIONS, {"prompt": "a", "use_beam_search": True, **fields}, 400, param) for fields, param in [
        ({"best_of": 11}, "best_of"), ({"best_of": 0}, "best_of"), ({"best_of": 2, "n": 3}, "n"),
        ({"length_penalty": 11.0}, "length_penalty"), ({"stream": True}, "use_beam_search"),
        ({"logprobs": 1}, "logprobs"), ({"stop": "x"}, "stop"), ({"top_k": 3}, "top_k"),
        ({"bad_words": ["x"]}, "bad_words"), ({"max_tokens": 10_000}, "max_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ]),
    (CHAT, {"messages": HELLO, "use_beam_search": True}, 400, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "logprobs": 100}, 400, "logprobs"),
    ("/v1/nothing", {}, 404, None),
]


def check_shape(response, status):
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.json()["error"]["message"]
    assert "Traceback" not in response.text


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_answered_by_name(url, llm, case):
    path, body, status, param = BAD[case]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = httpx.post(url + path, content=content, headers={"content-type": "application/json"})
    check_shape(response, status)
    if param is not None:
        assert response.json()["error"]["param"] == param
    assert llm.stats().running == 0


def test_methods_types_and_sizes(url):
    check_shape(httpx.get(url + CHAT), 405)
    check_shape(httpx.post(url + CHAT, content=b"{}", headers={"content-type": "text/plain"}), 415)
    check_shape(httpx.post(url + CHAT, content=b"x" * (9 << 20), headers={"content-type": "application/json"}), 413)

    def endless():
        for _ in range(200):
            yield b" " * 65536

    chunked = httpx.post(url + CHAT, content=endless(), headers={"content-type": "application/json"})
    check_shape(chunked, 413)


@pytest.mark.parametrize(
    "headers", [f"Content-Length: {9 << 20}", "Transfer-Encoding: chunked"], ids=["declared", "chunked"]
)
def test_a_client_that_sends_all_before_it_reads_is_told(url, headers):
    """Of a body up to twice the limit: a server that closes at once would have the connection reset under it."""
    host, port = url.removeprefix("http://").split(":")
    piece = b" " * 65536
    with socket.create_connection((host, int(port)), timeout=30) as client:
        begin = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{headers}\r\n\r\n"
        client.sendall(begin.encode())
        for _ in range((9 << 20) // len(piece)):
            client.sendall(b"10000\r\n" + piece + b"\r\n" if "chunked" in headers else piece)
        if "chunked" in headers:
            client.sendall(b"0\r\n\r\n")
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413")
    assert json.loads(body)["error"]["code"] == "body_too_large"


def test_harmless_parameters_are_taken(url):
    body = {"messages": HELLO, "max_tokens": 2, "user": "me", "metadata": {"a": "b"}, "tools": None, "n": None,
            "response_format": {"type": "text"}, "parallel_tool_calls": True}  # fmt: skip
    assert httpx.post(url + CHAT, json=body).status_code == 200


def test_while_the_model_loads():
    with serving(None) as url:
        for path in ("/health", "/v1/models"):
            response = httpx.get(url + path)
            check_shape(response, 503)
            assert response.headers["retry-after"] == "1"
        check_shape(httpx.post(url + CHAT, json={"messages": HELLO}), 503)
        assert httpx.get(url + "/").status_code == 200


def test_an_engine_that_fails_is_a_500_with_an_id_and_goes_on():
    with gated_llm(wrap=Broken) as (llm, gate), serving(llm) as url:
        gate.open()
        assert httpx.post(url + COMPLETIONS, json={"prompt": "a"}).status_code == 200
        gate.inner.failures = 1
        response = httpx.post(url + COMPLETIONS, json={"prompt": "a"})
        check_shape(response, 500)
        assert "secret" not in response.text
        wait_until(lambda: llm.stats().restarts == 1)  # what it tries then must not take the next failure
        gate.inner.failures = 1
        with httpx.stream("POST", url + COMPLETIONS, json={"prompt": "a", "stream": True}) as stream:
            stream.read()
            assert stream.status_code == 500
        assert httpx.post(url + COMPLETIONS, json={"prompt": "a"}).status_code == 200


def test_an_engine_that_cannot_go_on_is_a_503():
    with gated_llm(wrap=Broken) as (llm, gate), serving(llm) as url:
        gate.open()
        gate.inner.failures = 1000
        check_shape(httpx.post(url + COMPLETIONS, json={"prompt": "a"}), 500)
        wait_until(lambda: not llm.is_running)
        check_shape(httpx.post(url + COMPLETIONS, json={"prompt": "a"}), 503)
        check_shape(httpx.get(url + "/health"), 503)


def test_a_failure_in_the_middle_of_a_stream_is_told_in_the_stream():
    body = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with gated_llm(wrap=Broken) as (llm, gate), serving(llm) as url, posted(url, COMPLETIONS, body) as connection:
        gate.stand_in_step(3)
        gate.inner.failures = 1
        gate.open()
        response = connection.getresponse()
        assert response.status == 200
        lines = [line for line in response.read().decode().splitlines() if line]
    assert json.loads(lines[0][6:])["choices"]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2][6:])["error"]["type"] == "server_error"


def test_a_full_queue_is_429_with_retry_after():
    body = {"prompt": "a", "max_tokens": 5, "ignore_eos": True}
    with gated_llm(max_num_seqs=1, max_num_queued_requests=1) as (llm, gate), serving(llm) as url:
        with posted(url, COMPLETIONS, body) as running:
            gate.stand_in_step(2)
            with posted(url, COMPLETIONS, body) as queued:
                wait_until(lambda: llm.stats().queued == 1)
                for refused in (body, {**body, "stream": True}):
                    response = httpx.post(url + COMPLETIONS, json=refused)
                    check_shape(response, 429)
                    assert response.headers["retry-after"] == "1"
                gate.open()
                assert queued.getresponse().status == 200
            assert running.getresponse().status == 200
        assert httpx.post(url + COMPLETIONS, json=body).status_code == 200


def test_a_full_queue_is_told_before_the_body_is_waited_for():
    body = {"prompt": "a", "max_tokens": 5, "ignore_eos": True}
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
    with (
        gated_llm(max_num_seqs=1, max_num_queued_requests=1) as (llm, gate),
        serving(llm) as url,
        posted(url, COMPLETIONS, body),
    ):
        gate.stand_in_step(2)
        with posted(url, COMPLETIONS, body):
            wait_until(lambda: llm.stats().queued == 1)
            before = llm.stats().rejections["queued_requests"]
            host, port = url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
                connection.sendall(head.encode())
                assert connection.recv(100).startswith(b"HTTP/1.1 429 ")
            assert llm.stats().rejections["queued_requests"] == before + 1
            gate.open()


def test_prompts_that_do_not_all_fit_the_queue_leave_nothing_behind():
    body = {"prompt": ["a"] * 30, "max_tokens": 50, "ignore_eos": True}
    ended = threading.Semaphore(0)
    with gated_llm(max_num_seqs=1, max_num_queued_requests=1) as (llm, gate), serving(llm, ended) as url:
        check_shape(httpx.post(url + COMPLETIONS, json=body), 429)
        assert ended.acquire(timeout=PATIENCE)
        gate.open()
        wait_until(lambda: llm.stats().free_blocks == llm.stats().num_blocks and llm.stats().waiting == 0)
        assert httpx.post(url + COMPLETIONS, json={**body, "prompt": "a"}).status_code == 200
