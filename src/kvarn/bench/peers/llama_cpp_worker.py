"""llama.cpp, through llama-cpp-python's bindings of its C API. The protocol is described in this folder's `__init__`.

VARIANT: 0 without flash attention, 1 with it. Weights are repacked for the processor where llama.cpp can, which is its
default. Steps are timed without sampler, as kvarn's.
"""

import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import llama_cpp as L
from peer_protocol import Message, serve

Row = tuple[int, int, int, bool]
"""Token, position, sequence, whether its logits are wanted."""
CHUNK = 512


class Runner:
    """A context with room for all tasks. kv_unified: one cache for all sequences, which is faster for few of them."""

    def __init__(self, path: str, threads: int, flash_attention: int, tasks: Sequence[Message]) -> None:
        self._silent = L.llama_log_callback(lambda _level, _text, _data: None)
        L.llama_log_set(self._silent, ctypes.c_void_p(0))
        L.llama_backend_init()
        model = L.llama_model_load_from_file(path.encode(), L.llama_model_default_params())
        if not model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        sequences = max(task["batch"] for task in tasks)
        tokens = max(task["batch"] * (task["depth"] + task["tokens"]) for task in tasks)
        params = L.llama_context_default_params()
        params.n_ctx = -(-tokens // 256) * 256
        params.n_batch = params.n_ubatch = max(CHUNK, sequences)
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = flash_attention
        params.no_perf = True
        params.kv_unified = True
        self._context = L.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit("llama.cpp cannot make a context with these settings")
        self._memory = L.llama_get_memory(self._context)
        self._vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
        self._batch = L.llama_batch_init(max(CHUNK, sequences), 0, sequences)

    def seconds(self, task: Message) -> float:
        """Wall time of the task's steps; its context is made before."""
        L.llama_memory_clear(self._memory, True)
        for sequence in range(task["batch"]):
            for rows in self._prompt(task["depth"], sequence, wanted=False):
                self._run(rows)
        if task["op"] == "prefill":
            steps: Iterator[list[Row]] = self._prompt(task["tokens"], 0, wanted=True)
        else:
            steps = self._decode(task)
        started = time.perf_counter()
        for rows in steps:
            self._run(rows)
        return time.perf_counter() - started

    def _prompt(self, tokens: int, sequence: int, *, wanted: bool) -> Iterator[list[Row]]:
        for start in range(0, tokens, CHUNK):
            end = min(tokens, start + CHUNK)
            yield [((7 * p) % self._vocab, p, sequence, wanted and p == tokens - 1) for p in range(start, end)]

    def _decode(self, task: Message) -> Iterator[list[Row]]:
        for step in range(task["tokens"]):
            position = task["depth"] + step
            yield [((31 * s + 7 * step) % self._vocab, position, s, True) for s in range(task["batch"])]

    def _run(self, rows: list[Row]) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        if L.llama_decode(self._context, batch):
            raise SystemExit("llama_decode failed")
        L.llama_synchronize(self._context)


def main() -> None:
    """Serves tasks until stdin ends."""
    path, threads, flash_attention, tasks = sys.argv[1:]

    def load() -> tuple[Callable[[Message], float], str]:
        runner = Runner(path, int(threads), int(flash_attention), json.loads(tasks))
        return runner.seconds, f"llama-cpp-python {L.__version__}: {L.llama_print_system_info().decode()}"

    serve(load)


main()
