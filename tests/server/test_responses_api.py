"""The `openai` client's responses, whole and streamed: stateless, with calls of tools and schemas."""

import asyncio
import json

import httpx
import jsonschema
import openai
import pytest
from gated_engine import Broken, gated_llm
from live_server import posted, serving
from test_bad_requests import check_shape
from test_tools import HERMES_TEMPLATE, SCHEMAS, TOOLS, server

FUNCTIONS = [{"type": "function", **tool["function"]} for tool in TOOLS]


@pytest.fixture(scope="module")
def tooled():
    llm = server(HERMES_TEMPLATE)
    with serving(llm) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client
    asyncio.run(llm.close())


def ask(client, given="Hello!", **options):
    values = {"model": "tiny", "input": given, "temperature": 0, "max_output_tokens": 16, "store": False, **options}
    return client.responses.create(**values)


def told(response):
    """The output without ids, which are new each time."""
    return [{k: v for k, v in item.model_dump().items() if k not in ("id", "call_id")} for item in response.output]


def test_a_text(client):
    response = ask(client)
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello!"}], max_tokens=16, temperature=0
    )
    assert response.output_text == chat.choices[0].message.content
    assert (response.object, response.model, response.id[:5]) == ("response", "tiny", "resp_")
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert (response.usage.output_tokens, response.usage.total_tokens) == (16, 16 + chat.usage.prompt_tokens)
    assert response.output[0].status == "incomplete"


def test_what_was_asked_comes_back(client):
    response = ask(client, instructions="Be brief.", metadata={"a": "b"}, top_p=0.5)
    assert (response.instructions, response.metadata, response.top_p) == ("Be brief.", {"a": "b"}, 0.5)
    assert (response.temperature, response.max_output_tokens, response.previous_response_id) == (0, 16, None)


def test_a_stream_says_the_same(client):
    whole = ask(client)
    events = list(ask(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    last = events[-1].response
    assert told(last) == told(whole)
    assert last.usage.output_tokens == 16
    assert events[0].response.id == last.id


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_those_of_a_chat(client, stream):
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello!"}], max_tokens=16, temperature=0, logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    wanted = [entry.model_dump() for entry in chat.choices[0].logprobs.content]
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    if stream:
        events = list(ask(client, stream=True, **options))
        response = events[-1].response
        deltas = [entry for e in events if e.type == "response.output_text.delta" for entry in e.logprobs]
        assert [(e.token, e.logprob) for e in deltas] == [(w["token"], w["logprob"]) for w in wanted[: len(deltas)]]
    else:
        response = ask(client, **options)
    assert [entry.model_dump() for entry in response.output[0].content[0].logprobs] == wanted
    assert response.top_logprobs == 2
    assert ask(client).output[0].content[0].logprobs == []


def test_the_clients_own_reading_of_a_stream(client):
    with client.responses.stream(model="tiny", input="Hello!", temperature=0, max_output_tokens=16) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == ask(client).output_text


def test_items_are_a_conversation(client):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Hello!"},
    ]
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"role": "user", "content": "Hi"},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "output_text", "text": "Ho", "annotations": []}]},
        {"role": "user", "content": [{"type": "input_text", "text": "Hello!"}]},
    ]  # fmt: skip
    expected = client.chat.completions.create(model="tiny", messages=chat, max_tokens=16, temperature=0)
    assert ask(client, items).output_text == expected.choices[0].message.content
    assert ask(client, items[1:], instructions="Be brief.").output_text == expected.choices[0].message.content


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_call_is_valid_and_streams_to_the_same(tooled, choice):
    options = {"tools": FUNCTIONS, "tool_choice": choice, "parallel_tool_calls": False, "max_output_tokens": 200}
    response = ask(tooled, **options)
    assert response.status == "completed"
    (call,) = response.output
    assert call.type == "function_call"
    jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    events = list(ask(tooled, **options, stream=True))
    assert told(events[-1].response) == told(response)
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == call.arguments
    (done,) = (event for event in events if event.type == "response.function_call_arguments.done")
    assert (done.arguments, done.name) == (call.arguments, call.name)


def test_calls_and_their_results_go_back_in(tooled):
    response = ask(tooled, tools=FUNCTIONS, tool_choice="required", parallel_tool_calls=False, max_output_tokens=200)
    items = [{"role": "user", "content": "Hello!"}, *(item.model_dump(exclude_none=True) for item in response.output)]
    items.append({"type": "function_call_output", "call_id": response.output[0].call_id, "output": "Rain."})
    after, before = (ask(tooled, given, tools=FUNCTIONS).usage.input_tokens for given in (items, items[:1]))
    assert after > before


def test_the_answer_follows_a_schema(client):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"format": {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}}
    response = ask(client, text=form, max_output_tokens=100)
    assert response.status == "completed"
    jsonschema.validate(json.loads(response.output_text), schema)


BAD = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": [], "instructions": "Be brief."}, "input"),
    ({"input": "", "instructions": "Be brief."}, "input"),
    ({"input": 5}, "input"),
    ({"input": [5]}, "input"),
    ({"input": "x" * 10_000}, "input"),
    ({"input": [{"role": "robot", "content": "hi"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]},
     "input[0].content[0].type"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"type": "function_call", "name": "x", "arguments": "{}"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "x"}]}, "input[0].output"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"store": True}, "store"),
    ({"background": True}, "background"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"include": ["file_search_call.results"]}, "include"),
    ({"top_logprobs": 50}, "top_logprobs"),
    ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
    ({"input": [{"type": "reasoning", "summary": [], "content": [{"type": "text", "text": "x"}]}]},
     "input[0].content[0].type"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 10**9}, "max_output_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"tempature": 1}, "tempature"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_what_is_wrong_is_named(url, case):
    wrong, param = BAD[case]
    response = httpx.post(f"{url}/v1/responses", json={"input": "hi", "max_output_tokens": 5, **wrong})
    check_shape(response, 400)
    assert response.json()["error"]["param"] == param


def test_a_stream_that_fails_says_so_and_ends():
    body = {"input": "a", "max_output_tokens": 400, "stream": True}
    with gated_llm(wrap=Broken) as (llm, gate), serving(llm) as url, posted(url, "/v1/responses", body) as connection:
        gate.stand_in_step(3)
        gate.inner.failures = 1
        gate.open()
        response = connection.getresponse()
        assert response.status == 200
        last = json.loads(response.read().decode().strip().split("\n\n")[-1].split("data: ")[1])
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == "server_error"
