"""Options converted without typer's validation library are what typer makes of them."""

from typing import Annotated

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command

from kvarn.cli.parameters import convert_plainly

SEEN = []


def command(
    text: str,
    count: Annotated[int, typer.Option()] = 3,
    maybe: Annotated[int | None, typer.Option()] = None,
    share: Annotated[float, typer.Option()] = 0.5,
    few: Annotated[int | None, typer.Option(min=1)] = None,
    flag: Annotated[bool, typer.Option("--flag")] = False,
) -> None:
    SEEN.append((text, count, maybe, share, few, flag))


def built(plain):
    app = typer.Typer(add_completion=False)
    app.command()(command)
    made = get_command(app)
    if plain:
        convert_plainly(made, command)
    return made


def outcome(made, arguments):
    SEEN.clear()
    try:
        made.main(arguments, standalone_mode=False)
    except Exception as error:
        return type(error).__name__, str(error)
    return repr(SEEN)


VALUES = st.one_of(
    st.integers(-(10**20), 10**20).map(str),
    st.floats().map(str),
    st.sampled_from(
        ["", "1_0", " 7", "+5", "0x10", "١٢", "1e3", "nan", "007", "-0", "-0.0", "1.", ".5", "x", "1" * 30]
    ),
)


@given(option=st.sampled_from(["count", "maybe", "share", "few"]), value=VALUES)
def test_values_are_those_of_typer(option, value):
    arguments = [f"--{option}={value}", "hi"]
    assert outcome(built(True), arguments) == outcome(built(False), arguments)


@pytest.mark.parametrize("arguments", [["hi"], ["hi", "--flag"], [], ["hi", "--count"], ["7", "--no-such"]])
def test_presence_is_as_typer_has_it(arguments):
    assert outcome(built(True), arguments) == outcome(built(False), arguments)
