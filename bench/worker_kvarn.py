"""Worker: runs kvarn's side of `bench/compare.py`. The protocol is that of `bench/peer_llamacpp.py`.

Like the peer's, it times steps of the program (LM head for the needed rows included) without tokenizer or sampler.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from kvarn.backends import InputBatch, KvCacheSpec, StepLimits
from kvarn.backends.cpu import CpuBackend
from kvarn.models import load_model
from kvarn.weights import open_model

CONTEXT = 16 * 1024
BLOCK = 16
SEQUENCES = 16


def main() -> None:
    path, threads = sys.argv[1], int(sys.argv[2])
    started = time.perf_counter()
    backend = CpuBackend(threads=threads)
    with open_model(Path(path)) as files:
        model = load_model(files)
        executable = backend.load(
            model.program,
            model.weights,
            KvCacheSpec(CONTEXT // BLOCK, BLOCK, "float16"),
            StepLimits(512, 64, CONTEXT),
        )
    vocab = model.config.vocab_size
    print(json.dumps({"ready": time.perf_counter() - started}), flush=True)

    def run(tokens: list[list[int]], starts: list[int], wanted: bool, per_sequence: int) -> None:
        lengths = np.array([len(t) for t in tokens])
        positions = np.concatenate([np.arange(s, s + len(t)) for s, t in zip(starts, tokens, strict=True)])
        bases = np.repeat(np.arange(len(tokens)) * per_sequence, lengths)
        blocks = per_sequence // BLOCK
        query_start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        executable.execute(
            InputBatch(
                token_ids=np.concatenate(tokens).astype(np.int32),
                positions=positions.astype(np.int32),
                slot_mapping=(bases + positions).astype(np.int64),
                query_start=query_start,
                seq_lens=(np.array(starts) + lengths).astype(np.int32),
                block_tables=(np.arange(len(tokens) * blocks, dtype=np.int32)).reshape(len(tokens), blocks),
                output_rows=(query_start[1:] - 1 if wanted else np.empty(0)).astype(np.int32),
            )
        )

    def chunks(count: int, last_wanted: bool) -> None:
        for start in range(0, count, 512):
            end = min(count, start + 512)
            run([[(7 * p) % vocab for p in range(start, end)]], [start], last_wanted and end == count, CONTEXT)

    for line in sys.stdin:
        task = json.loads(line)
        count, depth, sequences = task["tokens"], task.get("depth", 0), task.get("batch", 1)
        chunks(depth, False)
        started = time.perf_counter()
        if task["op"] == "prefill":
            chunks(count, True)
        else:
            for step in range(count):
                tokens = [[(31 * s + 7 * step) % vocab] for s in range(sequences)]
                run(tokens, [depth + step] * sequences, True, CONTEXT // sequences)
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


main()
