"""docs/server.md is true of the code: its routes, parameters and limits are the server's."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from kvarn import request
from kvarn.cli import serve as command
from kvarn.config import GrammarConfig, SpeculativeConfig
from kvarn.grammar.source import MAX_CHOICES
from kvarn.server import create_app, errors
from kvarn.server.limits import ServerLimits
from kvarn.server.protocol import (
    HARMLESS,
    LIMIT_NAMES,
    MAX_INPUTS,
    MAX_PROMPTS,
    MAX_REQUEST_ID_CHARS,
    MOST_ENTRIES,
    NEUTRAL,
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
    ModelRequest,
    TokenizeRequest,
)
from kvarn.server.protocol.messages import MessagesRequest
from kvarn.server.protocol.responses import ResponsesRequest

PAGE = (Path(__file__).parents[2] / "docs" / "server.md").read_text()
CHAT, COMPLETION = set(ChatCompletionRequest.model_fields), set(CompletionRequest.model_fields)


def named(begin, end):
    """The names in backquotes between two texts."""
    return set(re.findall(r"`([a-z_]+)`", PAGE[PAGE.index(begin) : PAGE.index(end)])) - {"false", "true", "null"}


def row(what):
    """The limits that a row of the table of limits gives, as numbers."""
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {what} |"))
    return [int(number) for number in re.findall(r"-?\d+", line.split("|")[2])]


def test_every_route_is_told():
    told = set(re.findall(r"`((?:GET|POST) /[^`]*)`", PAGE))
    paths = create_app(None).openapi()["paths"]
    real = {f"{method.upper()} {path}" for path in paths for method in paths[path]}
    assert told == real | {"GET /openapi.json", "GET /", "GET /dashboard"}


def test_honoured_parameters():
    within = {"include_usage", "include_obfuscation", "continuous_usage_stats", "token_ids", "prompt_token_ids"}
    assert named("**Honoured** in both", "- Chat also") - within == CHAT & COMPLETION
    assert named("- Chat also", "- Completions also") - {"logprobs", "max_tokens"} == CHAT - COMPLETION
    told = named("- Completions also", "`model` may be absent")
    assert told - {"logprobs", "n", "max_tokens"} == COMPLETION - CHAT


def test_ignored_and_refused_parameters():
    assert named("**Ignored**", "**Refused**") == HARMLESS
    assert named("**Refused**", "## Errors") - {"none", "auto", "medium"} == set(NEUTRAL)


def test_codes_of_errors():
    told = named("| status | `code` | when |", "A failure in the middle") - {"code", "messages", "prompt"}
    folder = Path(errors.__file__).parent
    real = set()
    for file in folder.rglob("*.py"):
        real |= set(re.findall(r'code="([a-z_]+)"', file.read_text()))
    assert told == real


def test_settings_of_speculation():
    table = PAGE[PAGE.index("## Speculative decoding") : PAGE.index("It pays where")]
    told = set(re.findall(r"`([a-z_]+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if "|" in line)))
    assert told == {field.name for field in dataclasses.fields(SpeculativeConfig)}


def test_limits():
    defaults = {name: parameter.default for name, parameter in inspect.signature(command.command).parameters.items()}
    assert row("requests waiting") == [defaults["max_num_queued_requests"]]
    steps = [defaults["max_num_seqs"], defaults["max_num_batched_tokens"]]
    assert row("sequences in a step, tokens in a step") == steps
    assert row("documents") == [MOST_ENTRIES["documents"]]
    assert row("`request_id`") == [1, MAX_REQUEST_ID_CHARS]
    assert row("a stop string") == [1, request.MAX_STOP_STRING_CHARS]
    assert row("`stop_token_ids`") == [MOST_ENTRIES["stop_token_ids"]]
    assert row("`allowed_token_ids`; `bad_words`") == [
        request.MAX_ALLOWED_TOKEN_IDS, request.MAX_BAD_WORDS, 1, request.MAX_BAD_WORD_CHARS,
    ]  # fmt: skip
    grammar = GrammarConfig()
    sizes = [grammar.max_grammar_bytes, grammar.max_grammar_depth, MAX_CHOICES]
    assert row("grammar: bytes, nesting of a schema, choices") == sizes
    costs = [grammar.max_grammar_seconds, grammar.max_grammar_mb, grammar.max_mask_ms]
    assert row("grammar: time and memory to compile, time for a mask") == costs
    kept = [grammar.max_queued_grammars, grammar.grammar_cache_entries]
    assert row("grammars waiting, compiled ones kept") == kept
    assert {name: defaults[name] for name in GrammarConfig.__dataclass_fields__} == dataclasses.asdict(grammar)
    assert row("`cache_salt`") == [1, request.MAX_CACHE_SALT_CHARS]
    assert row("`logprobs` of a completion, `top_logprobs`, `prompt_logprobs`") == [request.MAX_LOGPROBS] * 3


@pytest.mark.parametrize(
    ("model", "begin", "end"),
    [
        (MessagesRequest, "## Anthropic's messages", "## Responses"),
        (ResponsesRequest, "## Responses", "## Embeddings"),
        (EmbeddingRequest, "## Embeddings", "## The description"),
        (TokenizeRequest, "## Tokens", "## Anthropic's messages"),
    ],
)
def test_parameters_of_the_other_apis(model, begin, end):
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    told = set(re.findall(r"`([a-z_]+)[.`]", page[page.index(begin) : page.index(end)]))
    tables = () if model is TokenizeRequest else (*model.screening.harmless, *model.screening.neutral)
    assert {*model.model_fields, *tables} - set(ModelRequest.model_fields) <= told
def test_limits_of_requests_and_connections():
    table = PAGE[PAGE.index("| flag | default | most |") : PAGE.index("Bodies are read and tokenized")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:] if line]
    told = {flag.strip("`-").replace("-", "_"): (default, most) for flag, default, most, _ in rows}
    real = {
        each.name: (str(each.default or "none").removesuffix(".0"), str(each.metadata["most"] or ""))
        for each in dataclasses.fields(ServerLimits)
    }
    assert told == real


def test_limits_are_those_of_the_parts():
    limits = ServerLimits()
    assert {name: getattr(limits, limit) for name, limit in LIMIT_NAMES.items()} == {
        **{name: MOST_ENTRIES[name] for name in LIMIT_NAMES.keys() & MOST_ENTRIES},
        "prompt": MAX_PROMPTS,
        "input": MAX_INPUTS,
    }
    assert limits.max_n == request.MAX_N
