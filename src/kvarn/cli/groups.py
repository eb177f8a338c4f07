"""Commands with many options: `--help` in groups, and options made from the fields of a record of settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand


class GroupedCommand(TyperCommand):
    """A command whose help lists options by their `rich_help_panel`, those without one first."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the sections of arguments and options."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            told = param.get_help_record(ctx)
            if told is None:
                continue
            usual = "Arguments" if param.param_type_name == "argument" else "Options"
            sections.setdefault(getattr(param, "rich_help_panel", None) or usual, []).append(told)
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def options_from(record: type, parameter: str, panel: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a command an option for each field of a dataclass; the command gets them as one record.

    record: its fields have metadata "help"; making one checks it. parameter: the command's, for the record.
    """
    hints = get_type_hints(record)
    options = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[hints[field.name], typer.Option(help=field.metadata["help"], rich_help_panel=panel)],
        )
        for field in fields(record)
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def call(**given: Any) -> Any:
            made = record(**{option.name: given.pop(option.name) for option in options})
            return command(**given, **{parameter: made})

        hints = get_type_hints(command, include_extras=True)
        own = [
            each.replace(annotation=hints[each.name], kind=inspect.Parameter.KEYWORD_ONLY)
            for each in inspect.signature(command).parameters.values()
            if each.name != parameter
        ]
        call.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        call.__annotations__ = {each.name: each.annotation for each in (*own, *options)}
        return call

    return decorate
