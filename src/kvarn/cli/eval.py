"""`kvarn eval`: measure what a model's output is worth."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvarn.cli.eval_structured import STRUCTURED_EPILOG, structured_command
from kvarn.cli.options import ComputeType, ModelArgument, Threads, WeightForm, chosen_device

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure a model's quality.")

Text = Annotated[Path, typer.Option("--text", help="A UTF-8 text file.", exists=True, dir_okay=False)]
Context = Annotated[int, typer.Option(help="Tokens in a chunk; the second half of each is scored.")]
ChunkCount = Annotated[int | None, typer.Option(help="Only the first so many chunks.", min=1)]

PERPLEXITY_EPILOG = """\b
Examples:
  kvarn eval perplexity smollm2-135m-instruct --text wiki.test.raw
  kvarn eval perplexity model.gguf --text wiki.test.raw --context 512 --chunks 40 --json
  kvarn eval perplexity model.gguf --text book.txt --backend reference --chunks 2
  kvarn eval perplexity model.gguf --text book.txt --backend cuda --weights int4
"""


KV_CACHE_EPILOG = """\b
Examples:
  kvarn eval kv-cache smollm2-135m-instruct --text wiki.test.raw --chunks 20
  kvarn eval kv-cache model.gguf --text book.txt --context 2048 --json
"""


@app.callback()
def root() -> None:
    """Measure a model's quality."""


@app.command("perplexity", epilog=PERPLEXITY_EPILOG)
def perplexity_command(
    model: ModelArgument,
    text: Text,
    context: Context = 512,
    chunks: ChunkCount = None,
    backend: Annotated[str, typer.Option(help="cpu, cuda, or reference (plain NumPy, slow, exact weights).")] = "cpu",
    kv_dtype: Annotated[
        str, typer.Option(help="KV cache type: float16, float32, int8 or int4; of cuda bfloat16 and fp8_e4m3, no int4.")
    ] = "float16",
    threads: Threads = 0,
    dtype: ComputeType = None,
    weights: WeightForm = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Perplexity of a text: how well the model predicts it (lower is better).

    The text is tokenized once and cut into chunks of one context; the second half of each chunk is scored, as
    llama-perplexity does, so figures are comparable.
    """
    from kvarn.cli.progress import resolve_with_progress, work_bar
    from kvarn.errors import ConfigError
    from kvarn.eval.perplexity import perplexity
    from kvarn.eval.session import open_session
    from kvarn.kv_types import CACHE_TYPES, CARD_CACHE_TYPES

    content = _read(text)
    _, cuda = chosen_device("cuda" if backend == "cuda" else "cpu", dtype, weights)
    kinds = CARD_CACHE_TYPES if backend == "cuda" else CACHE_TYPES
    if kv_dtype not in kinds:
        raise ConfigError(f"kv-dtype must be one of {', '.join(kinds)}, not {kv_dtype!r}")
    path = resolve_with_progress(model, quiet=as_json or not sys.stderr.isatty())
    opened = open_session(path, context=context, backend=backend, threads=threads, kv_dtype=kv_dtype, cuda=cuda)
    with opened as session, work_bar("chunks") as progress:
        result = perplexity(session, content, chunks=chunks, progress=progress)
    if as_json:
        print(
            json.dumps(
                {
                    "model": model,
                    "text": str(text),
                    "backend": backend,
                    "kv_dtype": kv_dtype,
                    "context": result.context,
                    "chunks": result.chunks,
                    "tokens": result.tokens,
                    "perplexity": result.perplexity,
                    "standard_error": result.standard_error,
                }
            )
        )
    else:
        print(
            f"perplexity {result.perplexity:.4f} ± {result.standard_error:.4f}   "
            f"({result.tokens} tokens in {result.chunks} chunks of {result.context}, back-end {backend})"
        )


@app.command("kv-cache", epilog=KV_CACHE_EPILOG)
def kv_cache_command(
    model: ModelArgument,
    text: Text,
    context: Context = 512,
    chunks: ChunkCount = None,
    backend: Annotated[
        str, typer.Option(help="cpu, or reference: slow, but without int8 activations, whose noise hides small losses.")
    ] = "cpu",
    threads: Threads = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What a smaller KV cache costs: each cache type against float32, over a text.

    KL is the divergence of the next-token distribution from that with a float32 cache, in nats; top-1 is how often both
    find the same token most probable.
    """
    from contextlib import ExitStack
    from dataclasses import asdict

    from kvarn.cli.progress import resolve_with_progress, work_bar
    from kvarn.eval.divergence import divergence
    from kvarn.eval.session import open_session
    from kvarn.kv_types import CACHE_TYPES, KV_TYPES

    content = _read(text)
    path = resolve_with_progress(model, quiet=as_json or not sys.stderr.isatty())
    with ExitStack() as stack:
        sessions = {
            kv: stack.enter_context(open_session(path, context=context, backend=backend, threads=threads, kv_dtype=kv))
            for kv in CACHE_TYPES
        }
        source = sessions.pop("float32")
        program = source.model.program
        with work_bar("chunks") as progress:
            results = divergence(source, sessions, content, chunks=chunks, progress=progress)
    sizes = {kv: program.kv_bytes_per_token(KV_TYPES[kv]) for kv in CACHE_TYPES}
    if as_json:
        rows = {kv: {"bytes_per_token": sizes[kv], **asdict(result)} for kv, result in results.items()}
        given = {"model": model, "text": str(text), "backend": backend, "context": context}
        print(json.dumps({**given, "against": "float32", "types": rows}))
        return
    any_result = next(iter(results.values()))
    print(f"{model}, {any_result.tokens} tokens of {text.name} in chunks of {context}; float32 is the source\n")
    print(f"{'cache':<9}{'bytes/token':>12}{'perplexity':>12}{'KL mean':>12}{'KL 99 %':>12}{'KL max':>12}{'top-1':>10}")
    print(f"{'float32':<9}{sizes['float32']:>12,}{any_result.source_perplexity:>12.4f}")
    for kv, r in results.items():
        print(
            f"{kv:<9}{sizes[kv]:>12,}{r.perplexity:>12.4f}{r.kl_mean:>12.2e}{r.kl_p99:>12.2e}{r.kl_max:>12.2e}"
            f"{r.top1_agreement:>10.2%}"
        )


app.command("structured", epilog=STRUCTURED_EPILOG)(structured_command)


def _read(text: Path) -> str:
    from kvarn.errors import ConfigError

    try:
        return text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{text}: not UTF-8 at byte {error.start}") from error

