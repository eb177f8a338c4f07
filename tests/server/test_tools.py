"""Calls of tools are valid by construction, whole and streamed, in the forms of the models' families."""

import asyncio
import json

import httpx
import jsonschema
import openai
import pytest
from live_server import serving

from kvarn.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculativeConfig
from kvarn.engine import AsyncLLM, build_engine
from kvarn.server.tools import CallDelta, CallReader
from kvarn.server.tools.formats import HERMES, LLAMA3, call_text
from kvarn.testing import MemoryFiles, byte_vocabulary, tiny_model
from kvarn.text import load_tokenizer

MARK = 259
"""A token that is spelt <tool_call>, as Qwen has one: all else is bytes."""
HERMES_TEMPLATE = (
    "{% if tools %}Call one as <tool_call>\n…\n</tool_call>:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n"
    "{% endif %}{% for message in messages %}{{ message.role }}: {{ message.content }}{% if message.tool_calls %}"
    "{% for call in message.tool_calls %}<tool_call>{{ call.function.arguments | tojson }}</tool_call>{% endfor %}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
LLAMA_TEMPLATE = HERMES_TEMPLATE.replace("<tool_call>", '<|start_header_id|>"parameters"').replace("</tool_call>", "")
UNKNOWN_TEMPLATE = HERMES_TEMPLATE.replace("<tool_call>", "<call>")
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Umeå", "Oslo"]}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 6}, "maxItems": 2}},
}
BRACE = {"at": {"enum": ["}", "{"]}}
PLACE = {"type": "object", "properties": BRACE, "required": ["at"], "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "place", "parameters": PLACE}},
    {"type": "function", "function": {"name": "now"}},
]
SCHEMAS = {"weather": WEATHER, "place": PLACE, "now": {"type": "object", "maxProperties": 0}}
MESSAGES = [{"role": "user", "content": "What is the weather?"}]


def server(template, **settings):
    config = EngineConfig(
        threads=1, cache=CacheConfig(num_blocks=256), scheduler=SchedulerConfig(16, 128),
        speculative=SpeculativeConfig(k=6), **settings,
    )  # fmt: skip
    vocabulary = byte_vocabulary(260, template)
    vocabulary["tokenizer.ggml.tokens"][MARK], vocabulary["tokenizer.ggml.token_type"][MARK] = "<tool_call>", 4
    model = tiny_model(max_position_embeddings=2048, vocab_size=260)
    return AsyncLLM(build_engine(model, load_tokenizer(MemoryFiles(vocabulary)), config, name="tiny"))


@pytest.fixture(scope="module", params=[HERMES_TEMPLATE, LLAMA_TEMPLATE], ids=["hermes", "llama"])
def tooled(request):
    """A client of a model that calls tools in one of the forms."""
    llm = server(request.param)
    with serving(llm) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        client.several = request.param is HERMES_TEMPLATE
        yield client
    asyncio.run(llm.close())


def ask(client, **options):
    given = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 200, "seed": 1, **options}
    return client.chat.completions.create(**given)


def gathered(chunks, n=1):
    """What the deltas of a stream add up to, by choice: content, calls and the last finish reason."""
    content, calls, reasons = [""] * n, [[] for _ in range(n)], [None] * n
    for chunk in chunks:
        for choice in chunk.choices:
            content[choice.index] += choice.delta.content or ""
            for piece in choice.delta.tool_calls or ():
                mine = calls[choice.index]
                if piece.id:
                    assert piece.index == len(mine)
                    mine.append([piece.function.name, ""])
                mine[piece.index][1] += piece.function.arguments or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    return content, calls, reasons


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_calls_follow_their_schemas_and_deltas_add_up_to_them(tooled, choice):
    options = {"tool_choice": choice, "n": 8}
    answer = ask(tooled, **options)
    names = set()
    for one in answer.choices:
        assert one.finish_reason in ("tool_calls", "length")
        assert one.message.content is None
        calls = one.message.tool_calls if one.finish_reason == "tool_calls" else one.message.tool_calls[:-1]
        for call in calls:
            jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
            names.add(call.function.name)
        assert len({call.id for call in one.message.tool_calls}) == len(one.message.tool_calls)
    assert any(one.finish_reason == "tool_calls" for one in answer.choices)
    assert names <= ({"weather"} if choice != "required" else set(SCHEMAS))
    content, calls, reasons = gathered(ask(tooled, stream=True, **options), 8)
    assert content == [""] * 8
    for one, streamed, reason in zip(answer.choices, calls, reasons, strict=True):
        assert [[c.function.name, c.function.arguments] for c in one.message.tool_calls] == streamed
        assert one.finish_reason == reason


def test_one_call_where_one_is_asked_for(tooled):
    several = ask(tooled, tool_choice="required", n=8, seed=3)
    if tooled.several:
        assert any(len(one.message.tool_calls) > 1 for one in several.choices)
    single = ask(tooled, tool_choice="required", n=8, seed=3, parallel_tool_calls=False)
    assert {len(one.message.tool_calls) for one in single.choices} == {1}


def test_auto_calls_or_talks(tooled):
    bias = {str(MARK if tooled.several else ord("{")): 4}
    answer = ask(tooled, n=16, logit_bias=bias, max_tokens=300)
    content, calls, reasons = gathered(ask(tooled, n=16, logit_bias=bias, max_tokens=300, stream=True), 16)
    for one, text, streamed, reason in zip(answer.choices, content, calls, reasons, strict=True):
        assert (one.message.content or "") == text
        assert [[c.function.name, c.function.arguments] for c in one.message.tool_calls or ()] == streamed
        assert one.finish_reason == reason
        whole = streamed if reason == "tool_calls" else streamed[:-1]
        for name, arguments in whole:
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    assert any(calls)
    assert any(content)
    plain = ask(tooled, tool_choice="none", temperature=0, max_tokens=20)
    assert plain.choices[0].message.tool_calls is None
    free = tooled.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=20)
    assert plain.choices[0].message.content == free.choices[0].message.content


def test_the_model_is_told_of_the_tools_and_of_its_calls(tooled):
    call = {"id": "call_1", "type": "function", "function": {"name": "place", "arguments": '{"at": "{"}'}}
    talk = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "here"}]  # fmt: skip
    told = ask(tooled, max_tokens=1).usage.prompt_tokens
    untold = ask(tooled, max_tokens=1, tools=openai.NOT_GIVEN).usage.prompt_tokens
    assert told > untold + 300
    assert ask(tooled, max_tokens=1, messages=talk).usage.prompt_tokens > told + 20


FUNCTION = TOOLS[1]["function"]
REFUSED = {
    "keyword": ({"tools": [{"type": "function", "function": {**FUNCTION, "parameters": {"if": {}}}}]}, "tools", '"if"'),
    "meaning": ({"tools": [{"type": "function", "function": {"name": "x", "parameters": {"minProperties": 5}}}]},
                "tools", "minProperties"),
    "no name": ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "1 to 64"),
    "kind": ({"tools": [{"type": "web"}]}, "tools[0].type", "function"),
    "twice": ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].function.name", "twice"),
    "schema": ({"tools": [{"type": "function", "function": {"name": "x", "parameters": []}}]},
               "tools[0].function.parameters", "JSON schema"),
    "choice": ({"tool_choice": "maybe"}, "tool_choice", "none, auto, required"),
    "other": ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "none of the tools"),
    "no tools": ({"tools": [], "tool_choice": "required"}, "tool_choice", "needs tools"),
    "format": ({"response_format": {"type": "json_object"}}, "tools", "another form"),
    "ignore_eos": ({"ignore_eos": True}, "ignore_eos", "where it ends"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_by_name(tooled, name):
    fields, param, words = REFUSED[name]
    body = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 3, **fields}
    answer = httpx.post(f"{tooled.base_url}chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]


def test_a_model_that_knows_no_tools_says_so(url):
    body = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 3}
    error = httpx.post(f"{url}/v1/chat/completions", json=body).json()["error"]
    assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
    assert httpx.post(f"{url}/v1/chat/completions", json={**body, "tool_choice": "none"}).status_code == 200
    llm = server(UNKNOWN_TEMPLATE)
    with serving(llm) as other:
        assert "no way of calling" in httpx.post(f"{other}/v1/chat/completions", json=body).json()["error"]["message"]
    asyncio.run(llm.close())


CALLS = [("weather", '{"city": "}\\n</tool_call>", "x": {"y": {}}}'), ("now", "{}")]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("form", [HERMES, LLAMA3], ids=["hermes", "llama"])
def test_a_reader_says_the_same_however_the_text_is_cut(form, size):
    calls = CALLS if form.several else CALLS[:1]
    text = ("I look.\n" if form.marked else "") + call_text(form, calls)
    reader = CallReader(form, must=not form.marked)
    said = [part for start in range(0, len(text), size) for part in reader.take(text[start : start + size])]
    said += reader.finish()
    assert "".join(part for part in said if isinstance(part, str)) == ("I look." if form.marked else "")
    for index, (name, arguments) in enumerate(calls):
        mine = [part for part in said if isinstance(part, CallDelta) and part.index == index]
        assert [part.name for part in mine] == [name] + [None] * (len(mine) - 1)
        assert "".join(part.arguments for part in mine) == arguments
    assert reader.num_calls == len(calls)


@pytest.mark.parametrize("text", ["", "a < b", "<tool_cal", "plain\n\n text ", '{"name": ', "  "])
def test_text_without_calls_stays_as_it_is(text):
    for size in (1, 3, 100):
        reader = CallReader(HERMES, must=False)
        said = [part for start in range(0, len(text), size) for part in reader.take(text[start : start + size])]
        assert "".join(said + reader.finish()) == text
        assert reader.num_calls == 0
