"""`kvarn run`: one prompt, one answer, streamed to the terminal."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from importlib import import_module
from typing import TYPE_CHECKING, Annotated

import typer

from kvarn.cli.options import (
    DEFAULT_MODEL,
    ComputeType,
    Device,
    MaxModelLen,
    MaxTokens,
    MinP,
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

if TYPE_CHECKING:
    from kvarn.engine import LLM

EPILOG = """\b
Examples:
  kvarn run "Why is the sky blue?"
  kvarn run "def quicksort(a):" --model qwen2.5-coder-0.5b-instruct --raw --temperature 0
  git diff | kvarn run "Write a commit message for this change:" --max-tokens 80
  kvarn run "Name three rivers." --json --stats
  kvarn run "Is water wet?" --regex "(yes|no)"
"""


def command(
    prompt: Annotated[str | None, typer.Argument(help="What to ask. Text on stdin is added below it.")] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="A name from `kvarn models`, a .gguf file, or a folder with config.json and safetensors.",
        ),
    ] = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    max_tokens: MaxTokens = 512,
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
    stats: Annotated[bool, typer.Option("--stats", help="Say afterwards where the time went (on stderr).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming text.")] = False,
) -> None:
    """Answer one prompt and exit."""
    text = _with_stdin(prompt)
    import_module("kvarn.engine")  # all of the engine's imports, so that loading is timed by itself
    started = time.perf_counter()
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
        quiet=as_json,
    )
    loaded = time.perf_counter()
    try:
        if raw or llm.tokenizer.chat_template is None:
            token_ids = llm.tokenizer.encode(text, add_special_tokens=True)
        else:
            messages = [{"role": "system", "content": system}] if system else []
            token_ids = llm.tokenizer.encode_chat([*messages, {"role": "user", "content": text}])
        sampling = within(sampling, len(token_ids), llm.max_model_len)
        pieces: list[str] = []
        first: float | None = None
        num_tokens = 0
        finish = ""
        for output in llm.stream(token_ids, sampling):
            for sequence in output.outputs:
                first = first or time.perf_counter()
                num_tokens += len(sequence.token_ids)
                pieces.append(sequence.text)
                if sequence.finish_reason is not None:
                    finish = sequence.finish_reason.value
                if not as_json:
                    sys.stdout.write(sequence.text)
                    sys.stdout.flush()
        ended = time.perf_counter()
    finally:
        llm.close()
    first = first or ended
    numbers = {
        "prompt_tokens": len(token_ids),
        "completion_tokens": num_tokens,
        "startup_s": round(_process_age() - (time.perf_counter() - started), 3),
        "load_s": round(loaded - started, 3),
        **_load_parts(llm),
        "prefill_s": round(first - loaded, 3),
        "decode_tokens_per_s": round((num_tokens - 1) / (ended - first), 1) if num_tokens > 1 else None,
    }
    if as_json:
        print(json.dumps({"model": model, "text": "".join(pieces), "finish_reason": finish, **numbers}))
        return
    print()
    if stats:
        decode = numbers["decode_tokens_per_s"]
        print(
            f"start and imports {numbers['startup_s']:.2f} s · load {numbers['load_s']:.2f} s (open "
            f"{numbers['load_open_s']:.2f}, tokenizer {numbers['load_tokenizer_s']:.2f}, weights "
            f"{numbers['load_weights_s']:.2f}) · "
            f"{len(token_ids)} prompt tokens in {numbers['prefill_s']:.2f} s · "
            f"{num_tokens} tokens" + (f" at {decode:.1f} tokens/s" if decode else ""),
            file=sys.stderr,
        )


def _load_parts(llm: LLM) -> dict[str, float]:
    assert llm.load_times is not None
    return {f"load_{part}_s": round(seconds, 3) for part, seconds in dataclasses.asdict(llm.load_times).items()}


def _with_stdin(prompt: str | None) -> str:
    """The prompt, with piped text below it. Raises typer.BadParameter where there is neither."""
    piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().strip()
    text = "\n\n".join(part for part in (prompt, piped) if part)
    if not text:
        raise typer.BadParameter('give a prompt, as in: kvarn run "Why is the sky blue?"', param_hint="PROMPT")
    return text


def _process_age() -> float:
    """Seconds since this process was started (Linux), so that interpreter start and imports are counted too."""
    try:
        with open("/proc/self/stat", encoding="ascii") as stat, open("/proc/uptime", encoding="ascii") as uptime:
            ticks = int(stat.read().rsplit(")", 1)[1].split()[19])
            import os

            return float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        return time.perf_counter()
