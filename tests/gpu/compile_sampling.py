"""Compiles the sampling kernels for sm_90 and prints a line for each as JSON; in a process of its own (compiled.py)."""

import json

import torch
from compiled import compiling

from kvarn.backends.cuda.kernels.sampling import adjust, feed, sample

VOCAB = 128_256


def main() -> None:
    """As a step of four rows launches them, some of them with masks."""
    rows, ids = torch.zeros((4, 16), dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    logits, edits = torch.zeros((4, VOCAB)), torch.zeros((9, 4), dtype=torch.int32)
    with compiling() as kernels:
        feed(ids, ids[:, None].contiguous(), ids)
        adjust(logits, rows, edits, ids)
        sample(logits, rows, torch.zeros((3, -(-VOCAB // 32)), dtype=torch.int32), ids)
    for kernel in kernels:
        print(json.dumps({"kernel": kernel.name, "stack": kernel.stack, "shared": kernel.shared}))


if __name__ == "__main__":
    main()
