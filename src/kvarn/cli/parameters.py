"""Plain option values without the validation library that typer would import for them, 70 ms before all else."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin, get_type_hints

_INTEGER = re.compile(r"-?[0-9]{1,18}")
_DECIMAL = re.compile(r"-?[0-9]{1,18}(\.[0-9]{1,18})?")


def convert_plainly(command: Any, callback: Callable[..., Any]) -> None:
    """Lets plain values of a built command's parameters pass as they are, and all others go typer's way.

    Plain are: what is already of the annotated type, a number in plain digits, and None where no value is needed.
    callback: the function behind the command, whose annotations say what is wanted.
    """
    hints = get_type_hints(callback, include_extras=True)
    for parameter in command.params:
        wanted = _wanted(hints.get(parameter.name))
        if wanted and not parameter.multiple and parameter.nargs == 1:
            parameter.process_value = _process(parameter, parameter.process_value, wanted)
    make_help = command.get_help_option

    def help_option(context: Any) -> Any:
        option = make_help(context)
        if option is not None and "process_value" not in vars(option):
            option.process_value = _process(option, option.process_value, frozenset({bool}))
        return option

    command.get_help_option = help_option


def _wanted(hint: Any) -> frozenset[type]:
    """The plain types that a parameter may have; none where it has more rules than its type."""
    if get_origin(hint) is not Annotated:
        return frozenset()
    annotation, info = get_args(hint)[:2]
    if any(getattr(info, rule, None) is not None for rule in ("min", "max", "parser", "click_type")):
        return frozenset()
    types = set(get_args(annotation) or [annotation])
    return frozenset(types) if types <= {str, int, float, bool, type(None)} else frozenset()


def _process(parameter: Any, process: Callable[[Any, Any], Any], wanted: frozenset[type]) -> Callable[[Any, Any], Any]:
    def process_value(context: Any, value: Any) -> Any:
        if type(value) is str and wanted <= {int, type(None)} and _INTEGER.fullmatch(value):
            value = int(value)
        elif type(value) is str and wanted <= {float, type(None)} and _DECIMAL.fullmatch(value):
            value = float(value)
        elif type(value) not in wanted and (value is not None or parameter.required):
            return process(context, value)
        return value if parameter.callback is None else parameter.callback(context, parameter, value)

    return process_value
