"""What a KV cache is, and what it buys.

    python examples/kv_cache.py [MODEL] [--contexts 64 256 1024] [--tokens 4] [--threads N]

A language model reads a text and says which token comes next. To say the token after that, the whole text has to be
read again, one token longer. And again. The work to write n tokens grows with n².

But look at what reading a token means. In every layer, a token is turned into three vectors: a query, a key and a
value. The query is compared with the keys of all tokens before, and what comes out is a mix of their values. A token
looks back, never ahead: so the key and the value of a token do not depend on what follows. Once computed they can be
kept. That is the KV cache, and with it each new token costs the reading of one token, not of all.

This program writes the same text both ways and shows two things: the results are the same, to the last bit, and the
time of a token no longer grows with the text.
"""

import argparse
import time

import numpy as np

from kvarn.backends import Executable, InputBatch, KvCacheSpec, StepLimits
from kvarn.engine import make_backend
from kvarn.kv_types import KV_TYPES
from kvarn.models import load_model
from kvarn.text import load_tokenizer
from kvarn.weights import catalog, open_model

STORY = (
    "The mill stood where the river bends. Every morning the miller opened the gate, the water took the wheel, the "
    "wheel took the stones, and the grain became flour. He kept what he had milled in sacks along the wall: nobody "
    "mills the same grain twice. "
)
BLOCK_SIZE = 16


def read(executable: Executable, token_ids: list[int], first_position: int) -> np.ndarray:
    """Reads tokens that stand at `first_position` and after, and returns the logits of what follows the last.

    Their keys and values are written into the cache, and attention reads those of all positions before from there.
    The cache is an array of blocks of 16 tokens. A block table says which blocks hold a sequence; with a single
    sequence it is simply 0, 1, 2, …, and the slot of a token is its position. A server gives each sequence the blocks
    that happen to be free (see kvarn.cache). Layers of different kinds have blocks of their own; `of_tables` knows.
    """
    end = first_position + len(token_ids)
    positions = np.arange(first_position, end, dtype=np.int32)
    batch = InputBatch.of_tables(
        token_ids=np.array(token_ids, np.int32),
        positions=positions,
        query_start=np.array([0, len(token_ids)], np.int32),
        seq_lens=np.array([end], np.int32),
        tables=np.arange(-(-end // BLOCK_SIZE), dtype=np.int32)[None, :],
        output_rows=np.array([len(token_ids) - 1], np.int32),
        block_size=BLOCK_SIZE,
        num_groups=len(executable.program.kv_groups),
    )
    return executable.execute(batch)["logits"][0].copy()


def write_without_cache(executable: Executable, prompt: list[int], count: int) -> tuple[list[np.ndarray], float]:
    """`count` tokens after the prompt, everything read anew for each. Returns their logits, and seconds a token."""
    text, logits = list(prompt), []
    started = time.perf_counter()
    for _ in range(count):
        logits.append(read(executable, text, 0))
        text.append(int(logits[-1].argmax()))
    return logits, (time.perf_counter() - started) / count


def write_with_cache(executable: Executable, prompt: list[int], count: int) -> tuple[list[np.ndarray], float]:
    """The same, but what was read stays read. The prompt is read beforehand and is not in the time."""
    read(executable, prompt[:-1], 0)
    token, position, logits = prompt[-1], len(prompt) - 1, []
    started = time.perf_counter()
    for _ in range(count):
        logits.append(read(executable, [token], position))
        token, position = int(logits[-1].argmax()), position + 1
    return logits, (time.perf_counter() - started) / count


def main() -> None:
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct", help="a name, a .gguf file or a folder")
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 256, 1024], help="tokens read before")
    parser.add_argument("--tokens", type=int, default=4, help="tokens to write in each way")
    parser.add_argument("--threads", type=int, default=0, help="0: one for each physical core")
    options = parser.parse_args()

    longest = max(options.contexts) + options.tokens
    with open_model(catalog.resolve(options.model)) as files:
        model, tokenizer = load_model(files), load_tokenizer(files)
        blocks = -(-longest // BLOCK_SIZE) * len(model.program.kv_groups)
        cache = KvCacheSpec(num_blocks=blocks, block_size=BLOCK_SIZE)
        limits = StepLimits(max_num_tokens=longest, max_num_sequences=1, max_model_len=longest)
        executable = make_backend("cpu", options.threads).load(model.program, model.weights, cache, limits)

    kept = model.program.kv_bytes_per_token(KV_TYPES[cache.dtype])
    print(f"{options.model}: the cache keeps {kept:,} bytes a token, {kept * longest / 2**20:.1f} MiB for {longest}.\n")
    print("  context   without cache      with cache     faster   same bits")
    story = tokenizer.encode(STORY)
    same = True
    for context in options.contexts:
        prompt = (story * (context // len(story) + 1))[:context]
        without, slow = write_without_cache(executable, prompt, options.tokens)
        with_cache, fast = write_with_cache(executable, prompt, options.tokens)
        equal = all(a.tobytes() == b.tobytes() for a, b in zip(without, with_cache, strict=True))
        same = same and equal
        print(
            f"{context:9d}   {slow * 1e3:10.1f} ms   {fast * 1e3:10.1f} ms   {slow / fast:7.0f}×   "
            f"{'yes' if equal else 'NO'}"
        )
    executable.close()
    print(f"\nLogits of every step, {model.program.vocab_size:,} numbers each: {'bit-equal' if same else 'DIFFERENT'}.")
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
