"""Tokenize, detokenize and counting: what an answer's prompt would be, without an answer."""

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_bad_requests import check_shape

MESSAGES = [{"role": "user", "content": "Hello!"}]


def post(url, path, **body):
    return httpx.post(url + path, json=body)


def tokenize(url, **body):
    response = post(url, "/tokenize", **body)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_text(url, llm):
    answer = tokenize(url, prompt="müde", add_special_tokens=False)
    assert answer == {
        "count": 5, "max_model_len": llm.max_model_len, "tokens": list("müde".encode()), "token_strs": None,
    }  # fmt: skip
    assert tokenize(url, prompt="a")["tokens"] == llm.tokenizer.encode("a", add_special_tokens=True)


def test_the_tokens_as_text(url):
    assert tokenize(url, prompt="abc", add_special_tokens=False, return_token_strs=True)["token_strs"] == list("abc")


def test_a_conversation_has_the_tokens_that_an_answer_begins_with(url, client, llm):
    answer = tokenize(url, messages=MESSAGES)
    assert answer["tokens"] == llm.tokenizer.encode_chat(MESSAGES, add_generation_prompt=True)
    chat = client.chat.completions.create(model="served", messages=MESSAGES, max_tokens=1)
    assert chat.usage.prompt_tokens == answer["count"]
    counted = post(url, "/v1/chat/completions/input_tokens", messages=MESSAGES, max_tokens=1).json()
    assert counted == {"object": "response.input_tokens", "input_tokens": answer["count"]}
    assert tokenize(url, messages=MESSAGES, add_generation_prompt=False)["count"] < answer["count"]


def test_nothing_is_generated(url, llm):
    before = llm.stats()
    tokenize(url, prompt="x" * 100)
    post(url, "/v1/chat/completions/input_tokens", messages=MESSAGES)
    assert llm.stats().steps == before.steps


@given(st.text(max_size=60))
def test_there_and_back(url, text):
    text = text.encode("utf-8", "ignore").decode()
    ids = tokenize(url, prompt=text, add_special_tokens=False)["tokens"]
    assert post(url, "/detokenize", tokens=ids).json() == {"prompt": text}


def test_special_tokens_are_spelt_out(url, llm):
    assert post(url, "/detokenize", tokens=[256, 97]).json()["prompt"] == llm.tokenizer.token_text(256) + "a"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": [{}]}, "tools"),
        ("/tokenize", {"prompt": "a", "stream": True}, "stream"),
        ("/tokenize", {"prompt": "x" * 100_000}, "prompt"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": [{"role": "user", "content": 4}]}, "messages[0].content"),
        ("/tokenize", {"messages": MESSAGES, "add_generation_prompt": True, "continue_final_message": True},
         "add_generation_prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
        ("/detokenize", {"tokens": [1, True]}, "tokens"),
        ("/detokenize", {"tokens": [99999]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/v1/chat/completions/input_tokens", {"messages": []}, "messages"),
        ("/v1/chat/completions/input_tokens", {"messages": MESSAGES, "min_tokens": -1}, "min_tokens"),
        ("/v1/chat/completions/input_tokens", {"messages": MESSAGES, "priority": 2**31}, "priority"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(url, path, body, param):
    response = post(url, path, **body)
    check_shape(response, 400)
    assert response.json()["error"]["param"] == param


def test_the_model_is_named_as_everywhere(client, url):
    check_shape(post(url, "/tokenize", prompt="a", model="other"), 404)
    with pytest.raises(openai.NotFoundError):
        client.post("/chat/completions/input_tokens", body={"model": "other", "messages": MESSAGES}, cast_to=object)
