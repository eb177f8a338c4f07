"""Filters of chat templates that Jinja has none of, or none that could be bounded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from kvarn.errors import TemplateError

MAX_INDENT = 16


class Work(Protocol):
    """What the filters need of the environment: ways to make values within its budget."""

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        """The values, a step taken for each."""
        ...

    def joined(self, pieces: Iterable[Any]) -> str:
        """The pieces' texts as one, its size taken before it is made."""
        ...

    def before_replace(self, text: str, old: Any, new: Any) -> None:
        """Takes what replacing `old` by `new` in `text` makes at most."""
        ...

    def binary(self, operator: str, left: Any, right: Any) -> Any:
        """Computes an operation within the budget."""
        ...


def bounded_filters(work: Work) -> dict[str, Callable[..., Any]]:
    """join, replace, indent, format, sum and tojson, as Jinja and transformers define them."""

    def join(values: Iterable[Any], d: Any = "", attribute: str | None = None) -> str:
        pieces: list[Any] = []
        for value in work.counted(values):
            pieces += [d, value if attribute is None else _item(value, attribute)]
        return work.joined(pieces[1:])

    def replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
        subject, before, after = str(text), str(old), str(new)
        work.before_replace(subject, before, after)
        return subject.replace(before, after, -1 if count is None else count)

    def indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        margin = width if isinstance(width, str) else " " * _indent(width)
        lines = str(text).splitlines()
        pieces: list[str] = []
        for number, line in enumerate(work.counted(lines)):
            pieces += ["\n" if number else "", margin if (number or first) and (line or blank) else "", line]
        return work.joined(pieces)

    def percent(text: Any, *values: Any, **named: Any) -> Any:
        return work.binary("%", str(text), named or values)

    def total(values: Iterable[Any], attribute: str | None = None, start: Any = 0) -> Any:
        for value in work.counted(values):
            start = work.binary("+", start, value if attribute is None else _item(value, attribute))
        return start

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        if separators is not None and sum(map(len, separators)) > MAX_INDENT:
            raise TemplateError(f"tojson with separators longer than {MAX_INDENT} in the chat template")
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii,
            indent=None if indent is None else _indent(indent),
            separators=separators,
            sort_keys=sort_keys,
        )
        return work.joined(work.counted(encoder.iterencode(value)))

    return {"join": join, "replace": replace, "indent": indent, "format": percent, "sum": total, "tojson": tojson}


def _indent(width: Any) -> int:
    if not isinstance(width, int) or not 0 <= width <= MAX_INDENT:
        raise TemplateError(f"an indent of {str(width)[:20]} in the chat template, at most {MAX_INDENT} is allowed")
    return width


def _item(value: Any, name: str) -> Any:
    return value.get(name, "") if isinstance(value, Mapping) else ""
