"""A Jinja environment for templates that nobody vouches for: immutable sandbox, and a bound on every way to grow.

Jinja's own sandbox keeps a template from reaching Python's inside, but not from using all time and memory. So loops
count their iterations against a budget, and whatever makes long strings or lists (repetition, concatenation, padding,
replacement, joining) is checked before it is made. Templates run in the thread that renders, so all bounds are counts, not clocks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvarn.errors import TemplateError

MAX_STEPS = 1_000_000
"""Loop iterations in one rendering."""
MAX_CALLS = 1_000_000
MAX_CHARS = 8 << 20
"""Characters (or items) of any one value a template makes."""
MAX_POWER = 64
WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\d{4,}|\*)|:[^{}]*\d{4,}|\{[^{}]*\{")
PADDING = frozenset({"ljust", "rjust", "center", "zfill", "expandtabs"})
REMOVED_FILTERS = ("center", "format", "wordwrap", "urlize", "xmlattr", "pprint", "filesizeformat", "random")


class Budget:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self.steps = MAX_STEPS
        self.calls = MAX_CALLS

    def step(self, count: int = 1) -> None:
        """Takes loop iterations. Raises TemplateError when they are used up."""
        self.steps -= count
        if self.steps < 0:
            raise TemplateError(f"the chat template loops more than {MAX_STEPS} times")

    def call(self) -> None:
        """Takes one call. Raises TemplateError when they are used up."""
        self.calls -= 1
        if self.calls < 0:
            raise TemplateError(f"the chat template makes more than {MAX_CALLS} calls")


def check_size(size: int) -> None:
    """Raises TemplateError for a value longer than a template may make."""
    if size > MAX_CHARS:
        raise TemplateError(f"the chat template makes a value of {size} characters, at most {MAX_CHARS} are allowed")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 0


class _Generation(Extension):
    """`{% generation %}`, with which some templates mark the assistant's part: its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment. `budget` is replaced for every rendering; an environment renders one template at a time."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        self.budget = Budget()
        for name in REMOVED_FILTERS:
            del self.filters[name]
        for name in ("join", "replace", "indent"):
            self.filters[name] = self._checked_filter(self.filters[name], name)
        self.filters["tojson"] = to_json
        self.filters["_bounded"] = self._bounded
        self.filters["_joined"] = self._joined
        self.globals["range"] = self._range
        self.globals.pop("lipsum", None)
        self.globals["raise_exception"] = raise_exception

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parses, then puts a counter into every loop and a check into every `~`."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "_bounded", [], [], None, None, lineno=loop.lineno)
        for parent in tree.find_all(nodes.Node):
            for field, value in parent.iter_fields():
                if isinstance(value, nodes.Concat):
                    setattr(parent, field, self._joining(value))
                elif isinstance(value, list):
                    value[:] = [self._joining(v) if isinstance(v, nodes.Concat) else v for v in value]
        tree.set_environment(self)
        return tree

    @staticmethod
    def _joining(concat: nodes.Concat) -> nodes.Filter:
        parts = nodes.List(concat.nodes, lineno=concat.lineno)
        return nodes.Filter(parts, "_joined", [], [], None, None, lineno=concat.lineno)

    def _bounded(self, values: Iterable[Any]) -> Iterable[Any]:
        if isinstance(values, str | list | tuple | dict | range):
            self.budget.step(len(values) + 1)
            return values
        return self._counted(values)

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.budget.step()
            yield value

    @staticmethod
    def _joined(parts: list[Any]) -> str:
        texts = [part if isinstance(part, str) else str(part) for part in parts]
        check_size(sum(map(len, texts)))
        return "".join(texts)

    @staticmethod
    def _range(*bounds: int) -> range:
        values = range(*bounds)
        if len(values) > MAX_STEPS:
            raise TemplateError(f"range of {len(values)} in the chat template, at most {MAX_STEPS} are allowed")
        return values

    def _checked_filter(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def checked(*arguments: Any, **keywords: Any) -> Any:
            values = [a for a in arguments if not isinstance(a, jinja2.nodes.EvalContext | jinja2.Environment)]
            values = [list(self._counted(v)) if isinstance(v, Iterator) else v for v in values]
            self._check_growth(name, [*values, *keywords.values()])
            replaced = iter(values)
            passed = [
                a if isinstance(a, jinja2.nodes.EvalContext | jinja2.Environment) else next(replaced) for a in arguments
            ]
            result = function(*passed, **keywords)
            check_size(_size(result))
            return result

        for marker in ("jinja_pass_arg",):
            if hasattr(function, marker):
                setattr(checked, marker, getattr(function, marker))
        return checked

    @staticmethod
    def _check_growth(name: str, values: list[Any]) -> None:
        """Upper bounds, before anything is made, of what joining, replacing and indenting give."""
        if not values:
            return
        subject = values[0]
        others = max((len(v) if isinstance(v, str) else v if isinstance(v, int) else 0 for v in values[1:]), default=0)
        if name == "join" and isinstance(subject, list | tuple):
            check_size(sum(len(v) if isinstance(v, str) else 64 for v in subject) + others * len(subject))
        elif name in ("replace", "indent") and isinstance(subject, str):
            check_size(len(subject) + (subject.count("\n") if name == "indent" else len(subject) + 1) * others
                       if others > 1 else len(subject))  # fmt: skip

    def call(self, context: Any, obj: Any, *arguments: Any, **keywords: Any) -> Any:
        """Calls what the sandbox allows, within the budget. Raises TemplateError."""
        self.budget.call()
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str):
            if name in PADDING and any(isinstance(a, int) and a > 1000 for a in (*arguments, *keywords.values())):
                raise TemplateError(f"{name} to more than 1000 characters in the chat template")
            if name in ("format", "format_map") and WIDE_FORMAT.search(owner):
                raise TemplateError("a wide or nested format in the chat template")
            if name == "join" and arguments:
                items = list(self._counted(arguments[0]))
                check_size(sum(map(_size, items)) + len(owner) * len(items))
                arguments = (items, *arguments[1:])
            if name == "replace" and len(arguments) >= 2 and isinstance(arguments[1], str):
                check_size(len(owner) + owner.count(str(arguments[0])) * len(arguments[1]))
        result = super().call(context, obj, *arguments, **keywords)
        check_size(_size(result))
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Checks the size of a product, sum, power or format before it is computed."""
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if _size(value) and isinstance(times, int):
                    check_size(_size(value) * times)
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > 4096:
                raise TemplateError("a number of more than 4096 bits in the chat template")
        elif operator == "**" and (abs(right) > MAX_POWER or abs(left) > 1 << 32):
            raise TemplateError(f"a power above {MAX_POWER} in the chat template")
        elif operator == "+":
            check_size(_size(left) + _size(right))
        elif operator == "%" and isinstance(left, str):
            if WIDE_FORMAT.search(left):
                raise TemplateError("a wide format in the chat template")
            values = right if isinstance(right, tuple) else (right,)
            check_size(len(left) + sum(map(_size, values)) * max(left.count("%"), 1))
        return super().call_binop(context, operator, left, right)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, as chat templates are written for (transformers' `tojson`)."""
    if indent is not None and not 0 <= int(indent) <= 16:
        raise TemplateError("tojson may indent by at most 16 in the chat template")
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    check_size(len(text))
    return text


def raise_exception(message: str) -> None:
    """What a template calls to refuse the messages. Raises TemplateError."""
    raise TemplateError(f"the chat template refuses the messages: {str(message)[:500]}")
