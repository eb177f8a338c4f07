"""What the compiler makes of the linears' kernels for a Hopper card: no card is needed, and none is used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SHARED_LIMIT = 227 << 10
"""Bytes of shared memory that a program may have on sm_90."""


@pytest.fixture(scope="module")
def kernels():
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, HERE / "compile_linears.py"], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_and_keeps_its_values_in_registers(kernels):
    assert {kernel["kernel"] for kernel in kernels} == {
        "int4_gemv_kernel", "int4_gemm_kernel", "bytes_gemv_kernel", "bytes_gemm_kernel",
        "quantize_rows_kernel", "fp8_gemm_kernel", "add_shares_kernel",
    }  # fmt: skip
    for kernel in kernels:
        assert kernel["stack"] == 0, f"{kernel} spills"
        assert kernel["shared"] <= SHARED_LIMIT, kernel


def large(kernels):
    return [kernel for kernel in kernels if not kernel["case"].endswith("of 1")]


def test_weights_are_read_sixteen_bytes_at_a_time(kernels):
    for kernel in large(kernels):
        if kernel["kernel"].endswith("gemv_kernel"):
            assert kernel["wide_loads"] >= 2, kernel
        if kernel["kernel"].endswith("gemm_kernel"):
            assert kernel["wide_copies"] >= 2, kernel


def test_one_row_is_multiplied_without_exchange_and_several_on_tensor_cores(kernels):
    for kernel in large(kernels):
        if kernel["kernel"].endswith("gemv_kernel"):
            assert kernel["barriers"] <= 1, f"{kernel}: more than that of the sum at the end"
        if kernel["kernel"].endswith("gemm_kernel"):
            assert kernel["tensor_cores"] >= 2, kernel
