"""Options that several commands share, and the way from options to a loaded `LLM`."""

from __future__ import annotations

import dataclasses
import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvarn.errors import ConfigError
from kvarn.request import SamplingParams

if TYPE_CHECKING:
    from kvarn.config import SpeculativeConfig
    from kvarn.engine import LLM

DEFAULT_MODEL = "smollm2-135m-instruct"

ModelArgument = Annotated[str, typer.Argument(help="A name from `kvarn models`, a .gguf file, or a folder.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option(help="0: always the most likely token.")]
TopP = Annotated[float, typer.Option(help="Sample from the smallest set of tokens with this probability.")]
TopK = Annotated[int, typer.Option(help="Sample from this many most likely tokens; 0: all.")]
MinP = Annotated[float, typer.Option(help="Drop tokens below this share of the most likely one's probability.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same answer.")]
Threads = Annotated[int, typer.Option(help="Compute threads; 0: one for each physical core.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest prompt and answer together, in tokens.")]

MemoryUtilization = Annotated[float, typer.Option(help="Share of the available memory that may be taken.")]
KvCacheBytes = Annotated[
    str | None,
    typer.Option(
        help="Size of the KV cache, as 2GiB, 500MB or plain bytes; default: what the sequences can use, within "
        "--memory-utilization."
    ),
]
CommitMemory = Annotated[
    bool,
    typer.Option(
        help="Take the memory of the KV cache soon after the start, while no request runs, so that none waits for it; "
        "else as it is used."
    ),
]
KvOffloadBytes = Annotated[
    str,
    typer.Option(help="Size of a file for evicted parts of the KV cache, as 2GiB; kept for the next start; 0: none."),
]

PackedCacheBytes = Annotated[
    int | None,
    typer.Option(
        help="Disk space for packed weights, which later starts map; 0: none. Unset: KVARN_PACKED_CACHE_BYTES or 20 GB."
    ),
]


def read_text(path: Path, option: str) -> str:
    """What a text file holds. Raises ConfigError naming the option."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{option}: cannot read {path}: {reason}") from error


def size_option(option: str, text: str) -> int:
    """Bytes of an option that takes sizes. Raises ConfigError naming the option."""
    from kvarn.planning.sizes import parse_size

    return parse_size(f"--{option}", text)


def optional_size(option: str, text: str | None) -> int | None:
    """The same; None where it is not given."""
    return None if text is None else size_option(option, text)


def sampling_params(
    max_tokens: int, temperature: float, top_p: float, top_k: int, min_p: float, seed: int | None
) -> SamplingParams:
    """The shared options as `SamplingParams`. Raises RequestError naming the option at fault."""
    return SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed
    )


def within(sampling: SamplingParams, prompt_tokens: int, max_model_len: int) -> SamplingParams:
    """The same, but with no more tokens than the model's length leaves; a person at a terminal wants an answer."""
    left = max_model_len - prompt_tokens
    if sampling.max_tokens is None or sampling.max_tokens <= left or left < 1:
        return sampling
    return dataclasses.replace(sampling, max_tokens=left)


def load_llm(
    model: str,
    *,
    threads: int,
    max_model_len: int | None,
    max_num_seqs: int,
    quiet: bool,
    packed_cache_bytes: int | None = None,
    backend: str = "cpu",
    speculative: SpeculativeConfig | None = None,
) -> LLM:
    """Pulls the model where needed (with a progress bar on a terminal) and loads it."""
    from kvarn.cli.progress import resolve_with_progress
    from kvarn.config import EngineConfig, SchedulerConfig
    from kvarn.engine import LLM

    path = resolve_with_progress(model, quiet=quiet or not sys.stderr.isatty())
    config = EngineConfig(
        max_model_len=max_model_len,
        threads=threads,
        scheduler=SchedulerConfig(max_num_seqs=max_num_seqs),
        backend=backend,
        packed_cache_bytes=packed_cache_bytes,
        speculative=speculative,
    )
    # A vocabulary is some 100,000 objects that live to the end: collections while they are made find nothing.
    gc.disable()
    try:
        return LLM(str(path), config=config)
    finally:
        gc.enable()
