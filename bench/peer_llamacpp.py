"""Worker: runs llama.cpp's work for `bench/compare.py`. Started with the Python of an environment that has
llama-cpp-python; imports nothing of kvarn. Reads JSON lines on stdin, answers on stdout.

{"op": "prefill", "tokens": n}               seconds for one prompt of n tokens, logits of the last
{"op": "decode", "tokens": n, "batch": b}    seconds for n steps of b sequences of one token each
"""

import ctypes
import json
import sys
import time

import llama_cpp as L


def main() -> None:
    path, threads, flash = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    silent = L.llama_log_callback(lambda level, text, data: None)
    L.llama_log_set(silent, ctypes.c_void_p(0))
    L.llama_backend_init()
    started = time.perf_counter()
    model = L.llama_model_load_from_file(path.encode(), L.llama_model_default_params())
    params = L.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 16 * 1024, 512, 512, 16
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = flash
    params.no_perf = True
    params.kv_unified = True
    context = L.llama_init_from_model(model, params)
    memory = L.llama_get_memory(context)
    vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
    print(
        json.dumps({"ready": time.perf_counter() - started, "info": L.llama_print_system_info().decode()}), flush=True
    )
    batch = L.llama_batch_init(512, 0, 16)

    def fill(rows: list[tuple[int, int, int, bool]]) -> None:
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted

    def run(rows: list[tuple[int, int, int, bool]]) -> None:
        fill(rows)
        if L.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        L.llama_synchronize(context)

    for line in sys.stdin:
        task = json.loads(line)
        L.llama_memory_clear(memory, True)
        count, depth = task["tokens"], task.get("depth", 0)
        sequences = task.get("batch", 1)
        for start in range(0, depth, 512):
            run([((7 * p) % vocab, p, 0, False) for p in range(start, min(depth, start + 512))])
        started = time.perf_counter()
        if task["op"] == "prefill":
            for start in range(0, count, 512):
                end = min(count, start + 512)
                run([((7 * p) % vocab, p, 0, p == count - 1) for p in range(start, end)])
        else:
            for step in range(count):
                run([((31 * s + 7 * step) % vocab, depth + step, s, True) for s in range(sequences)])
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


main()
