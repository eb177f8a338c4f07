"""The real `anthropic` client gets what Anthropic's API promises, whole and streaming."""

import asyncio
import json

import anthropic
import httpx
import jsonschema
import pytest
from gated_engine import gated_llm
from live_server import serving, wait_until
from test_tools import HERMES_TEMPLATE, LLAMA_TEMPLATE, SCHEMAS, UNKNOWN_TEMPLATE, server

HELLO = [{"role": "user", "content": "Hello!"}]
GREEDY = {"temperature": 0}
CUSTOM = [{"name": name, "description": "A tool.", "input_schema": schema} for name, schema in SCHEMAS.items()]
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}


def client_of(url, **options):
    return anthropic.Anthropic(base_url=url, max_retries=0, timeout=60, **{"api_key": "none", **options})


@pytest.fixture(scope="module")
def claude(url):
    """A client of the tiny model that all tests share."""
    with client_of(url) as made:
        yield made


@pytest.fixture(scope="module", params=[HERMES_TEMPLATE, LLAMA_TEMPLATE], ids=["hermes", "llama"])
def tooled(request):
    """A client of a model that calls tools in one of the forms."""
    llm = server(request.param)
    with serving(llm) as base, client_of(base) as made:
        made.several = request.param is HERMES_TEMPLATE
        yield made
    asyncio.run(llm.close())


def ask(client, *, sampling=None, **options):
    given = {"model": "tiny", "messages": HELLO, "max_tokens": 12, **options}
    return client.messages.create(**given, extra_body=GREEDY if sampling is None else sampling)


def streamed(client, *, sampling=None, **options):
    """The whole message that the client puts together of a stream, and the types of its events."""
    given = {"model": "tiny", "messages": HELLO, "max_tokens": 12, **options}
    with client.messages.stream(**given, extra_body=GREEDY if sampling is None else sampling) as stream:
        kinds = [event.type for event in stream]
        return stream.get_final_message(), kinds


def content(message):
    """Without ids, which are new each time."""
    return [{k: v for k, v in block.model_dump().items() if k != "id"} for block in message.content]


def test_a_whole_message(claude, client):
    message = ask(claude)
    assert (message.type, message.role, message.model) == ("message", "assistant", "tiny")
    assert message.id.startswith("msg_")
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    chat = client.chat.completions.create(model="served", messages=HELLO, max_tokens=12, temperature=0)
    assert [(b.type, b.text) for b in message.content] == [("text", chat.choices[0].message.content)]
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == chat.usage.prompt_tokens
    assert usage.output_tokens == chat.usage.completion_tokens


def test_a_stream_says_the_same(claude):
    whole = ask(claude)
    message, kinds = streamed(claude)
    assert content(message) == content(whole)
    assert message.stop_reason == whole.stop_reason
    assert message.usage.output_tokens == 12
    raw = [kind for kind in kinds if kind not in ("text", "input_json")]
    begin, end = ["message_start", "content_block_start"], ["content_block_stop", "message_delta", "message_stop"]
    assert raw == [*begin, *["content_block_delta"] * (len(raw) - 5), *end]


def test_the_events_are_named_and_none_is_done(url):
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{url}/v1/messages", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().strip().split("\n\n")
    for event in events:
        name, data = event.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"
    assert events[-1].startswith("event: message_stop")


def test_stop_sequences(claude):
    text = ask(claude, max_tokens=40).content[0].text
    stop = text[10:13]
    for message in (
        ask(claude, max_tokens=40, stop_sequences=["never said", stop]),
        streamed(claude, max_tokens=40, stop_sequences=["never said", stop])[0],
    ):
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
        assert message.content[0].text == text[: text.index(stop)]


def test_system_prompts_in_each_form(claude, client):
    chat = [{"role": "system", "content": "Be brief."}, *HELLO]
    expected = client.chat.completions.create(model="served", messages=chat, max_tokens=12, temperature=0)
    blocks = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    for options in ({"system": "Be brief."}, {"system": blocks}, {"messages": chat}):
        assert ask(claude, **options).content[0].text == expected.choices[0].message.content


def test_an_assistants_words_are_continued(claude, client):
    messages = [*HELLO, {"role": "assistant", "content": "Well, "}]
    expected = client.chat.completions.create(
        model="served", messages=messages, max_tokens=12, temperature=0,
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )  # fmt: skip
    assert ask(claude, messages=messages).content[0].text == expected.choices[0].message.content


def test_counting_tokens(claude):
    count = claude.messages.count_tokens(model="tiny", messages=HELLO, system="Be brief.").input_tokens
    usage = ask(claude, system="Be brief.", max_tokens=1).usage
    assert count == usage.input_tokens + usage.cache_read_input_tokens
    assert claude.messages.count_tokens(model="tiny", messages=HELLO).input_tokens < count


@pytest.mark.parametrize("choice", ["any", "weather"])
def test_a_call_is_valid(tooled, choice):
    choice = {"type": "any"} if choice == "any" else {"type": "tool", "name": choice}
    options = {"tools": CUSTOM, "tool_choice": {**choice, "disable_parallel_tool_use": True}, "max_tokens": 200}
    message = ask(tooled, **options, sampling={"temperature": 0})
    assert message.stop_reason == "tool_use"
    (block,) = message.content
    assert block.type == "tool_use" and block.id.startswith("toolu_")
    jsonschema.validate(block.input, SCHEMAS[block.name])
    again, kinds = streamed(tooled, **options, sampling={"temperature": 0})
    assert content(again) == content(message)
    assert again.stop_reason == "tool_use"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 1


def test_text_and_several_calls_are_blocks_in_order(tooled):
    options = {"tools": CUSTOM, "max_tokens": 400, "sampling": {"temperature": 1}}
    kinds = set()
    for _ in range(4):
        message, events = streamed(tooled, **options)
        assert events.count("content_block_start") == events.count("content_block_stop") == len(message.content)
        kinds |= {block.type for block in message.content}
        assert message.stop_reason in ("tool_use", "max_tokens", "end_turn")
    assert kinds <= {"text", "tool_use"} and kinds


def test_a_call_that_is_cut_short_is_none(tooled):
    options = {"tools": CUSTOM, "tool_choice": {"type": "tool", "name": "weather"}, "max_tokens": 30}
    message = ask(tooled, **options)
    assert (message.content, message.stop_reason) == ([], "max_tokens")


def test_a_conversation_with_results_of_tools(tooled):
    use = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo", "days": [1]}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "Rain."}]}
    messages = [
        *HELLO,
        {"role": "assistant", "content": [{"type": "text", "text": "I look."}, use]},
        {"role": "user", "content": [result, {"type": "text", "text": "And now?"}]},
    ]
    assert ask(tooled, messages=messages, tools=CUSTOM, max_tokens=5).usage.output_tokens == 5
    counted = [
        tooled.messages.count_tokens(model="tiny", messages=messages[:n], tools=CUSTOM).input_tokens for n in (1, 3)
    ]
    assert counted[0] < counted[1]


def test_the_answer_follows_a_schema(claude):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    message = ask(claude, max_tokens=100, output_config={"format": {"type": "json_schema", "schema": schema}})
    jsonschema.validate(json.loads(message.content[0].text), schema)
    assert message.stop_reason == "end_turn"


def test_parameters_that_cannot_change_the_answer_are_taken(claude):
    same = ask(claude, metadata={"user_id": "me"}, service_tier="auto", thinking={"type": "disabled"})
    assert content(same) == content(ask(claude))


def user(*blocks):
    return {"messages": [{"role": "user", "content": list(blocks)}]}


BAD = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "hi", "name": "me"}]}, "messages[0].name"),
    (user(IMAGE), "messages[0].content[0].type"),
    (user("hi"), "messages[0].content[0]"),
    (user({"type": "text"}), "messages[0].content[0].text"),
    (user({"type": "text", "text": "hi", "colour": 1}), "messages[0].content[0].colour"),
    (user({"type": "tool_result", "content": "x"}), "messages[0].content[0].tool_use_id"),
    (user({"type": "tool_result", "tool_use_id": "x", "content": [IMAGE]}), "messages[0].content[0].content[0].type"),
    (user({"type": "tool_use", "id": "x", "name": "y", "input": {}}), "messages[0].content[0].type"),
    ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "y"}]}]},
     "messages[0].content[0].input"),
    ({"system": 5}, "system"),
    ({"system": [IMAGE]}, "system[0].type"),
    ({"temperature": -1}, "temperature"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"stop_sequences": ["x"] * 100}, "stop_sequences"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"name": "x"}]}, "tools[0].input_schema"),
    ({"tools": [{"name": "a b", "input_schema": {"type": "object"}}]}, "tools[0].name"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
    ({"output_config": {"effort": "high"}}, "output_config.effort"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "object", "not": {}}}}}, None),
    ({"mcp_servers": [{"url": "http://x"}]}, "mcp_servers"),
    ({"tempature": 1}, "tempature"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_what_is_wrong_is_named(claude, case):
    wrong, name = BAD[case]
    given = {"model": "tiny", "messages": HELLO, "max_tokens": 5, **wrong}
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.post("/v1/messages", body=given, cast_to=object)
    assert set(caught.value.body) == {"type", "error", "request_id"}
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert name is None or name in caught.value.body["error"]["message"]


def test_tools_without_a_template_for_them():
    llm = server(UNKNOWN_TEMPLATE)
    with serving(llm) as base, client_of(base) as made, pytest.raises(anthropic.BadRequestError, match="template"):
        ask(made, tools=CUSTOM)
    asyncio.run(llm.close())


def test_statuses_are_the_clients_exceptions(claude, url, llm):
    with pytest.raises(anthropic.NotFoundError, match="not served here") as caught:
        ask(claude, model="claude-opus-4")
    assert caught.value.body["error"]["type"] == "not_found_error"
    assert httpx.get(f"{url}/v1/messages").json()["type"] == "error", "405, too, in Anthropic's form"
    with serving(None) as loading, client_of(loading) as made, pytest.raises(anthropic.APIStatusError) as caught:
        ask(made)
    assert (caught.value.status_code, caught.value.body["error"]["type"]) == (503, "overloaded_error")
    with serving(llm, api_keys=("secret",)) as guarded:
        for options in ({"api_key": "secret"}, {"api_key": None, "auth_token": "secret"}):
            with client_of(guarded, **options) as made:
                assert ask(made).usage.output_tokens == 12
        with client_of(guarded, api_key="wrong") as made, pytest.raises(anthropic.AuthenticationError) as caught:
            ask(made)
        assert caught.value.body["error"]["type"] == "authentication_error"


def test_a_client_that_leaves_a_stream_is_forgotten():
    with gated_llm() as (slow, gate), serving(slow) as base, client_of(base) as made:
        gate.open()
        with made.messages.stream(model="handmade", messages=HELLO, max_tokens=400) as stream:
            next(iter(stream))
        wait_until(lambda: slow.stats().running == 0 and slow.stats().free_blocks == slow.stats().num_blocks)
