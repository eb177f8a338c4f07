"""Compiles norms, rotations, activations and tables for sm_90, as layers of 4096 and 128 launch them; prints a line of
JSON for each kernel. In a process of its own (compiled.py)."""

import json

import torch
from compiled import compiling

from kvarn.backends.cuda.kernels.activation import activation, gated_activation
from kvarn.backends.cuda.kernels.embed import embed, position_embed
from kvarn.backends.cuda.kernels.kv_write import LayerKv
from kvarn.backends.cuda.kernels.norm import norm
from kvarn.backends.cuda.kernels.rope import Rotation, rope, rope_kv_write

WIDTH, HEAD, ROWS = 4096, 128, 4


def rows(width: int) -> torch.Tensor:
    """Activations."""
    return torch.zeros((ROWS, width), dtype=torch.bfloat16)


def main() -> None:
    """Each kernel in the forms that it takes in most models."""
    x, qkv, ids = rows(WIDTH), rows(6 * HEAD), torch.zeros(ROWS, dtype=torch.int32)
    slots, ones = torch.zeros((ROWS, 2), dtype=torch.int64)[:, 1], torch.ones(WIDTH)
    rotation, partial = (Rotation(torch.zeros((64, 2, pairs)), halves) for pairs, halves in ((64, True), (24, False)))
    plain, int8 = (LayerKv(*(torch.zeros((64, 1, HEAD), dtype=kind) for _ in range(2)),
                           *(torch.zeros((64, 1)) if kind == torch.int8 else None for _ in range(2)))
                   for kind in (torch.float16, torch.int8))  # fmt: skip
    q, k, v = qkv.split([4 * HEAD, HEAD, HEAD], dim=1)
    with compiling() as kernels:
        norm(x, ones, None, 1e-6, rows(WIDTH), residual=x, summed=rows(WIDTH))
        norm(x, ones, ones, 1e-5, x, layer=True)
        norm(q, ones[:HEAD], None, 1e-6, q, groups=4)
        rope(q, q, HEAD, ids, partial)
        rope_kv_write(q, q, HEAD, k, v, plain, slots, ids, rotation)
        rope_kv_write(None, None, HEAD, k, v, int8, slots, ids, partial)
        gated_activation("silu", x, x, rows(WIDTH))
        activation("gelu", x, x)
        embed(ids, x, 1.0, rows(WIDTH))
        position_embed(x, ids, x, x)
    for kernel in kernels:
        print(json.dumps({"kernel": kernel.name, "stack": kernel.stack, "registers": kernel.registers}))


if __name__ == "__main__":
    main()
