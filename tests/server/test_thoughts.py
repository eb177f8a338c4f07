"""Thoughts are told apart from answers, whole and streamed, with tools and with grammars."""

import asyncio
import contextlib
import json

import anthropic
import httpx
import openai
import pytest
from live_server import serving
from tiny_engine import Script, handmade_engine, shared_model, tiny_engine

from kvarn.config import CacheConfig, EngineConfig, GrammarConfig
from kvarn.engine import AsyncLLM, build_engine
from kvarn.errors import RequestError
from kvarn.request import Grammar, SamplingParams
from kvarn.server.thoughts import Opening, ThoughtReader, Thoughts
from kvarn.server.tools import ToolUse, Voice
from kvarn.testing import byte_tokenizer

EOS = 257
QWEN = (
    "{{ tools or '' }}{# <tool_call> #}"
    "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""The model begins its thoughts itself, unless it is told not to."""
DEEPSEEK = QWEN.split("{% if enable")[0] + "<think>\n{% endif %}"
"""The prompt begins them."""
EFFORT = "{{ reasoning_effort }}" + QWEN
MESSAGES = [{"role": "user", "content": "Hi"}]


@contextlib.contextmanager
def saying(text, template=QWEN):
    """A client of a model that says just that."""
    tokens = [*text.encode(), EOS]
    tokenizer = byte_tokenizer(chat_template=template)
    llm = AsyncLLM(handmade_engine(tokenizer=tokenizer, wrap_sampler=lambda s: Script(s, tokens)))
    with serving(llm) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client
    asyncio.run(llm.close())


def ask(client, **options):
    extra = options.pop("extra_body", {})
    return client.chat.completions.create(model="handmade", messages=MESSAGES, extra_body=extra, **options)


def streamed(client, **options):
    thoughts, content = "", ""
    for chunk in ask(client, stream=True, **options):
        for choice in chunk.choices:
            delta = choice.delta.model_dump()
            assert delta.get("reasoning_content") == delta.get("reasoning")
            assert not (delta.get("reasoning") and delta.get("content"))
            assert not (content and delta.get("reasoning")), "thoughts come first"
            thoughts += delta.get("reasoning") or ""
            content += delta.get("content") or ""
    return thoughts or None, content


CASES = [
    (QWEN, "<think>\nhm, so\nand so\n</think>\n\nHello.", "hm, so\nand so", "Hello."),
    (QWEN, "Hello.", None, "Hello."),
    (QWEN, "\n<think></think>Hello.", None, "Hello."),
    (QWEN, "<think>no end", "no end", ""),
    (QWEN, "<thin", None, "<thin"),
    (QWEN, "a <think>b</think> c", None, "a <think>b</think> c"),
    (QWEN, "<think>a</think>b</think>c", "a", "b</think>c"),
    (DEEPSEEK, "hm </thin\n</think>\nHello. ", "hm </thin", "Hello. "),
    (DEEPSEEK, "hm", "hm", ""),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_whole_and_streamed(case):
    template, text, thoughts, content = CASES[case]
    with saying(text, template) as client:
        message = ask(client).choices[0].message
        assert (message.reasoning_content, message.reasoning, message.content) == (thoughts, thoughts, content)
        assert streamed(client) == (thoughts, content)


def output(response):
    """(thoughts, answer) of a response."""
    parts = {item.type: item.content[0].text for item in response.output}
    return parts.get("reasoning"), parts.get("message", "")


SPENT = (24, 0, 9, 8, 0, 0, 10, 18, 3)
"""Tokens of the cases' thoughts, each a byte: from the `>` of their begin to that of their end, or the end of all."""


@pytest.mark.parametrize("case", range(len(CASES)))
def test_items_of_responses(case):
    template, text, thoughts, content = CASES[case]
    with saying(text, template) as client:
        whole = client.responses.create(model="handmade", input="Hi")
        assert output(whole) == (thoughts, content)
        assert whole.usage.output_tokens_details.reasoning_tokens == SPENT[case]
        events = list(client.responses.create(model="handmade", input="Hi", stream=True))
        assert output(events[-1].response) == (thoughts, content)
        assert events[-1].response.usage.output_tokens_details.reasoning_tokens == SPENT[case]
        said = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
        assert said == (thoughts or "")
        assert [event.sequence_number for event in events] == list(range(len(events)))
        again = [item.model_dump() for item in whole.output]
        assert client.responses.create(model="handmade", input=[*again, {"role": "user", "content": "And?"}]).output


@pytest.mark.parametrize("case", range(len(CASES)))
def test_blocks_of_messages(case):
    template, text, thoughts, content = CASES[case]
    given = {"model": "handmade", "max_tokens": 300, "messages": MESSAGES}
    with saying(text, template) as client, anthropic.Anthropic(
        base_url=str(client.base_url).removesuffix("/v1/"), api_key="none", max_retries=0
    ) as claude:
        for kind in ({"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}):
            whole = claude.messages.create(**given, thinking=kind)
            blocks = {block.type: block.model_dump()[block.type] for block in whole.content}
            assert (blocks.get("thinking"), blocks.get("text", "")) == (thoughts, content)
            with claude.messages.stream(**given, thinking=kind) as stream:
                streamed = stream.get_final_message()
            assert [b.model_dump() for b in streamed.content] == [b.model_dump() for b in whole.content]
        more = [{"role": "assistant", "content": [b.model_dump(exclude_none=True) for b in whole.content]}, *MESSAGES]
        if whole.content:
            assert claude.messages.create(**{**given, "messages": [*MESSAGES, *more]}).content is not None
        for unasked in ({}, {"thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}}):
            answer = claude.messages.create(**given, **unasked)
            assert "".join(block.text for block in answer.content) == content


def test_a_model_is_told_to_think_or_not_in_messages():
    with saying("<think>x</think>y") as client:
        url = f"{str(client.base_url).removesuffix('/v1/')}/v1/messages"
        body = {"max_tokens": 100, "messages": MESSAGES}
        answer = httpx.post(url, json={**body, "thinking": {"type": "disabled"}}).json()
        assert answer["content"] == [{"type": "text", "text": "<think>x</think>y"}], "the prompt closed its thoughts"
        for wrong, param in (({"type": "deep"}, "thinking.type"), ({"type": "enabled", "budget_tokens": "x"},
                             "thinking.budget_tokens"), ({"type": "enabled", "more": 1}, "thinking.more")):  # fmt: skip
            refused = httpx.post(url, json={**body, "thinking": wrong})
            assert (refused.status_code, param in refused.json()["error"]["message"]) == (400, True)


def test_thoughts_that_nobody_wants_are_not_told():
    with saying("<think>hm</think>Hello.") as client:
        answer = ask(client, extra_body={"include_reasoning": False})
        assert answer.choices[0].message.reasoning is None
        assert answer.choices[0].message.content == "Hello."
        assert answer.usage.completion_tokens == len("<think>hm</think>Hello.") + 1
        assert streamed(client, extra_body={"include_reasoning": False}) == (None, "Hello.")


def test_a_model_that_is_told_not_to_think_answers():
    with saying("<think>x</think>y") as client:
        closed = ask(client, reasoning_effort="none").choices[0].message
        assert (closed.reasoning, closed.content) == (None, "<think>x</think>y"), "the prompt closed its thoughts"
        assert ask(client, reasoning_effort="low").choices[0].message.reasoning == "x"
        kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
        assert ask(client, extra_body=kwargs).choices[0].message.content == "<think>x</think>y"


def test_the_effort_goes_to_a_template_that_reads_it():
    with saying("x", EFFORT) as client:
        prompt = ask(client, reasoning_effort="high", extra_body={"return_token_ids": True}).prompt_token_ids
        assert bytes(prompt).startswith(b"high")
        with pytest.raises(openai.BadRequestError, match="must be none, minimal") as found:
            ask(client, reasoning_effort="very")
        assert found.value.param == "reasoning_effort"


def test_without_a_place_for_the_effort_it_is_refused(client):
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(model="served", messages=MESSAGES, reasoning_effort="low")
    assert found.value.param == "reasoning_effort"


def test_a_message_that_is_continued_goes_on_in_its_thoughts_or_answer():
    for said, thoughts, content in (("<think>I was", "hm", "Hi"), ("Well", None, "hm</think>Hi")):
        with saying("hm</think>Hi", QWEN.replace(".split('</think>')[-1]", "")) as client:
            messages = [*MESSAGES, {"role": "assistant", "content": said}]
            extra = {"continue_final_message": True, "add_generation_prompt": False}
            answer = client.chat.completions.create(model="handmade", messages=messages, extra_body=extra)
            assert (answer.choices[0].message.reasoning, answer.choices[0].message.content) == (thoughts, content)


def test_models_that_do_not_think_have_no_such_field(client):
    answer = client.chat.completions.create(model="served", messages=MESSAGES, max_tokens=3)
    assert "reasoning" not in answer.choices[0].message.model_dump()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_reader_says_the_same_however_the_text_is_cut(case, size):
    template, text, thoughts, content = CASES[case]
    reader = ThoughtReader(Thoughts(Opening.INSIDE if template is DEEPSEEK else Opening.OPEN, True))
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    said = [reader.take(piece, ended=place == len(pieces) - 1) for place, piece in enumerate(pieces)]
    assert "".join(thought for thought, _ in said) == (thoughts or "")
    assert "".join(answer for _, answer in said) == content


@pytest.fixture(scope="module")
def grammars():
    """Compiles grammars for bytes."""
    core = tiny_engine(backend="cpu").core
    yield core.grammars
    core.close()


def accepts(grammars, grammar, text):
    matcher = grammars.compile(grammar).matcher()
    tokens = list(text.encode())
    return matcher.validate_tokens([*tokens, EOS]) == len(tokens) + 1


TOOL = {"type": "function", "function": {"name": "now"}}
BOUND = {
    "schema": (Grammar.json_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
                                    "additionalProperties": False}), '{"a": 5}', '{"b": 5}'),
    "object": (Grammar.json_object(), '{"x": [1]}', "[1]"),
    "regex": (Grammar.regex(r"^[a-c]+/\d\/$"), "abc/5/", "abd/5/"),
    "choice": (Grammar.choice(['re"d', "blue/green"]), "blue/green", "green"),
    "tool": (None, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', "It is noon."),
}  # fmt: skip


@pytest.mark.parametrize("opening", Opening)
@pytest.mark.parametrize("kind", BOUND)
def test_a_grammar_binds_the_answer_and_not_the_thoughts(grammars, kind, opening):
    grammar, good, bad = BOUND[kind]
    tools = None
    sampling = SamplingParams(grammar=grammar)
    if kind == "tool":
        tools = ToolUse.of([TOOL], "required", None, byte_tokenizer(chat_template=QWEN))
        sampling = tools.bind(sampling)
    bound = Thoughts(opening, True).bind(sampling, tools, GrammarConfig()).grammar
    thought = {Opening.INSIDE: 'a {"b\n</think>\n\n', Opening.OPEN: "<think>\na {</think>", Opening.CLOSED: ""}[opening]
    assert accepts(grammars, bound, thought + good)
    assert not accepts(grammars, bound, thought + bad)
    assert accepts(grammars, bound, good) == (opening is not Opening.INSIDE)
    assert not accepts(grammars, bound, "<think>a</think>") or opening is Opening.CLOSED


def test_limits_of_grammars_hold_before_thoughts_too():
    deep = Grammar.json_schema({"properties": {"a": {"properties": {"b": {}}}}})
    with pytest.raises(RequestError, match="max_grammar_depth"):
        Thoughts(Opening.OPEN, True).bind(SamplingParams(grammar=deep), None, GrammarConfig(max_grammar_depth=2))


def test_calls_after_thoughts():
    call = '<tool_call>\n{"name": "now", "arguments": {"a": 1}}\n</tool_call>'
    tools = ToolUse.of([TOOL], "auto", None, byte_tokenizer(chat_template=QWEN))
    thoughts = Thoughts(Opening.OPEN, True)
    message = Voice(tools, thoughts.reader()).whole(f"<think>I call <tool_call> now</think>\n\nWell.\n{call}")
    assert (message["reasoning"], message["content"]) == ("I call <tool_call> now", "Well.")
    (told,) = message["tool_calls"]
    assert (told["function"]["name"], json.loads(told["function"]["arguments"])) == ("now", {"a": 1})
    sampling = tools.bind(SamplingParams())
    assert thoughts.bind(sampling, tools, GrammarConfig()) is sampling, "text may come before these calls anyway"


def test_an_answer_bound_to_a_schema_follows_real_thoughts():
    """A random model that begins to think or not, as it likes; its answer holds in either case."""
    config = EngineConfig(threads=1, cache=CacheConfig(num_blocks=256))
    tokenizer = byte_tokenizer(chat_template=QWEN)
    llm = AsyncLLM(build_engine(shared_model("llama", 0), tokenizer, config, name="handmade"))
    with serving(llm) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": BOUND_SCHEMA}}
        answer = ask(client, n=32, seed=2, max_tokens=60, response_format=schema)
    asyncio.run(llm.close())
    ended = [choice.message for choice in answer.choices if choice.finish_reason == "stop"]
    thinking = [choice.message for choice in answer.choices if choice.finish_reason == "length"]
    assert ended and thinking
    for message in ended:
        assert json.loads(message.content)["kind"] in ("a", "b")
    assert all(message.reasoning and not message.content for message in thinking), "no end of thoughts comes by chance"


BOUND_SCHEMA = {"type": "object", "properties": {"kind": {"enum": ["a", "b"]}}, "required": ["kind"],
                "additionalProperties": False}  # fmt: skip
