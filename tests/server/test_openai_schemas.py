"""Answers are what OpenAI's own description of its API says of them (shared/data/openai_openapi)."""

import json

import httpx
import jsonschema
import pytest
from test_tools import HERMES_TEMPLATE, TOOLS, server

HELLO = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def described(test_data):
    return json.loads((test_data / "openai_openapi" / "openapi.json").read_text())


@pytest.fixture(scope="module")
def tools_url():
    import asyncio

    from live_server import serving

    llm = server(HERMES_TEMPLATE)
    with serving(llm) as url:
        yield url
    asyncio.run(llm.close())


def check(described, name, value):
    schema = {"$ref": f"#/components/schemas/{name}", "components": described["components"]}
    jsonschema.Draft202012Validator(schema).validate(value)


def post(url, path, **body):
    response = httpx.post(url + path, json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def events(url, path, **body):
    with httpx.stream("POST", url + path, json={**body, "stream": True}, timeout=60) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


CHATS = [
    {},
    {"n": 2, "logprobs": True, "top_logprobs": 2},
    {"stop": "e"},
    {"response_format": {"type": "json_object"}},
]


@pytest.mark.parametrize("options", CHATS)
def test_chat(described, url, options):
    asked = {"messages": HELLO, "max_tokens": 8, **options}
    check(described, "CreateChatCompletionResponse", post(url, "/v1/chat/completions", **asked))
    usage = {"stream_options": {"include_usage": True}}
    for chunk in events(url, "/v1/chat/completions", **asked, **usage):
        check(described, "CreateChatCompletionStreamResponse", chunk)


def test_chat_with_calls(described, tools_url):
    asked = {"messages": HELLO, "max_tokens": 200, "tools": TOOLS, "tool_choice": "required", "temperature": 0}
    answer = post(tools_url, "/v1/chat/completions", **asked)
    assert answer["choices"][0]["message"]["tool_calls"]
    check(described, "CreateChatCompletionResponse", answer)
    for chunk in events(tools_url, "/v1/chat/completions", **asked):
        check(described, "CreateChatCompletionStreamResponse", chunk)


@pytest.mark.parametrize("options", [{}, {"logprobs": 2}, {"echo": True, "n": 2}])
def test_completions(described, url, options):
    asked = {"prompt": "once", "max_tokens": 8, **options}
    check(described, "CreateCompletionResponse", post(url, "/v1/completions", **asked))
    for chunk in events(url, "/v1/completions", **asked):
        check(described, "CreateCompletionResponse", chunk)


def test_embeddings_and_models(described, url):
    check(described, "CreateEmbeddingResponse", post(url, "/v1/embeddings", input=["a", "b"]))
    check(described, "ListModelsResponse", httpx.get(f"{url}/v1/models").json())
    check(described, "Model", httpx.get(f"{url}/v1/models/served").json())


def test_responses(described, url, tools_url):
    asked = {"input": "Hello!", "max_output_tokens": 8}
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
    called = {"input": "Hello!", "max_output_tokens": 200, "tools": tools, "tool_choice": "required"}
    for base, body in ((url, asked), (tools_url, called)):
        check(described, "Response", post(base, "/v1/responses", **body))
        for event in events(base, "/v1/responses", **body):
            check(described, "ResponseStreamEvent", event)


def test_errors(described, url):
    answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": HELLO, "n": 0}).json()
    check(described, "ErrorResponse", answer)
