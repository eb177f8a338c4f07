"""Compiles the kernels of linears for sm_90 and prints a line of JSON for each; run as a process."""

import json

import torch
from compiled import compiling
from linears import make

from kvarn.backends.cuda.kernels.linear import dense_gemv, linear
from kvarn.backends.cuda.packing import Fp8, Int4, Int8

ROWS, WIDTH = 4096, 14336


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype)


def weights():
    half = torch.float16
    words, codes = empty(ROWS, WIDTH // 8, dtype=torch.int32), empty(ROWS, WIDTH, dtype=torch.int8)
    scales, offsets = empty(ROWS, WIDTH // 32, dtype=half), empty(ROWS, WIDTH // 32, dtype=half)
    row_scales = empty(ROWS, 1, dtype=torch.float32)
    yield "int4-128-symmetric", Int4(words, empty(ROWS, WIDTH // 128, dtype=half), None, 128, WIDTH)
    yield "int4-32", Int4(words, scales, offsets, 32, WIDTH)
    yield "int8", Int8(codes, row_scales, None, None, WIDTH)
    yield "int8-32-offsets", Int8(codes, scales, offsets, 32, WIDTH)
    yield "fp8", Fp8(codes.view(torch.uint8), row_scales, WIDTH)


def calls():
    for tokens in (1, 16, 64, 512):
        x, out, bias = empty(tokens, WIDTH), empty(tokens, ROWS), empty(ROWS)
        for form, weight in weights():
            yield f"{form} {tokens}", lambda x=x, weight=weight, bias=bias, out=out: linear(x, weight, bias, out)
    for tokens in (1, 2, 17):  # arguments that are 1 become constants, and those that 16 does not divide narrow loads
        x, out = empty(tokens, 48), empty(tokens, 1)
        for form in ("int4-32", "int8-16", "fp8"):
            weight = make(form, 1, 48, "cpu")
            yield f"{form} {tokens} of 1", lambda x=x, weight=weight, out=out: linear(x, weight, None, out)
    yield "dense 1", lambda: dense_gemv(empty(1, WIDTH), empty(ROWS, WIDTH), None, empty(1, ROWS))


for case, call in calls():
    with compiling() as kernels:
        call()
    for kernel in kernels:
        print(
            json.dumps(
                {
                    "case": case, "kernel": kernel.name, "registers": kernel.registers, "stack": kernel.stack,
                    "shared": kernel.shared, "wide_loads": kernel.ptx.count("ld.global.v4"),
                    "wide_copies": kernel.ptx.count("cp.async.cg"),
                    "tensor_cores": kernel.ptx.count("mma.sync") + kernel.ptx.count("wgmma.mma_async"),
                    "barriers": kernel.ptx.count("bar.sync"),
                }
            )
        )  # fmt: skip
