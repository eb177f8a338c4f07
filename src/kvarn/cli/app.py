"""The root of the command line: finds a command's module by name, and turns expected errors into one clear line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command_from_info
from typer.models import CommandInfo

from kvarn import __version__
from kvarn.cli.groups import GroupedCommand
from kvarn.cli.parameters import convert_plainly
from kvarn.errors import KvarnError

COMMANDS = {
    "run": "kvarn.cli.run",
    "chat": "kvarn.cli.chat",
    "serve": "kvarn.cli.serve",
    "keys": "kvarn.cli.keys",
    "pull": "kvarn.cli.pull",
    "models": "kvarn.cli.models",
    "plan": "kvarn.cli.plan",
    "tokenize": "kvarn.cli.tokenize",
    "eval": "kvarn.cli.eval",
    "spec": "kvarn.cli.spec",
    "bench": "kvarn.cli.bench",
    "profile": "kvarn.cli.profile",
    "simulate": "kvarn.cli.simulate",
    "trace": "kvarn.cli.trace",
}
"""Command name to module, in the order of `--help`."""

EPILOG = """\b
First steps:
  kvarn run "Why is the sky blue?"      one answer, from a small model that is pulled on first use
  kvarn chat                            a conversation in the terminal
  kvarn serve                           an OpenAI-compatible server on http://127.0.0.1:8000
  kvarn plan MODEL --max-model-len 8192 --batch 32      what it will take, before it is loaded
  kvarn bench latency MODEL             how fast it is here, and how far from the machine's limits
"""


class LazyGroup(TyperGroup):
    """A group that imports a command's module only when the command is run (or listed in `--help`)."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        convert_plainly(self, root)

    def list_commands(self, _ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """All command names."""
        return list(COMMANDS)

    def get_command(self, _ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        """The command of that name, built from its module's `command`, or its typer `app` where it has several."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name])
        if hasattr(module, "app"):
            group = typer.main.get_group(module.app)
            group.name = cmd_name
            return group
        epilog = getattr(module, "EPILOG", None)
        info = CommandInfo(name=cmd_name, callback=module.command, cls=GroupedCommand, epilog=epilog)
        command = get_command_from_info(info, pretty_exceptions_short=True, rich_markup_mode=None)
        convert_plainly(command, module.command)
        return command


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, rich_markup_mode=None, add_completion=False, epilog=EPILOG)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"kvarn {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run language models: the same bits in any batch, a plan before the load, seconds to the first token."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. Expected errors end with one line on stderr and exit code 1, Ctrl-C with 130."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="kvarn")
    except KvarnError as error:
        typer.secho(f"kvarn: {error}", fg="red", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
