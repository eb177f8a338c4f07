"""`CudaBackend`: what a program takes on the card, and how it gets there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from kvarn.backends.base import Executable, KvCacheSpec, MemoryUse, StepLimits
from kvarn.backends.cuda.forms import DTYPE_BYTES, WeightForm
from kvarn.backends.cuda.memory import memory_use
from kvarn.errors import ConfigError
from kvarn.program import PositionEmbed, Program
from kvarn.tensors import DType, TensorSource

if TYPE_CHECKING:
    from kvarn.backends.cuda.executable import CudaExecutable

INSTALL = "install PyTorch and Triton for your driver: pip install 'kvarn[cuda]'"


class CudaBackend:
    """Runs programs on an NVIDIA GPU. Stateless; needs torch only to load.

    dtype: what activations are computed in, one of bfloat16, float16, float32. form: of the matrices that activations
    are multiplied with; tables of embeddings are of the dtype. device: "cuda", "cuda:1", …; "cpu" with Triton's
    interpreter, for tests. Raises ConfigError.
    """

    name = "cuda"

    def __init__(self, dtype: str = "bfloat16", form: WeightForm | None = None, device: str = "cuda") -> None:
        if dtype not in DTYPE_BYTES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, not {dtype!r}")
        self.dtype = dtype
        self.form = form or WeightForm("dense")
        self.device = device

    def memory_use(
        self,
        program: Program,
        dtypes: Mapping[str, DType],
        kv: KvCacheSpec,
        limits: StepLimits,
        *,
        shared: Collection[str] = (),
    ) -> MemoryUse:
        """What `load` will allocate on the card, to the byte; CUDA's own context and cuBLAS's workspace come on top."""
        del dtypes
        return memory_use(program, kv, limits, self.dtype, self.form, shared)

    def load(
        self,
        program: Program,
        weights: TensorSource,
        kv: KvCacheSpec,
        limits: StepLimits,
        *,
        beside: Executable | None = None,
        shared: Collection[str] = (),
    ) -> CudaExecutable:
        """Takes every weight to the card, allocates cache and activations there. The file is not needed afterwards.

        Raises ConfigError for settings and where torch, Triton or a card is missing, ModelFileError from the source.
        """
        _check(program, limits)
        check_device(self.device)
        import torch

        from kvarn.backends.cuda.executable import CudaExecutable

        known = None
        if beside is not None:
            if not isinstance(beside, CudaExecutable):
                raise TypeError("beside must be an executable of this back-end")
            known = beside.shared_weights(shared)
        return CudaExecutable(
            program, weights, kv, limits,
            device=torch.device(self.device), dtype=self.dtype, form=self.form, known=known, shared=shared,
        )  # fmt: skip


def check_device(device: str) -> None:
    """Raises ConfigError, with what to do, where torch, Triton or the card is missing."""
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"device {device} needs {error.name}, which is not installed; {INSTALL}") from None
    if device.startswith("cuda") and not torch.cuda.is_available():
        reason = "torch was built without CUDA" if torch.version.cuda is None else "torch finds no NVIDIA driver or card"
        raise ConfigError(f"device {device}: {reason}; see what `nvidia-smi` says, and {INSTALL}")


def _check(program: Program, limits: StepLimits) -> None:
    for op in program.ops:
        if isinstance(op, PositionEmbed):
            learned = program.weight(op.weight).shape[0]
            if limits.max_model_len > learned:
                raise ConfigError(f"max_model_len must be at most {learned}, the positions that the model learned")
