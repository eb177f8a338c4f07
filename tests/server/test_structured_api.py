"""The real `openai` client asks for answers of a form, and gets them."""

import json
import re

import httpx
import jsonschema
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

MESSAGES = [{"role": "user", "content": "Hello!"}]
SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "green"]}, "count": {"type": "integer", "minimum": 0, "maximum": 999}},
    "required": ["color", "count"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}


def chat(client, **options):
    return client.chat.completions.create(
        **{"model": "served", "messages": MESSAGES, "max_tokens": 120, "seed": 5, **options}
    )


def test_response_format_whole_and_streamed(client):
    answer = chat(client, response_format=FORMAT, n=3)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    texts = ["", "", ""]
    for chunk in chat(client, response_format=FORMAT, n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in answer.choices]


def test_the_clients_own_helper_parses_it(client):
    from pydantic import BaseModel

    class Thing(BaseModel):
        color: str
        count: int

    answer = client.chat.completions.parse(
        model="served", messages=MESSAGES, response_format=Thing, max_tokens=400, temperature=0,
        logit_bias={str(ord(c)): 20 for c in '"}0,'},
    )  # fmt: skip
    assert isinstance(answer.choices[0].message.parsed, Thing)


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"regex": "[ab]{2,5}c"}, "[ab]{2,5}c"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'start: "x" y\ny: "1" | "2"'}, "x1|x2"),
        ({"json": SCHEMA}, r"\{\s*\"color.*\}\s*"),
        ({"json": json.dumps(SCHEMA)}, r"\{\s*\"color.*\}\s*"),
    ],
    ids=["regex", "choice", "grammar", "json", "json as text"],
)
def test_structured_outputs(client, outputs, pattern):
    body = {"structured_outputs": outputs}
    said = chat(client, extra_body=body).choices[0]
    assert re.fullmatch(pattern, said.message.content, re.DOTALL)
    completed = client.completions.create(model="served", prompt="x", max_tokens=120, seed=1, extra_body=body)
    assert re.fullmatch(pattern, completed.choices[0].text, re.DOTALL)


def test_json_object(client):
    bias = {str(ord(c)): 12 for c in '"}]'} | {"257": 12}
    for options in ({"response_format": {"type": "json_object"}},
                    {"extra_body": {"structured_outputs": {"json_object": True}}}):  # fmt: skip
        answer = chat(client, logit_bias=bias, max_tokens=300, **options)
        assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_free_text_is_free(client):
    free, same = (chat(client, temperature=0, max_tokens=8, **o) for o in ({}, {"response_format": {"type": "text"}}))
    assert same.choices[0].message.content == free.choices[0].message.content


def schema(value):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


CHAIN = "".join(f"r{i}: r{i + 1}\n" for i in range(15000)) + 'start: r0\nr15000: "a"'
"""Overflows the stack of who compiles it."""
REFUSED = {
    "keyword": (schema({"type": "array", "uniqueItems": True}), "response_format", "uniqueItems"),
    "remote": (schema({"$ref": "http://example.com/x"}), "response_format", "example.com"),
    "deep": (schema(json.loads('{"items":' * 70 + "{}" + "}" * 70)), "response_format", "max_grammar_depth"),
    "large": (schema({"enum": ["x" * 300_000]}), "response_format", "max_grammar_bytes"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "missing"),
    "kind": ({"response_format": {"type": "xml"}}, "response_format.type", "json_object or json_schema"),
    "extra": ({"response_format": {"type": "text", "x": 1}}, "response_format.x", "unknown"),
    "regex": ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs", "look-around"),
    "two": ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly one"),
    "none": ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    "both": ({"structured_outputs": {"regex": "a"}, **schema({})}, "structured_outputs", "exclude one another"),
    "choice": ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice[0]", "a string"),
    "crash": ({"structured_outputs": {"grammar": CHAIN}}, "structured_outputs", "max_grammar_mb"),
    "min_tokens": ({"structured_outputs": {"regex": "a"}, "min_tokens": 3}, "min_tokens", "where it ends"),
    "ignore_eos": ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos", "where it ends"),
    "guided_json": ({"guided_json": {}}, "guided_json", "structured_outputs.json"),
    "guided_choice": ({"guided_choice": ["a"]}, "guided_choice", "structured_outputs.choice"),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_by_name(url, name, stream):
    fields, param, words = REFUSED[name]
    body = {"messages": MESSAGES, "max_tokens": 3, "stream": stream, **fields}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


def test_metrics(client, url):
    def value(name):
        families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
        return next(s.value for f in families for s in f.samples if s.name == f"kvarn:{name}_total")

    pattern = {"structured_outputs": {"regex": "only (here|there)"}}
    before = {name: value(name) for name in ("grammar_compilations", "grammar_cache_hits", "grammar_refusals")}
    for _ in range(3):
        chat(client, extra_body=pattern)
    with pytest.raises(openai.BadRequestError):
        chat(client, extra_body={"structured_outputs": {"regex": "(?=b)"}})
    gained = {name: value(name) - count for name, count in before.items()}
    assert gained == {"grammar_compilations": 1, "grammar_cache_hits": 2, "grammar_refusals": 1}
    assert value("grammar_mask_seconds") > 0
