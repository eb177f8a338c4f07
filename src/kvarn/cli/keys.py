"""`kvarn keys`: the file of keys that `kvarn serve --keys-file` lets in."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvarn.errors import ConfigError

EPILOG = """\b
Examples:
  kvarn keys add ann --keys-file keys.toml --requests-per-minute 600 --tokens-per-minute 200000
  kvarn keys add batch --keys-file keys.toml --priority 10 --max-concurrency 4
  kvarn keys list --keys-file keys.toml
  kvarn keys remove ann --keys-file keys.toml
  echo KEY | kvarn keys check --keys-file keys.toml --stdin
  kvarn serve --keys-file keys.toml --policy priority
\b
The file holds digests, not keys: a key is printed once, when it is added. A running server reads the file again
within a second of a change; requests in flight go on, and a file that is wrong is not taken.
"""
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, epilog=EPILOG, help="Manage the keys of `kvarn serve`.")

KeysFile = Annotated[
    Path, typer.Option(help="The file: TOML, or JSON where its name ends in .json.", envvar="KVARN_KEYS_FILE")
]
Name = Annotated[str, typer.Argument(help="Name of the key, in logs and tables: letters, digits, - and _.")]


@app.command()
def add(
    name: Name,
    keys_file: KeysFile,
    tenant: Annotated[
        str | None, typer.Option(help="Keys of one tenant share fair shares and cached prefixes; default: the name.")
    ] = None,
    priority: Annotated[
        int | None,
        typer.Option(help="Of its requests, and the most urgent (smallest) they may ask for; 0 unless given."),
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Unset: no such limit.")] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Of prompts and answers together. Unset: no such limit.")
    ] = None,
    max_concurrency: Annotated[int | None, typer.Option(help="Requests at the same time. Unset: no limit.")] = None,
    cache_salt: Annotated[
        str | None, typer.Option(help="That of requests without one: splits a tenant's cached prefixes.")
    ] = None,
    keep_alive: Annotated[
        bool, typer.Option("--keep-alive", help="Its requests may say how long their model stays in memory.")
    ] = False,
) -> None:
    """Make a key, and print it: it is kept nowhere. The file is made where it is not there."""
    from kvarn.server.keys.file import add_key

    limits: dict[str, str | int | None] = {
        "tenant": tenant,
        "priority": priority,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_concurrency": max_concurrency,
        "cache_salt": cache_salt,
        "keep_alive": keep_alive or None,
    }
    given = {field: value for field, value in limits.items() if value is not None}
    typer.echo(add_key(keys_file, name, **given))
    typer.secho(f"{keys_file} lets {name!r} in. The key is kept nowhere: this was the time to copy it.", err=True)


@app.command("list")
def list_keys(keys_file: KeysFile) -> None:
    """List names and limits."""
    from kvarn.server.keys.file import read_keys

    rows: list[tuple[str, ...]] = [("name", "tenant", "priority", "requests/min", "tokens/min", "concurrency")]
    for key in read_keys(keys_file).keys:
        limits = (key.requests_per_minute, key.tokens_per_minute, key.max_concurrency)
        rows.append((key.name, key.tenant, str(key.priority), *("-" if n is None else str(n) for n in limits)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        left = zip(row[:2], widths[:2], strict=True)
        right = zip(row[2:], widths[2:], strict=True)
        typer.echo("  ".join([*(text.ljust(w) for text, w in left), *(text.rjust(w) for text, w in right)]).rstrip())


@app.command()
def remove(name: Name, keys_file: KeysFile) -> None:
    """Take a key out: a running server refuses it within a second."""
    from kvarn.server.keys.file import remove_key

    remove_key(keys_file, name)
    typer.echo(f"{keys_file} does not let {name!r} in any more.")


@app.command()
def check(
    keys_file: KeysFile,
    stdin: Annotated[
        bool, typer.Option("--stdin", help="Read a key from standard input and say whose it is.")
    ] = False,
) -> None:
    """Say whether the file is good, or whose a key is; exit code 1 where not."""
    from kvarn.server.keys.file import read_keys

    keys = read_keys(keys_file)
    if not stdin:
        typer.echo(f"{keys_file} is good: {len(keys.keys)} keys.")
        return
    found = keys.find(sys.stdin.readline().strip())
    if found is None:
        raise ConfigError(f"{keys_file} has no such key")
    typer.echo(found.name)
