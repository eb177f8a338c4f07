"""What the compiler makes of attention for a Hopper card: no card is needed, and none is used."""

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
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, HERE / "compile_attention.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def of(kernels, *cases):
    return [kernel for kernel in kernels if kernel["case"] in cases and kernel["kernel"] == "_attention_kernel"]


def test_every_kernel_compiles_and_fits(kernels):
    assert {kernel["kernel"] for kernel in kernels} == {"_attention_kernel", "merge_kernel", "_write_kernel"}
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_LIMIT, kernel


def test_common_shapes_keep_their_values_in_registers(kernels):
    for kernel in of(kernels, "prefill", "decode"):
        assert kernel["stack"] == 0, f"{kernel} spills"


def test_two_programs_of_a_decode_share_a_multiprocessor(kernels):
    for kernel in of(kernels, "decode", "decode int8", "decode fp8"):
        assert 2 * kernel["shared"] <= SHARED_LIMIT, kernel
        assert 2 * kernel["registers"] * 256 <= 1 << 16, kernel
        assert kernel["stack"] <= 64, kernel


def test_prefill_multiplies_in_warp_groups_and_decode_on_tensor_cores(kernels):
    for kernel in of(kernels, "prefill"):
        assert kernel["wgmma"] >= 8, kernel
    for kernel in of(kernels, "decode", "decode int8", "decode fp8"):
        assert kernel["mma"] >= 8, kernel


def test_keys_are_copied_ahead_sixteen_bytes_at_a_time(kernels):
    for kernel in of(kernels, "prefill", "decode", "decode int8", "decode fp8"):
        assert kernel["wide_copies"] >= 8, kernel
