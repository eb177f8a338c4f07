"""From a request's `Grammar` to what llguidance reads, and the bounds that can be checked by looking at it."""

from __future__ import annotations

import json
import re
from typing import Any

from kvarn.config import GrammarConfig
from kvarn.errors import RequestError
from kvarn.request import Grammar, GrammarKind

WHITESPACE = r"( |\n[ \t]{0,20})?"
"""Between the parts of JSON: at most one space, or a line break and 20 characters of indentation. Without a bound a
small model may go on with white space for ever."""
MAX_CHOICES = 4096
OLD_DRAFT = re.compile(r"draft-0[0-3]\b")
NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords with an object of schemas by name."""
VALUES = frozenset({"const", "enum", "default", "example", "examples"})
"""Keywords with values that are no schemas."""
SPECIAL = frozenset(r"\.+*?()|[]{}^$#&-~/")
"""What regular expressions give a meaning."""


def check_grammar(grammar: Grammar, config: GrammarConfig) -> None:
    """Raises RequestError with field "grammar", naming the limit, for what is not worth trying to compile."""
    size = len(grammar.text.encode("utf-8", "surrogatepass"))
    if size > config.max_grammar_bytes:
        raise _refusal(f"has {size} bytes, at most {config.max_grammar_bytes} are allowed (max_grammar_bytes)")
    try:
        grammar.text.encode()
    except UnicodeEncodeError:
        raise _refusal("is no Unicode text: it has a lone surrogate") from None
    if grammar.kind is GrammarKind.JSON_SCHEMA:
        _check_schema(grammar.text, config.max_grammar_depth)
    elif grammar.kind is GrammarKind.CHOICE:
        _check_choices(grammar.text)


def to_llguidance(grammar: Grammar) -> str:
    """The grammar as llguidance's matchers take it. The result may still be no valid grammar. Raises ValueError."""
    from llguidance import LLMatcher  # 50 ms that nobody waits for who has no grammar

    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            return _json_grammar(grammar.text)
        case GrammarKind.JSON_OBJECT:
            return _json_grammar('{"type":"object"}')
        case GrammarKind.REGEX:
            return str(LLMatcher.grammar_from_regex(unanchored(grammar.text)))
        case GrammarKind.CHOICE:
            pattern = "|".join(_escaped(option) for option in json.loads(grammar.text))
            return str(LLMatcher.grammar_from_regex(f"({pattern})"))
        case GrammarKind.LARK:
            return str(LLMatcher.grammar_from_lark(grammar.text))


def _json_grammar(schema: str) -> str:
    from llguidance import LLMatcher

    # As overrides, since a schema may bring options of its own ("x-guidance"), and lenient ones let wrong values pass.
    value = {} if schema == "true" else json.loads(schema)
    return str(
        LLMatcher.grammar_from_json_schema(
            json.dumps(value, ensure_ascii=False),
            overrides={"whitespace_pattern": WHITESPACE, "lenient": False, "coerce_one_of": False},
        )
    )


def unanchored(pattern: str) -> str:
    """The pattern without anchors around it: what comes out matches as a whole in any case."""
    pattern = pattern.removeprefix("^")
    if pattern.endswith("$"):
        escapes = len(pattern) - 1 - len(pattern[:-1].rstrip("\\"))
        if escapes % 2 == 0:
            pattern = pattern[:-1]
    return pattern


def _escaped(text: str) -> str:
    return "".join(f"\\{character}" if character in SPECIAL else character for character in text)


def _check_schema(text: str, max_depth: int) -> None:
    try:
        schema = json.loads(text)
    except RecursionError:
        raise _too_deep(max_depth) from None
    except ValueError as error:
        raise _refusal(f"is no JSON: {error}") from None
    if schema is False:
        raise _refusal("allows nothing: the schema is false")
    if schema is not True and not isinstance(schema, dict):
        raise _refusal("must be a JSON schema: an object")
    level: list[Any] = [schema]
    for _ in range(max_depth):
        level = [item for value in level for item in _children(value)]
        if not level:
            break
    else:
        raise _too_deep(max_depth)
    check_meaning(schema)


def check_meaning(schema: Any) -> None:
    """Raises RequestError, field "grammar", for a schema that llguidance takes, but for less than it says."""
    named = schema.get("$schema") if isinstance(schema, dict) else None
    if isinstance(named, str) and OLD_DRAFT.search(named):
        raise _refusal(f"has a $schema before draft 4 ({named[:60]}), whose keywords mean other things")
    nodes = [schema]
    while nodes:
        node = nodes.pop()
        if not isinstance(node, dict):
            continue
        least, required = node.get("minProperties"), node.get("required")
        known = len(required) if isinstance(required, list) else 0
        if isinstance(least, int) and least > known + 1:
            # Keys that are not listed may come twice, and two that are alike are one property.
            raise _refusal(f"has a minProperties ({least}) of more than the required properties ({known}) and one")
        for key, value in node.items():
            if key in NAMED_SCHEMAS and isinstance(value, dict):
                nodes += value.values()
            elif key not in VALUES:
                nodes += value if isinstance(value, list) else [value]


def _children(value: Any) -> list[Any]:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [item for item in items if isinstance(item, dict | list)]


def _check_choices(text: str) -> None:
    options = json.loads(text)
    if not 1 <= len(options) <= MAX_CHOICES:
        raise _refusal(f"must have 1 to {MAX_CHOICES} choices, not {len(options)}")
    if not all(isinstance(option, str) for option in options):
        raise _refusal("must have texts as choices")


def _too_deep(max_depth: int) -> RequestError:
    return _refusal(f"is nested deeper than {max_depth} (max_grammar_depth)")


def _refusal(what: str) -> RequestError:
    return RequestError(f"the grammar {what}", field="grammar")
