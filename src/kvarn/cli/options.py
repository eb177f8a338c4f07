"""Options that several commands share, and the way from options to a loaded `LLM`."""

from __future__ import annotations

import dataclasses
import gc
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvarn.errors import ConfigError
from kvarn.request import SamplingParams

if TYPE_CHECKING:
    from kvarn.config import CudaConfig, SpeculativeConfig
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
GPU = "On a GPU (--device cuda)"
"""A group of options in the help."""
Device = Annotated[
    str, typer.Option(help="cpu, or cuda: an NVIDIA GPU, the first that CUDA_VISIBLE_DEVICES lists; needs kvarn[cuda].")
]
ComputeType = Annotated[
    str | None,
    typer.Option("--dtype", help="What is computed in: bfloat16 (default), float16 or float32.", rich_help_panel=GPU),
]
WeightForm = Annotated[
    str | None,
    typer.Option(
        "--weights",
        help="stored (default): matrices that the file has quantized stay so, others are of --dtype; dense: all are; "
        "int8, fp8: one byte an element; int4 or int4:32, int4:64, int4:128: half a byte, a scale for so many.",
        rich_help_panel=GPU,
    ),
]
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


def chosen_device(device: str, dtype: str | None, weights: str | None) -> tuple[str, CudaConfig]:
    """The back-end that --device names, with what --dtype and --weights say of it. Raises ConfigError naming the
    option."""
    from kvarn.config import CudaConfig

    if device == "cpu":
        for option, value in (("dtype", dtype), ("weights", weights)):
            if value is not None:
                raise ConfigError(f"--{option} is for a GPU; on a CPU weights stay as the file has them")
        return "cpu", CudaConfig()
    if device != "cuda":
        raise ConfigError(
            f"--device must be cpu or cuda, not {device[:40]!r}; of several GPUs CUDA_VISIBLE_DEVICES chooses one"
        )
    cuda = CudaConfig()
    if dtype is not None:
        cuda = dataclasses.replace(cuda, dtype=dtype)
    if weights is not None:
        form, colon, group = weights.partition(":")
        if colon and (form != "int4" or not re.fullmatch(r"[0-9]{1,4}", group)):
            raise ConfigError(f"--weights must be stored, dense, int8, int4, int4:GROUP or fp8, not {weights[:40]!r}")
        cuda = dataclasses.replace(cuda, weights=form, weight_group=int(group) if colon else cuda.weight_group)
    return "cuda", cuda


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
    device: str = "cpu",
    dtype: str | None = None,
    weights: str | None = None,
    speculative: SpeculativeConfig | None = None,
) -> LLM:
    """Pulls the model where needed (with a progress bar on a terminal) and loads it. See `chosen_device`."""
    from kvarn.cli.progress import resolve_with_progress
    from kvarn.config import EngineConfig, SchedulerConfig
    from kvarn.engine import LLM

    path = resolve_with_progress(model, quiet=quiet or not sys.stderr.isatty())
    backend, cuda = chosen_device(device, dtype, weights)
    config = EngineConfig(
        max_model_len=max_model_len,
        backend=backend,
        threads=threads,
        cuda=cuda,
        scheduler=SchedulerConfig(max_num_seqs=max_num_seqs),
        packed_cache_bytes=packed_cache_bytes,
        speculative=speculative,
    )
    # A vocabulary is some 100,000 objects that live to the end: collections while they are made find nothing.
    gc.disable()
    try:
        return LLM(str(path), config=config)
    finally:
        gc.enable()
