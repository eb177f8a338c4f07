"""What the second tier of the KV cache saves, measured over HTTP, against computing again what was evicted.

    PYTHONPATH=src python bench/kv_offload.py MODEL [MODEL …] [--texts 4] [--tokens 1000] [--threads 0]

For each model, a server whose cache holds about one and a half of the texts answers each of them in turn, twice: the
second time all were evicted. TTFT of the second round, with the tier and without it; then with the tier after a
restart of the server, which has nothing but the file. Prints a table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from prefix_cache import Answer, ask, conversation, system_prompt
from serving import served

from kvarn.kv_types import KV_TYPES
from kvarn.models import load_model
from kvarn.weights import open_model


def rounds(model: str, options: list[str], prompts: list[str], count: int) -> list[list[Answer]]:
    """The answers to all prompts, in turn, so many times."""
    with served(model, *options) as server:
        talks = [conversation(prompt, "Who mends the wheel?") for prompt in prompts]
        return [[ask(server.address, talk, "all", 4) for talk in talks] for _ in range(count)]


def row(name: str, answers: list[Answer]) -> None:
    """Prints what a round took."""
    times = sorted(1000 * a.ttft for a in answers)
    cached = statistics.mean(a.cached_tokens for a in answers)
    shown = f"{statistics.median(times):.1f} ms ({times[0]:.1f} … {times[-1]:.1f})"
    print(f"  {name:44}{cached:>8.0f}{shown:>34}")


def bytes_per_token(model: str) -> int:
    """Of the KV cache, as the server has it unless told otherwise."""
    files = open_model(Path(model))
    try:
        return load_model(files).program.kv_bytes_per_token(KV_TYPES["float16"])
    finally:
        files.close()


def measure(model: str, texts: int, tokens: int, threads: int) -> None:
    """Prints the figures of one model."""
    length = 16 * (tokens // 16 + 4)
    options = ["--threads", str(threads), "--max-model-len", str(length)]
    with served(model, *options) as server:
        prompts = [system_prompt(server.address, tokens, number) for number in range(1, texts + 1)]
    options += ["--kv-cache-bytes", str(length * 3 // 2 * bytes_per_token(model))]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        tier = [*options, "--kv-offload-bytes", str(4 << 30), "--kv-offload-dir", folder]
        without, (first, second), (restarted,) = (
            rounds(model, options, prompts, 2)[1], rounds(model, tier, prompts, 2), rounds(model, tier, prompts, 1)
        )  # fmt: skip
    print(f"\n{model}: {texts} texts of {first[0].prompt_tokens} tokens\n  {'':44}{'cached':>8}{'TTFT, median':>34}")
    row("first time", first)
    row("evicted, computed again (no second tier)", without)
    row("evicted, loaded from the second tier", second)
    row("after a restart, loaded from the second tier", restarted)


def main() -> None:
    """Measures all models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    for model in given.models:
        measure(model, given.texts, given.tokens, given.threads)


if __name__ == "__main__":
    main()
