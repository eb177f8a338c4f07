"""Over HTTP: whose logits are NaN gets an error of its own, in streams too, and all others get their answers."""

import asyncio
import json
import logging
from concurrent.futures import ThreadPoolExecutor

import anthropic
import httpx
import openai
import pytest
from broken_numbers import BAD, poisoned_model
from live_server import serving
from tiny_engine import tiny_engine

from kvarn.engine import AsyncLLM

COMPLETIONS = "/v1/completions"
WORSE = {"logit_bias": {str(BAD): 100}}
"""Says the token that the model has no numbers for, and so fails at its second."""


@pytest.fixture(scope="module")
def served():
    """An engine over a poisoned model, and its server's URL."""
    engine = tiny_engine(model=poisoned_model(), backend="cpu", dtype="float16", max_num_seqs=16, num_blocks=256)
    llm = AsyncLLM(engine)
    with serving(llm) as url:
        yield llm, url
    asyncio.run(llm.close())


def complete(url, **fields):
    body = {"prompt": "Hello", "max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}
    return httpx.post(url + COMPLETIONS, json=body, timeout=60)


def check_error(error):
    assert (error["type"], error["code"], error["param"]) == ("server_error", "engine_error", None)
    assert "NaN or infinity" in error["message"]
    assert "error id" in error["message"]


def test_others_get_the_answers_that_they_get_alone(served, caplog):
    llm, url = served
    good = [{"prompt": text, "seed": 1, "temperature": 1.0, "logit_bias": {str(BAD): -100}} for text in ("Hello", "x")]
    alone = [complete(url, **each).json()["choices"] for each in good]
    bad = [
        {"prompt": [72, 101, BAD]},
        {"prompt": ["Hello", "Hello\0"]},
        WORSE,
        {**WORSE, "n": 3, "temperature": 1.0},
        {"prompt": [BAD, 72, 101]},
        {"prompt": [72, BAD, 101], "echo": True, "logprobs": 1},
    ]
    before = llm.stats()
    with ThreadPoolExecutor(12) as clients, caplog.at_level(logging.ERROR, "kvarn.engine"):
        asked = [each for group in zip(bad, good * 3, strict=False) for each in group]
        answers = list(clients.map(lambda fields: complete(url, **fields), asked))
    for fields, answer in zip(asked, answers, strict=True):
        if fields in bad:
            assert answer.status_code == 500
            error = answer.json()["error"]
            check_error(error)
            number = error["message"].split("error id ")[1].rstrip(")")
            assert number in caplog.text, "what is told is found in the log"
        else:
            assert answer.json()["choices"] == alone[good.index(fields)]
    stats = llm.stats()
    assert stats.ended["error"] - before.ended["error"] == 1 + 1 + 1 + 3 + 1 + 1
    assert (stats.failed_steps, stats.restarts) == (0, 0)
    assert stats.free_blocks == stats.num_blocks
    assert httpx.get(url + "/health/ready").status_code == 200


def test_in_a_stream_it_comes_after_the_tokens_before(served):
    _, url = served
    events = [line[6:] for line in complete(url, **WORSE, stream=True).text.splitlines() if line]
    *tokens, error, done = events
    assert done == "[DONE]"
    assert [json.loads(token)["choices"][0]["text"] for token in tokens] == ["\0"]
    check_error(json.loads(error)["error"])


def test_clients_raise_what_they_raise_for_a_server_s_fault(served):
    _, url = served
    given = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError, match="NaN or infinity"):
            client.chat.completions.create(**given, logit_bias={str(BAD): 100})
        with pytest.raises(openai.InternalServerError, match="NaN or infinity"):
            client.embeddings.create(model="tiny", input=[72, BAD])
        with pytest.raises(openai.APIError, match="NaN or infinity"):
            list(client.chat.completions.create(**given, logit_bias={str(BAD): 100}, stream=True))
    given["messages"][0]["content"] = "Hello\0"
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as claude:
        with pytest.raises(anthropic.InternalServerError, match="NaN or infinity"):
            claude.messages.create(**given)
        with pytest.raises(anthropic.APIError, match="NaN or infinity"):
            list(claude.messages.create(**given, stream=True))
