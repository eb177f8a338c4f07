"""What a model thinks before it answers: `<think>…</think>`, told apart from the answer."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from kvarn.config import GrammarConfig
from kvarn.grammar.source import check_grammar, unanchored
from kvarn.request import Grammar, GrammarKind, SamplingParams
from kvarn.server.errors import ApiError
from kvarn.server.protocol import ChatCompletionRequest
from kvarn.server.tools import ToolUse
from kvarn.server.tools.formats import guided, quoted
from kvarn.text import Tokenizer

BEGIN, END = "<think>", "</think>"
"""Of DeepSeek-R1, Qwen 3, QwQ, SmolLM 3 and others."""
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates let a model think or not."""
TAIL_TOKENS = 32
ANY = r"/(.|\n)*/"


class Opening(enum.Enum):
    """Where a prompt leaves the model."""

    INSIDE = "in its thoughts"
    OPEN = "free to think first"
    CLOSED = "in its answer"


@dataclass(frozen=True, slots=True)
class Thoughts:
    """Of one chat with a model that thinks. told: whether the client wants them."""

    opening: Opening
    told: bool

    @classmethod
    def of(cls, body: ChatCompletionRequest, tokenizer: Tokenizer, prompt: Sequence[int]) -> Self | None:
        """None where the model's chat template says nothing of thoughts. prompt: as the model reads it."""
        template = tokenizer.chat_template
        if template is None or END not in template.source:
            return None
        return cls(_opening(body, tokenizer, prompt), body.include_reasoning is not False)

    def reader(self) -> ThoughtReader:
        """For one answer."""
        return ThoughtReader(self)

    def tokens(self, tokenizer: Tokenizer) -> ThoughtTokens:
        """The same for one answer's tokens."""
        return ThoughtTokens(self.opening, tokenizer)

    def bind(self, sampling: SamplingParams, tools: ToolUse | None, limits: GrammarConfig) -> SamplingParams:
        """The same, with a grammar that lets the model think first.

        Not for grammars of the client's own in Lark's notation, and not where text may come before calls anyway.
        Raises RequestError with field "grammar" as the engine would for the grammar alone.
        """
        grammar = sampling.grammar
        if grammar is None or self.opening is Opening.CLOSED or (tools is not None and tools.text_first):
            return sampling
        check_grammar(grammar, limits)
        answer = _as_lark(grammar, ours=tools is not None)
        if answer is None:
            return sampling
        first = "thought GAP?" if self.opening is Opening.INSIDE else f"({quoted(BEGIN)} thought GAP?)?"
        lines = ["%llguidance {}", f"start: {first} answer", f"thought[lazy]: THOUGHT {quoted(END)}",
                 f"THOUGHT: {ANY}", r"GAP: /[ \n]{1,4}/", answer]  # fmt: skip
        return dataclasses.replace(sampling, grammar=Grammar.lark("\n".join(lines) + "\n"))


def effort_variables(body: ChatCompletionRequest, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the template is given for `reasoning_effort`. Raises ApiError where it has no place for that."""
    effort = body.reasoning_effort
    if effort is None:
        return {}
    if effort not in EFFORTS:
        message = f"reasoning_effort must be {', '.join(EFFORTS)}, not {effort[:40]!r}"
        raise ApiError(400, message, param="reasoning_effort", code="invalid_value")
    template = tokenizer.chat_template
    known = () if template is None else template.variables(tools=bool(body.tools))
    if "reasoning_effort" in known:
        return {"reasoning_effort": effort}
    switch = next((name for name in SWITCHES if name in known), None)
    if switch is None:
        message = "reasoning_effort: the model's chat template lets nobody say how much it is to think"
        raise ApiError(400, message, param="reasoning_effort", code="unsupported_parameter")
    return {switch: effort != "none"}


def thinking_switch(tokenizer: Tokenizer, thinks: bool | None, *, tools: bool) -> dict[str, Any]:
    """What the template is given so that the model thinks, or does not; nothing where it lets nobody say that.

    thinks: None: as it likes. Raises ApiError for a model that is to think and cannot.
    """
    template = tokenizer.chat_template
    if thinks and (template is None or END not in template.source):
        message = "thinking must be absent or of type disabled: this model does not think before it answers"
        raise ApiError(400, message, param="thinking", code="unsupported_parameter")
    if thinks is None or template is None:
        return {}
    known = template.variables(tools=tools)
    return {name: thinks for name in SWITCHES if name in known}


def _opening(body: ChatCompletionRequest, tokenizer: Tokenizer, prompt: Sequence[int]) -> Opening:
    if body.continue_final_message:
        said = body.messages[-1].get("content")
        text = said if isinstance(said, str) else ""
        return Opening.INSIDE if text.rfind(BEGIN) > text.rfind(END) else Opening.CLOSED
    tail = tokenizer.decode(prompt[-TAIL_TOKENS:], skip_special_tokens=False).rstrip()
    if tail.endswith(BEGIN):
        return Opening.INSIDE
    return Opening.CLOSED if tail.endswith(END) else Opening.OPEN


def _as_lark(grammar: Grammar, *, ours: bool) -> str | None:
    """Rules for `answer`; None for a client's own. ours: the grammar is one of tools."""
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            schema = json.loads(grammar.text)
            return f"answer: %json {guided({} if schema is True else schema)}"
        case GrammarKind.JSON_OBJECT:
            return f"answer: %json {guided({'type': 'object'})}"
        case GrammarKind.REGEX:
            pattern = re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", unanchored(grammar.text), flags=re.DOTALL)
            pattern = pattern.replace("\n", r"\n")
            return f"answer: /{pattern}/"
        case GrammarKind.CHOICE:
            return "answer: " + " | ".join(map(quoted, json.loads(grammar.text)))
        case GrammarKind.LARK:
            return grammar.text.removeprefix("%llguidance {}\n").replace("start:", "answer:", 1) if ours else None


class ThoughtReader:
    """Tells thoughts from answer in one answer's text, piece by piece. White space around either is left out."""

    def __init__(self, thoughts: Thoughts) -> None:
        self._told = thoughts.told
        self._opening = thoughts.opening
        self._held = ""
        self._strip = False
        """Whether white space at the beginning of what comes is left out."""

    def take(self, text: str, *, ended: bool) -> tuple[str, str]:
        """(thoughts, answer) that a piece of text adds. ended: it is the last one."""
        self._held += text
        thought = ""
        if self._opening is Opening.OPEN:
            self._begin(ended)
        if self._opening is Opening.INSIDE:
            thought = self._think(ended)
        answer = self._stripped() if self._opening is Opening.CLOSED else ""
        return (thought if self._told else ""), answer

    def _begin(self, ended: bool) -> None:
        """Finds out whether the model thinks, as soon as that is clear."""
        start = self._held.lstrip()
        if start.startswith(BEGIN):
            self._opening, self._held, self._strip = Opening.INSIDE, start[len(BEGIN) :], True
        elif ended or not BEGIN.startswith(start):
            self._opening = Opening.CLOSED

    def _think(self, ended: bool) -> str:
        before, end, after = self._held.partition(END)
        if end:
            self._held = before.rstrip()
            thought = self._stripped()
            self._opening, self._held, self._strip = Opening.CLOSED, after, True
            return thought
        size = 0 if ended else next((n for n in range(len(END) - 1, 0, -1) if before.endswith(END[:n])), 0)
        body = before[: len(before) - size].rstrip()
        rest = before[len(body) :]  # white space may turn out to stand before the end
        self._held = body
        thought = self._stripped()
        self._held = "" if ended else rest
        return thought

    def _stripped(self) -> str:
        """All that is held, without white space that is to be left out."""
        text, self._held = self._held, ""
        if self._strip:
            text = text.lstrip()
            self._strip = not text
        return text


class ThoughtTokens:
    """Tells which tokens of one answer are thoughts, from the one that completes their begin to the one that completes
    their end; the same however the tokens come."""

    def __init__(self, opening: Opening, tokenizer: Tokenizer) -> None:
        self._opening = opening
        self._tokenizer = tokenizer
        self._said = b""

    def is_thought(self, token: int) -> bool:
        """Told of each token in turn."""
        if self._opening is Opening.CLOSED:
            return False
        self._said += self._tokenizer.token_bytes(token)
        if self._opening is Opening.OPEN:
            begun = self._said.lstrip()
            if not begun.startswith(BEGIN.encode()):
                self._opening = Opening.OPEN if BEGIN.encode().startswith(begun) else Opening.CLOSED
                return False
            self._opening, self._said = Opening.INSIDE, begun[len(BEGIN) :]
        if END.encode() in self._said:
            self._opening = Opening.CLOSED
        self._said = self._said[-len(END) :]
        return True
