"""The matrices of a layer by themselves: every form of weights, by number of rows of activations, against bf16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gpu_parts.bench import Bench
from gpu_parts.checks import relative_error
from gpu_parts.results import Row
from kvarn.backends.cuda.kernels.linear import linear, workspace_bytes
from kvarn.backends.cuda.packing import Dense, Fp8, Int4, Int8, Weight, dequantize, pack_nibbles, pad_columns

GROUP = 128
CHUNK = 128
"""int4 rows are filled up to whole chunks of so many weights."""
MOST_ERROR = {"bf16": 1e-2, "int8": 1e-2, "int4": 1e-2, "fp8": 6e-2}
"""Against products in float32 with the values that the weights stand for; fp8 also rounds activations to 8 bits."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Seconds and bytes of all matrices of a layer, each once."""

    seconds: float
    num_bytes: int
    flops: int
    error: float


def measure_linears(bench: Bench) -> None:
    """A row for each form and number of rows."""
    for rows in bench.sizes.linear_rows:
        plain: float | None = None
        for form in bench.sizes.linear_forms:
            what = f"a layer's matrices, {form}, {rows} row" + ("s" if rows > 1 else "")
            with bench.results.attempt("linears", what):
                layer = _layer(bench, form, rows)
                plain = layer.seconds if form == "bf16" else plain
                floor, of = bench.limits.floor(layer.num_bytes, layer.flops)
                bench.results.point("linears", form=form, rows=rows, seconds=layer.seconds)
                bench.add(
                    Row(
                        "linears", what, 1e6 * layer.seconds, "us", floor / layer.seconds, of,
                        detail={"bytes": layer.num_bytes, "flops": layer.flops, "error": layer.error,
                                "times_bf16": None if plain is None else plain / layer.seconds},
                    )
                )  # fmt: skip


def _layer(bench: Bench, form: str, rows: int) -> Layer:
    sizes, clock = bench.sizes, bench.clock
    seconds, num_bytes, flops, errors = 0.0, 0, 0, []
    for outputs, inputs in sizes.linears:
        weight = random_weight(form, outputs, inputs, sizes.dtype, clock.device)
        weights = [weight]
        weights += [random_weight(form, outputs, inputs, sizes.dtype, clock.device)
                    for _ in range(clock.sets(weight.nbytes) - 1)]  # fmt: skip
        x = torch.randn(rows, inputs, device=clock.device).to(getattr(torch, sizes.dtype))
        out = torch.full((rows, outputs), torch.nan, dtype=x.dtype, device=clock.device)
        work = torch.empty(workspace_bytes(weight, rows), dtype=torch.uint8, device=clock.device)
        expected = x.float() @ dequantize(weight).float().t()
        errors.append(relative_error(linear(x, weight, None, out, work), expected))
        if not errors[-1] <= MOST_ERROR[form]:
            raise ValueError(f"the product of {outputs} x {inputs} is off by {errors[-1]:.1e}")
        timing = clock.time_kernel(_product(x, weights, out, work), len(weights))
        seconds += timing.median
        num_bytes += weight.nbytes + x.nbytes + out.nbytes
        flops += 2 * rows * outputs * inputs
    return Layer(seconds, num_bytes, flops, max(errors))


def _product(x: torch.Tensor, weights: list[Weight], out: torch.Tensor, work: torch.Tensor) -> Callable[[int], object]:
    return lambda i: linear(x, weights[i % len(weights)], None, out, work)


def random_weight(form: str, outputs: int, inputs: int, dtype: str, device: torch.device) -> Weight:
    """[outputs, inputs] of a form, random to the bit, of a size that keeps activations as they are."""
    size = inputs**-0.5
    if form == "bf16":
        return Dense((torch.randn(outputs, inputs, device=device) * size).to(getattr(torch, dtype)))
    spread = torch.rand(outputs, 1, device=device) + 0.5
    if form == "fp8":
        codes = torch.randn(outputs, inputs, device=device).to(torch.float8_e4m3fn).view(torch.uint8)
        return Fp8(pad_columns(codes, 16), spread * size, inputs)
    if form == "int8":
        values = (torch.randn(outputs, inputs, device=device) * 32).clamp_(-128, 127).to(torch.int8)
        return Int8(pad_columns(values, 16), spread * (size / 32), None, None, inputs)
    nibbles = torch.randint(16, (outputs, inputs), dtype=torch.uint8, device=device)
    groups = -(-inputs // CHUNK) * CHUNK // GROUP
    scales = (torch.rand(outputs, groups, device=device) + 0.5) * (size / 4.6)
    offsets = -7.5 * scales
    return Int4(pack_nibbles(nibbles), scales.to(torch.float16), offsets.to(torch.float16), GROUP, inputs)
