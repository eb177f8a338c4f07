"""What a card can do at most, measured: bytes copied and products a second, on random data that no cache holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvarn.backends.cuda.clock import Clock
from kvarn.backends.cuda.weights import TORCH_DTYPES

COPY_MIB = (1024,)
MATMUL = (4096, 8192)


@dataclass(frozen=True, slots=True)
class CardRoof:
    """Per second. copy_bytes counts what is read and what is written; flops, of `dtype`, a multiply-add as two."""

    copy_bytes: float
    flops: float
    dtype: str


def measure_roof(
    clock: Clock, dtype: str = "bfloat16", copy_mib: tuple[int, ...] = COPY_MIB, matmul: tuple[int, ...] = MATMUL
) -> CardRoof:
    """The best of several sizes; some seconds, and 2 GiB of the card. dtype: one of `CudaConfig.dtype`."""
    copied = max(copy_rate(clock, mib << 20) for mib in copy_mib)
    multiplied = max(matmul_rate(clock, n, TORCH_DTYPES[dtype]) for n in matmul)
    if clock.cuda:
        torch.cuda.empty_cache()
    return CardRoof(copied, multiplied, dtype)


def copy_rate(clock: Clock, num_bytes: int) -> float:
    """Bytes a second, read and written ones together, of copies of so many."""
    pairs = [
        (torch.randint(256, (num_bytes,), dtype=torch.uint8, device=clock.device),
         torch.empty(num_bytes, dtype=torch.uint8, device=clock.device))
        for _ in range(clock.sets(2 * num_bytes))
    ]  # fmt: skip
    timing = clock.time(lambda i: pairs[i % len(pairs)][1].copy_(pairs[i % len(pairs)][0]))
    return 2 * num_bytes / timing.median


def matmul_rate(clock: Clock, n: int, dtype: torch.dtype) -> float:
    """Operations a second of products of (n, n) matrices, by torch's library."""
    sets = min(4, clock.sets(3 * n * n * dtype.itemsize))
    pairs = [[torch.randn(n, n, device=clock.device).to(dtype) for _ in range(2)] for _ in range(sets)]
    out = torch.empty(n, n, dtype=dtype, device=clock.device)
    timing = clock.time(lambda i: torch.matmul(*pairs[i % sets], out=out))
    return 2 * n**3 / timing.median
