"""`kvarn tokenize`: text on stdin, token ids on stdout, or the other way."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from kvarn.errors import RequestError

if TYPE_CHECKING:
    from kvarn.text import Tokenizer

EPILOG = """\b
Examples:
  echo -n "Hello world" | kvarn tokenize smollm2-135m-instruct
  kvarn tokenize vocabulary.gguf --json < text.txt
  echo -n "<|im_start|>user" | kvarn tokenize smollm2-135m-instruct --parse-special
  echo "19556 905" | kvarn tokenize smollm2-135m-instruct --decode
"""


def command(
    model: Annotated[
        str, typer.Argument(help="A name from `kvarn models`, a folder, or a .gguf file (a vocabulary is enough).")
    ],
    add_special: Annotated[
        bool, typer.Option("--add-special", help="Add BOS and EOS as the vocabulary wants them.")
    ] = False,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Special tokens spelt out in the text become tokens.")
    ] = False,
    decode: Annotated[
        bool, typer.Option("--decode", help='Read ids (numbers, or {"ids": […]}) and print their text.')
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help='Print {"ids": […]}, or {"text": …} with --decode.')] = False,
) -> None:
    """Turn text on stdin into token ids, just as it is: no BOS, special tokens are text, unless asked."""
    from kvarn.cli.progress import resolve_with_progress
    from kvarn.text import load_tokenizer
    from kvarn.weights import open_model

    if decode and (add_special or parse_special):
        raise typer.BadParameter("goes with neither --add-special nor --parse-special", param_hint="--decode")
    path = resolve_with_progress(model, quiet=as_json or not sys.stderr.isatty())
    with open_model(path) as files:
        tokenizer = load_tokenizer(files)
    if decode:
        text = tokenizer.decode(_ids(_stdin_text(), tokenizer.vocab_size), skip_special_tokens=False)
        print(json.dumps({"text": text}) if as_json else text)
        return
    ids = tokenizer.encode(_stdin_text(), add_special_tokens=add_special, parse_special=parse_special)
    if as_json:
        print(json.dumps({"ids": ids}))
    else:
        _print_table(tokenizer, ids)


def _stdin_text() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not UTF-8 at byte {error.start}", field="stdin") from error


def _ids(text: str, size: int) -> list[int]:
    """The ids of a list of numbers, or of a JSON object with `ids`. Raises RequestError."""
    try:
        found = json.loads(text)["ids"] if text.lstrip().startswith("{") else re.findall(r"[^\s,\[\]]+", text)
        ids = [int(number) for number in found]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RequestError('stdin must hold token ids, or {"ids": […]}', field="stdin") from error
    for token in ids:
        if not 0 <= token < size:
            raise RequestError(f"token ids must be 0 to {size - 1}, not {token}", field="stdin")
    return ids


def _shown(piece: bytes) -> str:
    """A piece of text as Python writes it; as bytes where it is no whole text."""
    try:
        return repr(piece.decode())
    except UnicodeDecodeError:
        return repr(piece)


def _print_table(tokenizer: Tokenizer, ids: list[int]) -> None:
    for token in ids:
        note = "  special" if tokenizer.is_special(token) else ""
        print(f"{token:>8}  {_shown(tokenizer.token_bytes(token))}{note}")
    print(f"{len(ids)} tokens", file=sys.stderr)
