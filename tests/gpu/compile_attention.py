"""Compiles attention and the KV write for sm_90: a line of JSON for each kernel. A process of its own (compiled.py)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import torch
from compiled import compiling

from kvarn.backends.cuda.kernels.attention import AttentionWorkspace, attention
from kvarn.backends.cuda.kernels.attention_plan import AttentionPlan
from kvarn.backends.cuda.kernels.kv_write import LayerKv, kv_write

DECODE = AttentionPlan(64, 64, 1)
PREFILL = AttentionPlan(1, 8192, 8192)
MIXED = AttentionPlan(64, 4096, 512)
BF16, FP16 = torch.bfloat16, torch.float16


def launch(
    plan: AttentionPlan,
    dtype: torch.dtype,
    stored: str,
    key_dim: int = 128,
    value_dim: int = 128,
    window: int | None = None,
    softcap: float | None = None,
    tree: bool = False,
) -> None:
    """What a layer of 32 query heads and 8 KV heads launches."""
    rows = torch.empty(1, dtype=torch.int32)
    tables = torch.empty((1, 2, 64), dtype=torch.int32)
    attention(
        torch.empty((1, 32, key_dim), dtype=dtype), LayerKv.empty(16, 8, key_dim, value_dim, stored, "cpu"), rows, rows,
        tables[:, 1], plan, AttentionWorkspace.empty(1, 32, value_dim, 8192, "cpu"), block_size=16, scale=0.1,
        window=window, softcap=softcap, out=torch.empty((1, 32, value_dim), dtype=dtype),
        tree=(rows, rows) if tree else None,
    )  # fmt: skip


def write(dtype: torch.dtype, stored: str) -> None:
    """What a layer's keys and values are stored by."""
    cache = LayerKv.empty(16, 8, 128, 96, stored, "cpu")
    slots = torch.zeros(1, dtype=torch.int64)
    kv_write(torch.empty((1, 8, 128), dtype=dtype), torch.empty((1, 8, 96), dtype=dtype), slots, cache)


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    yield "prefill", lambda: launch(PREFILL, BF16, "bfloat16")
    yield "decode", lambda: launch(DECODE, BF16, "bfloat16")
    yield "decode int8", lambda: launch(DECODE, FP16, "int8")
    yield "decode fp8", lambda: launch(DECODE, BF16, "fp8_e4m3")
    yield "mixed, all features", lambda: launch(MIXED, BF16, "bfloat16", 96, 80, window=4096, softcap=50.0, tree=True)
    for stored in ("float16", "int8", "fp8_e4m3"):
        yield f"write {stored}", lambda stored=stored: write(BF16, stored)


if __name__ == "__main__":
    for case, call in calls():
        with compiling() as kernels:
            call()
        for kernel in kernels:
            print(
                json.dumps(
                    {
                        "case": case, "kernel": kernel.name, "registers": kernel.registers, "stack": kernel.stack,
                        "shared": kernel.shared, "wgmma": kernel.ptx.count("wgmma.mma_async"),
                        "mma": kernel.ptx.count("mma.sync"), "wide_copies": kernel.ptx.count("cp.async.cg"),
                    }
                )
            )  # fmt: skip
