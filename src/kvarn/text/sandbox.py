"""A Jinja environment for templates that nobody vouches for.

Jinja's immutable sandbox keeps a template away from Python's inside and from its arguments, but lets it use all time
and memory. Here every operation that can make something takes its size from a budget before the thing is made, and
every loop iteration, call and comparison takes a little too. So one rendering does a bounded amount of work, whatever
the template: counts decide, so that the same template fails or passes everywhere, and a clock only as the last resort.

What has no use in a chat template and no cheap bound (some filters, most methods) is not there at all.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Joiner, Namespace

from kvarn.errors import TemplateError
from kvarn.text.template_filters import bounded_filters

MAX_WORK = 16 << 20
"""Units of work in one rendering: characters and elements read and made, plus `STEP` for each operation."""
WORK_FOR_INPUT = 64
"""Further units for each character and element of the messages."""
STEP = 32
MAX_VALUE = 2 << 20
"""Characters of one value, those of nested values included, beside twice those of the messages."""
MAX_ELEMENTS = 1 << 18
"""Elements of one value, those of nested values included, beside twice the size of the messages."""
ELEMENT = 4
"""Units of work to look at an element of a list."""
MAX_INPUT = 64 << 20
"""Characters and elements of the messages, tools and variables."""
MAX_DEPTH = 64
"""Nesting of lists and objects."""
MAX_BITS = 4096
MAX_SECONDS = 10.0
MAX_FORMAT_WIDTH = 1000

FILTERS = frozenset({
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby",
    "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe",
    "select", "selectattr", "sort", "string", "title", "trim", "truncate", "unique", "upper", "wordcount",
})  # fmt: skip
"""Jinja's own filters whose work is bounded by the size of what they are given and give."""
METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset({
        "capitalize", "casefold", "count", "endswith", "find", "format", "index", "isalnum", "isalpha", "isascii",
        "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip",
        "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip",
        "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper",
    }),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    LoopContext: frozenset({"changed", "cycle"}),
}  # fmt: skip
"""Methods that templates may call."""
CALLABLE = (Macro, LoopContext, BlockReference, Joiner, Undefined)
"""Objects that templates may call, beside the functions that the environment gives them."""
_PERCENT_FORMAT = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?")
_BRACE_FORMAT = re.compile(r"\{[^{}]*(?:\{|\d{4})")


class Budget:
    """The work that a rendering may still do, given the size of what it renders."""

    def __init__(self, input_size: int = 0) -> None:
        self._left = MAX_WORK + WORK_FOR_INPUT * input_size
        self._max_value = MAX_VALUE + 2 * input_size
        self._max_elements = MAX_ELEMENTS + 2 * input_size
        self._deadline = time.monotonic() + MAX_SECONDS

    @classmethod
    def for_input(cls, values: Any) -> Budget:
        """The budget for rendering these values. Raises TemplateError where they are too large."""
        return cls(cls(MAX_INPUT).measure(values))

    def take(self, size: int) -> None:
        """Takes one operation and what it reads or makes. Raises TemplateError where the budget is used up."""
        self._left -= STEP + size
        if self._left < 0 or time.monotonic() > self._deadline:
            raise TemplateError("the chat template does more work than a template may (is there an endless loop?)")

    def check_size(self, size: int) -> None:
        """Raises TemplateError for a value larger than a template may make."""
        if size > self._max_value:
            raise TemplateError(f"the chat template makes a text of more than {self._max_value} characters")

    def check_elements(self, count: int) -> None:
        """Raises TemplateError for a value of more elements than a template may make."""
        if count > self._max_elements:
            raise TemplateError(f"the chat template makes a list of more than {self._max_elements} elements")

    def measure(self, value: Any) -> int:
        """Characters and elements of a value with all that is nested in it, which is what printing it takes.

        Raises TemplateError for a value larger or nested deeper than a template may make.
        """
        size, elements, level = 0, 0, [value]
        for _ in range(MAX_DEPTH):
            following: list[Any] = []
            for item in level:
                if isinstance(item, str):
                    size += len(item)
                elif isinstance(item, range):
                    elements += len(item)
                elif isinstance(item, list | tuple):
                    following.extend(item)
                elif isinstance(item, dict):
                    following.extend(item)
                    following.extend(item.values())
                elif isinstance(item, int) and item.bit_length() > MAX_BITS:
                    raise TemplateError(f"the chat template makes a number of more than {MAX_BITS} bits")
                self.check_elements(elements + len(following))
            self.check_size(size)
            if not following:
                return size + elements
            elements += len(following)
            self.take(ELEMENT * len(following))
            level = following
        raise TemplateError(f"the chat template nests values deeper than {MAX_DEPTH}")


class _Generation(Extension):
    """`{% generation %}`, with which some templates mark the assistant's part: its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """Jinja's namespace, which is printed without what it holds (that may have any size)."""

    def __repr__(self) -> str:
        return "<Namespace>"


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Set `budget` before each rendering. An environment renders one template at a time."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[loopcontrols, _Generation])
        self.budget = Budget()
        """What the rendering under way may still do."""
        kept = {name: self._counted_filter(self.filters[name]) for name in FILTERS}
        self.filters = {**kept, **bounded_filters(self)}
        self.tests = {name: self._counted_test(test) for name, test in self.tests.items()}  # type: ignore[arg-type]
        globals_ = {name: self.globals[name] for name in ("dict", "joiner")}
        self.globals = {**globals_, "range": _range, "namespace": _Namespace, "raise_exception": raise_exception}
        self.concat = self.joined  # type: ignore[method-assign]
        self._no_context = Context(self, {}, None, {})

    # What the compiled template calls instead of plain Python.

    def tick(self) -> bool:
        """One statement or iteration; true."""
        self.budget.take(0)
        return True

    def made(self, value: Any) -> Any:
        """A value just made, measured."""
        self.budget.take(_own_size(value))
        if isinstance(value, str):
            self.budget.check_size(len(value))
        else:
            self.budget.measure(value)
        return value

    def joined(self, pieces: Iterable[Any]) -> str:
        """The pieces' texts as one, its size taken before it is made."""
        texts = [piece if isinstance(piece, str) else str(piece) for piece in pieces]
        size = sum(map(len, texts))
        self.budget.take(size)
        self.budget.check_size(size)
        return "".join(texts)

    def compared(self, value: Any) -> Any:
        """A value about to be compared or searched, which is quick for its size."""
        self.budget.take(_own_size(value) // (64 if isinstance(value, str) else 4))
        return value

    def concatenated(self, *values: Any) -> str:
        """What `~` makes."""
        return self.joined(values)

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        """The values, a step taken for each."""
        for value in values:
            self.budget.take(0)
            yield value

    def binary(self, operator: str, left: Any, right: Any) -> Any:
        """Computes an operation for a filter; see `call_binop`."""
        return self.call_binop(self._no_context, operator, left, right)

    def call(self, context: Context, obj: Any, /, *arguments: Any, **keywords: Any) -> Any:
        """Calls what templates may call. Raises TemplateError."""
        method = getattr(obj, "__wrapped__", obj)  # Jinja wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if owner is self:  # `tick`, `made`, … put in by `_parse`
            return obj(*arguments)
        self.budget.take(0)
        if owner is not None:
            allowed = next((names for kind, names in METHODS.items() if isinstance(owner, kind)), frozenset())
            if name not in allowed:
                raise TemplateError(f"{type(owner).__name__}.{name} is not available in chat templates")
        elif not isinstance(obj, CALLABLE) and not any(obj is function for function in self.globals.values()):
            raise TemplateError(f"{name or type(obj).__name__} cannot be called in chat templates")
        if isinstance(owner, str):
            arguments = self._before_method(owner, name, arguments, _given(keywords))
        elif isinstance(obj, Macro):  # it can get at them as `varargs` and `kwargs`
            self.budget.measure((arguments, _given(keywords)))
        result = super().call(context, obj, *arguments, **keywords)
        return self.made(list(result) if isinstance(result, KeysView | ValuesView | ItemsView) else result)

    def _before_method(
        self, text: str, name: str, arguments: tuple[Any, ...], keywords: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        """Takes what a method of text is about to make. Returns its arguments, iterators read."""
        self.budget.take(len(text))
        if name == "replace" and len(arguments) >= 2:
            self.before_replace(text, arguments[0], arguments[1])
        elif name == "join" and arguments:
            items = list(self.counted(arguments[0]))
            self.budget.take(sum(map(_own_size, items)) + len(text) * len(items))
            return (items, *arguments[1:])
        elif name == "format":
            if _BRACE_FORMAT.search(text):
                raise TemplateError(f"a nested format, or one wider than {MAX_FORMAT_WIDTH}, in the chat template")
            values = [*arguments, *keywords.values()]
            self.budget.take((text.count("{") + 1) * sum(map(self.budget.measure, values)))
        return arguments

    def before_replace(self, text: str, old: Any, new: Any) -> None:
        """Takes what replacing `old` by `new` in `text` makes at most."""
        if isinstance(old, str) and isinstance(new, str):
            self.budget.take(len(text) + (text.count(old) if old else len(text) + 1) * len(new))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Computes an operation, the size of its result taken before it is made. Raises TemplateError."""
        if operator == "*":
            self._before_product(left, right)
        elif operator == "**":
            self._before_power(left, right)
        elif operator == "%" and isinstance(left, str):
            self._before_percent(left, right)
        else:
            self.budget.take(_own_size(left) + _own_size(right))
        return self.made(super().call_binop(context, operator, left, right))

    def _before_product(self, left: Any, right: Any) -> None:
        for value, times in ((left, right), (right, left)):
            if isinstance(times, int) and not isinstance(value, int | float):
                self.budget.take(_own_size(value) * max(times, 0))

    def _before_power(self, base: Any, exponent: Any) -> None:
        if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > MAX_BITS:
            raise TemplateError(f"the chat template makes a number of more than {MAX_BITS} bits")

    def _before_percent(self, text: str, values: Any) -> None:
        for match in _PERCENT_FORMAT.finditer(text):
            if any(width == "*" or (width and int(width[:9]) > MAX_FORMAT_WIDTH) for width in match.groups()):
                raise TemplateError(f"a format wider than {MAX_FORMAT_WIDTH} in the chat template")
        self.budget.take(len(text) + (text.count("%") + 1) * self.budget.measure(values))

    def _counted_filter(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter of Jinja's that takes what it reads and makes from the budget."""

        @wraps(function)
        def counted(*arguments: Any, **keywords: Any) -> Any:
            for argument in arguments:
                if not isinstance(argument, Context | nodes.EvalContext | jinja2.Environment):
                    self.budget.take(_own_size(argument) * (1 if isinstance(argument, str) else ELEMENT))
            result = function(*arguments, **keywords)
            return self.counted(result) if isinstance(result, Iterator) else self.made(result)

        return counted

    def _counted_test(self, function: Callable[..., bool]) -> Callable[..., bool]:
        @wraps(function)
        def counted(*arguments: Any) -> bool:
            for argument in arguments:
                self.compared(argument)
            return function(*arguments)

        return counted

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parses, and puts the counting into the tree."""
        tree = super()._parse(source, name, filename)
        counted: nodes.Template = _Counting().visit(tree)
        counted.set_environment(self)
        return counted


class _Counting(jinja2.visitor.NodeTransformer):
    """Puts `tick` into loops and conditions, and the environment's other methods around what makes or compares."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("tick", []), lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(_call("tick", []), node.test, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concatenated", node.nodes, node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _call("compared", [node.expr], node.lineno)
        for operand in node.ops:
            operand.expr = _call("compared", [operand.expr], node.lineno)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _call("made", [node], node.lineno)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self.visit_List(node)  # type: ignore[arg-type]

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return node if node.ctx == "store" else _call("made", [node], node.lineno)

    def visit_If(self, node: nodes.If) -> nodes.Node:
        self.generic_visit(node)
        node.test = nodes.And(_call("tick", []), node.test, lineno=node.lineno)
        return node


def _call(method: str, arguments: list[nodes.Expr], line: int | None = None) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None, lineno=line or 0)


def _given(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """A call's keywords without those that Jinja's compiler adds."""
    return {name: value for name, value in keywords.items() if name not in ("_loop_vars", "_block_vars")}


def _own_size(value: Any) -> int:
    """Characters or elements of a value, what is nested in it left out."""
    return len(value) if isinstance(value, str | list | tuple | dict | range) else 1


def _range(*bounds: int) -> range:
    values = range(*bounds)
    if len(values) > MAX_ELEMENTS:
        raise TemplateError(f"range of {len(values)} in the chat template, at most {MAX_ELEMENTS} is allowed")
    return values


def raise_exception(message: Any) -> None:
    """What a template calls to refuse the messages. Raises TemplateError."""
    raise TemplateError(f"the chat template refuses the messages: {str(message)[:500]}")
