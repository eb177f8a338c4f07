"""`kvarn chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from kvarn.cli.options import (
    DEFAULT_MODEL,
    ComputeType,
    Device,
    MaxModelLen,
    MaxTokens,
    MinP,
    ModelArgument,
    PackedCacheBytes,
    Seed,
    Temperature,
    Threads,
    TopK,
    TopP,
    WeightForm,
    load_llm,
    sampling_params,
    within,
)
from kvarn.cli.speculative import Speculative, speculative_config
from kvarn.cli.structured import JsonSchema, Regex, structured
from kvarn.errors import RequestError

EPILOG = """\b
Examples:
  kvarn chat
  kvarn chat qwen2.5-coder-0.5b-instruct --system "You answer in one sentence."
\b
In the conversation:
  /clear    forget what was said         /again   answer the last question anew
  /stats    time and tokens on or off    /quit    leave (or Ctrl-D); Ctrl-C stops an answer
"""


def command(
    model: ModelArgument = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    threads: Threads = 0,
    device: Device = "cpu",
    dtype: ComputeType = None,
    weights: WeightForm = None,
    max_model_len: MaxModelLen = None,
    packed_cache_bytes: PackedCacheBytes = None,
    speculative: Speculative = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
) -> None:
    """Talk with a model in the terminal."""
    sampling = sampling_params(max_tokens, temperature, top_p, top_k, min_p, seed)
    sampling = structured(sampling, json_schema, regex)
    llm = load_llm(
        model,
        threads=threads,
        device=device,
        dtype=dtype,
        weights=weights,
        max_model_len=max_model_len,
        max_num_seqs=1,
        packed_cache_bytes=packed_cache_bytes,
        speculative=speculative_config(speculative),
        quiet=False,
    )
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    show_stats = False
    typer.secho(f"{model} · up to {llm.max_model_len} tokens · /quit to leave", dim=True, err=True)
    try:
        while True:
            line = _ask()
            if line is None or line == "/quit":
                return
            if line == "/clear":
                messages = list(opening)
                continue
            if line == "/stats":
                show_stats = not show_stats
                continue
            if line == "/again":
                if len(messages) < 2 or messages[-1]["role"] != "assistant":
                    typer.secho("nothing to answer anew yet", fg="yellow", err=True)
                    continue
                messages.pop()
            elif line.startswith("/"):
                typer.secho(f"no command {line}; there are /clear /again /stats /quit", fg="yellow", err=True)
                continue
            elif line:
                messages.append({"role": "user", "content": line})
            else:
                continue
            started = time.perf_counter()
            answer, num_tokens = "", 0
            try:
                token_ids = llm.tokenizer.encode_chat(messages)
                for output in llm.stream(token_ids, within(sampling, len(token_ids), llm.max_model_len)):
                    for sequence in output.outputs:
                        answer += sequence.text
                        num_tokens += len(sequence.token_ids)
                        sys.stdout.write(sequence.text)
                        sys.stdout.flush()
            except KeyboardInterrupt:
                pass
            except RequestError as error:
                messages.pop()
                typer.secho(f"{error} (/clear starts anew)", fg="red", err=True)
                continue
            print()
            if show_stats:
                seconds = time.perf_counter() - started
                typer.secho(f"{num_tokens} tokens in {seconds:.2f} s", dim=True, err=True)
            messages.append({"role": "assistant", "content": answer})
    finally:
        llm.close()


def _ask() -> str | None:
    """One line from the person, stripped; None at the end of input."""
    try:
        return input("\n> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        return None
