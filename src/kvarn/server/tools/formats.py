"""How families of models write calls of tools, and the grammars of texts with such calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvarn.grammar.source import WHITESPACE
from kvarn.text import Tokenizer
from kvarn.text.sources import TOOL_USE


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A call is `begin`, the name in JSON's quotes, `middle`, the arguments as a JSON object, `end`.

    begin tells a call from text: text goes on until it. several: whether there may be more than one call, with
    `between` them. marked: whether a call may come after text; else only an answer that begins as a call is one.
    """

    begin: str
    middle: str
    end: str
    between: str
    several: bool
    marked: bool

    def grammar(self, tools: Mapping[str, Any], *, must: bool, several: bool) -> str:
        """In Lark's notation: answers with calls of these tools. tools: schemas of the arguments by name.

        must: there is at least one call and nothing else; otherwise there may be text, before, between and after.
        several: more than one call is welcome.
        """
        several = several and self.several
        if must:
            more = f" ({quoted(self.between)} call)*" if several else ""
            lines = [f"start: call{more}", f"call: {quoted(self.begin)} rest"]
        elif self.marked:
            # The trigger ends the text as soon as it is there, so that text never goes on over a call.
            head, body = self.begin.splitlines()[0], self.begin[len(self.begin.splitlines()[0]) :]
            lines = [f"start: (head call){'*' if several else '?'} tail", f"head[lazy]: TEXT {quoted(head)}",
                     "tail: TEXT", r"TEXT: /(.|\n)*/", f"call: {quoted(body)} rest"]  # fmt: skip
        else:
            lines = ["start: TEXT | call |", r"TEXT: /[^{ \n\t](.|\n)*/", f"call: {quoted(self.begin)} rest"]
        lines.append("rest: " + " | ".join(f"call_{place}" for place in range(len(tools))))
        for place, (name, schema) in enumerate(tools.items()):
            frame = quoted(_name(name) + self.middle)
            lines.append(f"call_{place}: {frame} arguments_{place} {quoted(self.end)}")
            lines.append(f"arguments_{place}: %json {guided(schema)}")
        return "%llguidance {}\n" + "\n".join(lines) + "\n"


HERMES = ToolFormat('<tool_call>\n{"name": ', ', "arguments": ', "}\n</tool_call>", "\n", several=True, marked=True)
"""Nous' Hermes 2 Pro and later, Qwen 2.5 and 3."""
LLAMA3 = ToolFormat('{"name": ', ', "parameters": ', "}", "", several=False, marked=False)
"""Llama 3.1 and later: the whole answer is one call."""


def tool_format(tokenizer: Tokenizer) -> ToolFormat | None:
    """What the model's chat template makes of calls; None where it knows none of these ways."""
    template = tokenizer.chat_template
    if template is None:
        return None
    source = template.sources.get(TOOL_USE, template.source)
    if "<tool_call>" in source and "<function=" not in source:
        return HERMES
    if "<|start_header_id|>" in source and '"parameters"' in source:
        return LLAMA3
    return None


def _name(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


def quoted(text: str) -> str:
    """A string of Lark's notation."""
    return json.dumps(text, ensure_ascii=False)


def guided(schema: Any) -> str:
    """The schema with the options that all JSON here has; they are refused where a schema brings its own."""
    options = {"whitespace_pattern": WHITESPACE, "lenient": False, "coerce_one_of": False}
    return json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)


def call_text(form: ToolFormat, calls: Sequence[tuple[str, str]]) -> str:
    """What a model says that makes these calls, given as (name, arguments in JSON)."""
    return form.between.join(f"{form.begin}{_name(name)}{form.middle}{given}{form.end}" for name, given in calls)
