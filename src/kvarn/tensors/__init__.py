"""Tensors as files hold them: `DType` (block sizes of every quantized type), `Tensor` (shape and raw bytes)."""

from kvarn.tensors.dtypes import DType
from kvarn.tensors.tensor import Tensor, TensorSource

__all__ = ["DType", "Tensor", "TensorSource"]
