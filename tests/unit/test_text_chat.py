"""Conversations to token ids: what is checked, what is special, and what stays text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import byte_level, sentencepiece, texts, tokenizer

from kvarn.errors import RequestError, TemplateError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{% else %}{{ '<|im_start|>' + (m.content.split('</think>') | last).strip() + '<|im_end|>' }}{% endif %}"
    "{% endfor %}"
)
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}{{ part.text }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)
TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}"
)
CHAT = tokenizer(byte_level(defined=["<think>"]), default=CHATML)
TRIM = tokenizer(byte_level(), default=TRIMMING)

special_text = st.sampled_from(["<|im_start|>", "<|im_end|>", "<|im_", "end|>", "<", "|>", "<s>", "</s>", " ", "\n"])
content = st.lists(st.one_of(special_text, st.text(max_size=4)), max_size=5).map("".join)
conversation = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), content).map(
        lambda pair: {"role": pair[0], "content": pair[1]}
    ),
    min_size=1,
    max_size=4,
)


def specials(subject, ids):
    return [subject.token_text(token) for token in ids if subject.is_special(token)]


def whole(subject, ids):
    return subject.decode(ids, skip_special_tokens=False)


def test_the_templates_special_tokens_are_tokens():
    ids = CHAT.encode_chat([{"role": "user", "content": "hi"}])
    assert whole(CHAT, ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert specials(CHAT, ids) == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert ids == CHAT.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", parse_special=True)


@given(conversation)
def test_content_never_makes_a_special_token(messages):
    ids = CHAT.encode_chat(messages)
    assert specials(CHAT, ids) == ["<|im_start|>", "<|im_end|>"] * len(messages) + ["<|im_start|>"]
    expected = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    assert whole(CHAT, ids) == expected + "<|im_start|>assistant\n"


@given(conversation.filter(lambda messages: not any("<" in m["content"] or ">" in m["content"] for m in messages)))
def test_ordinary_content_tokenizes_as_the_rendered_whole(messages):
    rendered = CHAT.chat_template.render(messages)
    assert CHAT.encode_chat(messages) == CHAT.encode(rendered, parse_special=True)


def test_content_is_special_where_asked():
    messages = [{"role": "user", "content": "a<|im_end|>"}]
    assert specials(CHAT, CHAT.encode_chat(messages, parse_special=True)).count("<|im_end|>") == 2


def test_user_defined_tokens_in_content_are_tokens():
    """As they are in any text."""
    assert "<think>" in texts(CHAT, CHAT.encode_chat([{"role": "user", "content": "<think><|im_end|>"}]))


def test_templates_may_trim_and_split_content():
    messages = [
        {"role": "user", "content": "no</think>  <|im_end|>yes  "},
        {"role": "assistant", "content": " <s>ok \n"},
    ]
    ids = TRIM.encode_chat(messages)
    assert whole(TRIM, ids) == "<s><|im_start|><|im_end|>yes<|im_end|> <s>ok</s>"
    assert specials(TRIM, ids) == ["<s>", "<|im_start|>", "<|im_end|>", "</s>"]


def test_two_texts_do_not_join_into_a_special_token():
    subject = tokenizer(byte_level(), default="{% for m in messages %}{{ m.content }}{% endfor %}")
    messages = [{"role": "user", "content": part} for part in ("<|im", "_end", "|>")]
    ids = subject.encode_chat(messages)
    assert (specials(subject, ids), whole(subject, ids)) == ([], "<|im_end|>")
    parts = tokenizer(byte_level(), default=PARTS)
    content = [{"type": "text", "text": part} for part in ("<|im", "_end", "|>")]
    assert specials(parts, parts.encode_chat([{"role": "user", "content": content}])) == ["<|im_start|>", "<|im_end|>"]


def test_roles_may_be_part_of_the_templates_tokens():
    template = "{{ '<|' ~ messages[0].role ~ '|>' ~ messages[0].content }}"
    subject = tokenizer(byte_level(control=["<|user|>", "<|end|>"]), default=template)
    ids = subject.encode_chat([{"role": "user", "content": "<|user|>"}])
    assert specials(subject, ids) == ["<|user|>"]
    assert whole(subject, ids) == "<|user|><|user|>"


def test_digits_in_content_are_no_placeholders():
    content = "7" * 40 + "<|im_end|>" + "0123456" * 10
    assert content in whole(CHAT, CHAT.encode_chat([{"role": "user", "content": content}]))


def test_bos_comes_once():
    messages = [{"role": "user", "content": "hi"}]
    silent = tokenizer(byte_level(add_bos_token=True), default=CHATML)
    assert texts(silent, silent.encode_chat(messages))[:2] == ["<s>", "<|im_start|>"]
    written = tokenizer(byte_level(add_bos_token=True), default=TRIMMING)
    assert texts(written, written.encode_chat(messages))[:2] == ["<s>", "<|im_start|>"]
    neither = tokenizer(byte_level(add_bos_token=False), default=CHATML)
    assert texts(neither, neither.encode_chat(messages))[:1] == ["<|im_start|>"]


@pytest.mark.parametrize("template", [CHATML, PARTS])
def test_the_last_message_can_be_continued(template):
    subject = tokenizer(byte_level(), default=template)
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "1, <s>2, "}]
    ids = subject.encode_chat(messages, continue_final_message=True)
    assert whole(subject, ids) == "<|im_start|>user\nCount.<|im_end|>\n<|im_start|>assistant\n1, <s>2, "
    assert "<s>" not in specials(subject, ids)


def test_continuing_where_the_template_trims():
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": " 1, 2, "}]
    ids = TRIM.encode_chat(messages, continue_final_message=True)
    assert whole(TRIM, ids) == "<s><|im_start|>Count.<|im_end|> 1, 2,"


def test_continuing_what_the_template_leaves_out():
    subject = tokenizer(byte_level(), default="{{ messages[0].content }}")
    with pytest.raises(TemplateError, match="cannot be continued"):
        subject.encode_chat([{"role": "user", "content": c} for c in "ab"], continue_final_message=True)


def test_text_parts():
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": content}]
    assert "user\na\nb<|im_end|>" in whole(CHAT, CHAT.encode_chat(messages))
    subject = tokenizer(byte_level(), default=PARTS)
    assert "user\nab<|im_end|>" in whole(subject, subject.encode_chat(messages))
    assert "user\nhi<|im_end|>" in whole(subject, subject.encode_chat([{"role": "user", "content": "hi"}]))


def test_tools_and_tool_calls():
    subject = tokenizer(byte_level(), default=TOOLS)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"<|im_end|>": "<|im_start|>"}}}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "<|im_end|>"}'}}
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    ids = subject.encode_chat(messages, tools=tools)
    assert specials(subject, ids) == ["<|im_start|>", "<|im_end|>"] * 2
    assert '{"<|im_end|>": "<|im_start|>"}' in whole(subject, ids)
    assert 'f({"x": "<|im_end|>"})' in whole(subject, ids)
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == '{"x": "<|im_end|>"}'


def test_models_without_a_template():
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    chatml = tokenizer(byte_level())
    assert chatml.chat_template is None
    assert whole(chatml, chatml.encode_chat(messages)).endswith("Hi<|im_end|>\n<|im_start|>assistant\n")
    plain = tokenizer(sentencepiece({"▁": -1.0}))
    assert whole(plain, plain.encode_chat(messages)) == "<s> System: Be kind.\n\nUser: Hi\n\nAssistant:"
    answered = [*messages, {"role": "assistant", "content": "Hello"}]
    assert plain.decode(plain.encode_chat(answered, continue_final_message=True)).endswith("\n\nAssistant: Hello")


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ([{"role": "user", "content": "a"}, "b"], "messages[1]"),
        ([{"content": "a"}], "messages[0].role"),
        ([{"role": "", "content": "a"}], "messages[0].role"),
        ([{"role": "<|im_end|>", "content": "a"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": "a"}] * 3 + [{"role": "user", "content": None}], "messages[3].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": "a", "x": {1: 2}}], "messages[0].x"),
        ([{"role": "user", "content": "a", "x": object()}], "messages[0].x"),
        ([{"role": "assistant", "content": "", "tool_calls": {}}], "messages[0].tool_calls"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "messages[0].tool_calls[0].function"),
    ],
)
def test_wrong_messages_are_named(messages, field):
    with pytest.raises(RequestError) as caught:
        CHAT.encode_chat(messages)
    assert caught.value.field == field


def test_deep_and_many():
    deep = {}
    for _ in range(100):
        deep = {"a": deep}
    with pytest.raises(RequestError, match="nested deeper than 32"):
        CHAT.encode_chat([{"role": "user", "content": "a", "x": deep}])
    with pytest.raises(RequestError, match="1 to 16384, not 20000"):
        CHAT.encode_chat([{"role": "user", "content": "a"}] * 20_000)


@pytest.mark.parametrize(("tools", "field"), [("x", "tools"), ([1], "tools[0]"), ([{}] * 2000, "tools")])
def test_wrong_tools_are_named(tools, field):
    with pytest.raises(RequestError) as caught:
        CHAT.encode_chat([{"role": "user", "content": "a"}], tools=tools)
    assert caught.value.field == field


def test_half_an_emoji():
    ids = CHAT.encode_chat([{"role": "user", "content": "a\ud83d<|im_end|>"}])
    assert "a\ufffd<|im_end|><|im_end|>" in whole(CHAT, ids)


def test_rendering_is_the_same_each_time():
    messages = [{"role": "user", "content": "<|im_end|>"}]
    subject = tokenizer(byte_level(), default="{{ messages[0].content | length }}")
    assert subject.encode_chat(messages) == subject.encode_chat(messages)
