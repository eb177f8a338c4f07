"""`kvarn tokenize`: text on stdin, token ids on stdout."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

EPILOG = """\b
Examples:
  echo -n "Hello world" | kvarn tokenize smollm2-135m-instruct
  kvarn tokenize vocab-only.gguf --json < text.txt
  echo -n "<|im_start|>user" | kvarn tokenize smollm2-135m-instruct --parse-special
"""


def command(
    model: Annotated[
        str, typer.Argument(help="A name from `kvarn models`, a folder, or a .gguf file (a vocabulary is enough).")
    ],
    add_special: Annotated[
        bool, typer.Option("--add-special", help="Add BOS and EOS as the vocabulary wants.")
    ] = False,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Special tokens spelt out in the text become tokens.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help='Print {"ids": […]}.')] = False,
) -> None:
    """Turn text on stdin into token ids."""
    from kvarn.cli.progress import resolve_with_progress
    from kvarn.errors import RequestError
    from kvarn.text import load_tokenizer
    from kvarn.weights import open_model

    path = resolve_with_progress(model, quiet=as_json or not sys.stderr.isatty())
    with open_model(path) as files:
        tokenizer = load_tokenizer(files)
    data = sys.stdin.buffer.read()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not UTF-8 at byte {error.start}", field="stdin") from error
    ids = tokenizer.encode(text, add_special_tokens=add_special, parse_special=parse_special)
    if as_json:
        print(json.dumps({"ids": ids}))
        return
    for token in ids:
        print(f"{token:>8}  {tokenizer.token_bytes(token).decode(errors='replace')!r}")
    print(f"{len(ids)} tokens", file=sys.stderr)
