"""Compiles what a call launches, for sm_90 and without a card, and says what the compiler made of it.

The interpreter takes more than the compiler does, so a kernel that only it accepts must not pass. A process of its own:
whether kernels are interpreted is decided where they are defined.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class _NoCard:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


@dataclass(frozen=True)
class Kernel:
    """What the compiler made of one launch. shared: bytes; registers: a thread's; stack: bytes that spilled."""

    name: str
    shared: int
    registers: int
    stack: int
    ptx: str


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack) of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    words = dict(word.split(":", 1) for word in text.split() if word.startswith(("REG:", "STACK:")))
    return int(words["REG"]), int(words["STACK"])


@contextmanager
def compiling() -> Iterator[list[Kernel]]:
    """Within, launches compile for sm_90 and run nothing; tensors may be the CPU's. Yields what they became."""
    kernels: list[Kernel] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made = run(self, *args, grid=grid, warmup=True, **options)
        registers, stack = _resources(made.asm["cubin"])
        kernels.append(Kernel(made.name, made.metadata.shared, registers, stack, made.asm["ptx"]))
        return made

    driver.set_active(_NoCard())
    JITFunction.run = compile_only
    try:
        yield kernels
    finally:
        JITFunction.run = run


def report(case: str, call: Callable[[], None]) -> None:
    """Prints a line for each kernel that the call launches."""
    with compiling() as kernels:
        call()
    for kernel in kernels:
        print(
            f"{case:<34} {kernel.name:<20} {kernel.registers:>4} registers  {kernel.stack:>5} B stack  "
            f"{kernel.shared:>7} B shared  {kernel.ptx.count('wgmma.mma_async'):>4} wgmma  "
            f"{kernel.ptx.count('mma.sync'):>4} mma.sync  {kernel.ptx.count('cp.async.cg'):>4} cp.async"
        )
