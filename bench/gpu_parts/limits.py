"""What the card can do at most, measured: bytes copied and multiply-adds a second. All shares are of these."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from gpu_parts.results import Results, Row
from kvarn.backends.cuda.clock import Clock
from kvarn.backends.cuda.roof import copy_rate, matmul_rate

GB, TERA = 1e9, 1e12


@dataclass(frozen=True, slots=True)
class Limits:
    """Per second. copy_bytes counts what is read and what is written; bf16_flops a multiply-add as two."""

    copy_bytes: float
    bf16_flops: float

    def floor(self, num_bytes: float, flops: float) -> tuple[float, str]:
        """The least seconds for so many bytes and operations, and which of both it is (Williams et al. 2009)."""
        moving, computing = num_bytes / self.copy_bytes, flops / self.bf16_flops
        return (moving, "copy bandwidth") if moving >= computing else (computing, "bf16 peak")


def measure_limits(results: Results, clock: Clock, copy_mib: tuple[int, ...], matmul: tuple[int, ...]) -> Limits:
    """The best of several sizes, on random data. Two rows."""
    copies = {f"{mib} MiB": copy_rate(clock, mib << 20) for mib in copy_mib}
    products = {f"{n}^3": matmul_rate(clock, n, torch.bfloat16) for n in matmul}
    limits = Limits(max(copies.values()), max(products.values()))
    by_size: dict[str, Any] = {size: rate / GB for size, rate in copies.items()}
    results.add(Row("bandwidth", "copy, read + written", limits.copy_bytes / GB, "GB/s", detail={"by_size": by_size}))
    by_size = {size: rate / TERA for size, rate in products.items()}
    results.add(Row("bandwidth", "bf16 matmul", limits.bf16_flops / TERA, "TFLOP/s", detail={"by_size": by_size}))
    results.machine["limits"] = asdict(limits)
    if clock.cuda:
        with results.attempt("bandwidth", "fp8 E4M3 matmul of torch"):
            rate = max(_fp8_matmul(clock, n) for n in matmul)
            results.add(Row("bandwidth", "fp8 E4M3 matmul of torch", rate / TERA, "TFLOP/s"))
    return limits


def _fp8_matmul(clock: Clock, n: int) -> float:
    a, b = (torch.randn(n, n, device=clock.device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=clock.device)
    timing = clock.time(
        lambda _i: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
    )
    return 2 * n**3 / timing.median
