"""`ChatTemplate`: a model's Jinja templates, compiled once, rendered within bounds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta

from kvarn.errors import RequestError, TemplateError
from kvarn.text.sandbox import BoundedEnvironment, Budget
from kvarn.text.sources import DEFAULT, TOOL_USE

MAX_TEMPLATE_CHARS = 256 << 10
MAX_TIME_PATTERN_CHARS = 100
RESERVED = frozenset({"messages", "tools", "add_generation_prompt"})
"""Variables that callers set by name."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For models without a template whose vocabulary has these two tokens."""
PLAIN = (
    "{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""For all others: a transcript ("User: …", a blank line, "Assistant:")."""


class ChatTemplate:
    """A model's templates. Thread-safe: it renders one conversation at a time.

    sources: Jinja texts by name; "default" is needed, "tool_use" is taken where there are tools. tokens: the special
    tokens that templates name (`bos_token`, …). now: the clock behind `strftime_now`.

    Raises TemplateError where a source is too long or no template.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        tokens: Mapping[str, str] | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self.sources = dict(sources)
        self._tokens = dict(tokens or {})
        self._environment = BoundedEnvironment()
        self._environment.globals["strftime_now"] = _strftime(now)
        self._lock = threading.Lock()
        if DEFAULT not in self.sources:
            raise TemplateError(f"none of the model's chat templates ({', '.join(self.sources)}) is named {DEFAULT!r}")
        self._templates: dict[str, tuple[jinja2.Template, frozenset[str]]] = {}
        self._compiled(DEFAULT)

    @property
    def source(self) -> str:
        """The Jinja text of the usual template."""
        return self.sources[DEFAULT]

    def variables(self, *, tools: bool = False) -> Collection[str]:
        """Names that the template reads."""
        return self._compiled(self._name(tools))[1]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as one text.

        Raises RequestError for tools or variables that the template does not read, and TemplateError where it refuses
        the messages, fails, or exceeds its bounds.
        """
        template, known = self._compiled(self._name(bool(tools)))
        if tools and "tools" not in known:
            raise RequestError("the model's chat template has no place for tools", field="tools")
        for name in variables or {}:
            if name in RESERVED or name not in known:
                free = sorted(known - RESERVED - self._tokens.keys() - self._environment.globals.keys())
                raise RequestError(
                    f"{name!r} is no variable of the model's chat template (it has: {', '.join(free) or 'none'})",
                    field=f"chat_template_kwargs.{name}",
                )
        given = {"messages": list(messages), "tools": list(tools) if tools else None, "documents": None}
        return self._run(
            template, {**self._tokens, **given, **(variables or {}), "add_generation_prompt": add_generation_prompt}
        )

    def _name(self, tools: bool) -> str:
        return TOOL_USE if tools and TOOL_USE in self.sources else DEFAULT

    def _compiled(self, name: str) -> tuple[jinja2.Template, frozenset[str]]:
        if name not in self._templates:
            source = self.sources[name]
            if len(source) > MAX_TEMPLATE_CHARS:
                raise TemplateError(
                    f"the chat template has {len(source)} characters, at most {MAX_TEMPLATE_CHARS} are allowed"
                )
            try:
                tree = self._environment.parse(source)
                known = frozenset(meta.find_undeclared_variables(tree))
                self._templates[name] = self._environment.from_string(source), known
            except (jinja2.TemplateError, RecursionError, MemoryError, ValueError, SyntaxError) as error:
                raise TemplateError(f"the chat template is invalid: {_describe(error)}") from error
        return self._templates[name]

    def _run(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        with self._lock:
            try:
                self._environment.budget = Budget.for_input(dict(variables))
                return self._environment.joined(template.generate(**variables))
            except TemplateError:
                raise
            except Exception as error:  # a template can raise whatever Python can
                raise TemplateError(f"the chat template failed: {_describe(error)}") from error


def fallback_template(special: Collection[str], tokens: Mapping[str, str]) -> ChatTemplate:
    """What a model without a template gets: `CHATML` where its vocabulary has ChatML's tokens, else `PLAIN`."""
    source = CHATML if {"<|im_start|>", "<|im_end|>"} <= set(special) else PLAIN
    return ChatTemplate({DEFAULT: source}, tokens)


def _describe(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it nests too deep"
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno}: {error.message}"
    return f"{type(error).__name__}: {str(error)[:300]}"


def _strftime(now: Callable[[], datetime]) -> Callable[[str], str]:
    def strftime_now(pattern: str) -> str:
        if len(pattern) > MAX_TIME_PATTERN_CHARS or any(character.isdigit() for character in pattern):
            raise TemplateError(f"strftime_now({pattern[:40]!r}) in the chat template: too long, or with a width")
        return now().strftime(pattern)

    return strftime_now
