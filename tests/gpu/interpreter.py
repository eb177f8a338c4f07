"""Repairs of Triton's interpreter (3.6), which tests on the CPU run kernels in.

It multiplies bfloat16 matrices as the integers that hold their bits, and rounds to narrow floats without carrying into
the exponent: torch does both here, which rounds to nearest, ties to even, as cards do. And it takes arrays of one
element for the bounds of a loop, which NumPy no longer converts to integers.

It also replaces the language by its own anew in every call of one device function by another, which takes most of its
time: here once a launch, for each module.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

Array = NDArray[Any]

_TYPES = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(array: Array, itemsize: int) -> torch.Tensor:
    integers = np.ascontiguousarray(array).view(f"i{itemsize}" if itemsize > 1 else "u1")
    return torch.from_numpy(integers.copy())


def convert_float(data: Array, source: tl.dtype, target: tl.dtype, rounding: object) -> Array:
    """The bits of `data`, floats of type `source`, as floats of type `target`; as unsigned integers."""
    del rounding
    size = target.primitive_bitwidth // 8
    floats = _bits(data, source.primitive_bitwidth // 8).view(_TYPES[source]).to(torch.float32)
    result = floats.to(_TYPES[target]).view(_BITS[size]).numpy()
    return result.view(f"u{size}").reshape(data.shape)


def repair() -> None:
    """Once for a process, before any kernel runs; changes nothing for compiled kernels."""
    builder = interpreter.InterpreterBuilder
    plain_dot, plain_patch = builder.create_dot, interpreter._patch_lang_tensor

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = convert_float(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        return plain_dot(self, widened(a), widened(b), d, precision, imprecise)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        plain_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    launch, patched = interpreter.GridExecutor.__call__, set[int]()

    def call_grid(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    def call_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = call_grid
    interpreter.InterpretedFunction.__call__ = call_function
    interpreter._patch_lang_tensor = patch_tensor
    interpreter._convert_float = convert_float
    builder.create_dot = create_dot
