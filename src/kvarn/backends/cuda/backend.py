"""`CudaBackend`: what a program takes on the card, and how it gets there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from kvarn.backends.base import Executable, KvCacheSpec, MemoryUse, StepLimits
from kvarn.backends.cuda.card import check_device, check_types
from kvarn.backends.cuda.memory import memory_use
from kvarn.config import CudaConfig
from kvarn.errors import CapacityError, ConfigError
from kvarn.program import PositionEmbed, Program
from kvarn.tensors import DType, TensorSource

if TYPE_CHECKING:
    from kvarn.backends.cuda.executable import CudaExecutable


class CudaBackend:
    """Runs programs on an NVIDIA GPU. Stateless; needs torch only to load.

    config.device may be "cpu", with Triton's interpreter, for tests. graphs: whether decode steps are recorded in CUDA
    graphs.
    """

    name = "cuda"

    def __init__(self, config: CudaConfig, *, graphs: bool = True) -> None:
        self.config = config
        self.graphs = graphs

    def memory_use(
        self,
        program: Program,
        dtypes: Mapping[str, DType],
        kv: KvCacheSpec,
        limits: StepLimits,
        *,
        shared: Collection[str] = (),
    ) -> MemoryUse:
        """What `load` and all steps will allocate on the card. CUDA's own context is not counted."""
        return memory_use(program, dtypes, kv, limits, self.config, shared, graphs=self.graphs)

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

        Raises ConfigError for settings and where torch, Triton or a card is missing, CapacityError where others have
        taken the card's memory meanwhile, ModelFileError from the source.
        """
        _check(program, limits)
        check_device(self.config.device)
        check_types(self.config.device, self.config.dtype, kv.dtype)
        import torch

        from kvarn.backends.cuda.executable import CudaExecutable

        known = None
        if beside is not None:
            if not isinstance(beside, CudaExecutable):
                raise TypeError("beside must be an executable of this back-end")
            known = beside.shared_weights(shared)
        try:
            return CudaExecutable(
                program, weights, kv, limits, self.config, known=known, shared=shared, graphs=self.graphs
            )
        except torch.OutOfMemoryError as error:
            said = str(error).split(" If reserved", 1)[0]
            raise CapacityError(f"{said} A smaller memory_utilization, or cache, leaves more to others") from None


def _check(program: Program, limits: StepLimits) -> None:
    for op in program.ops:
        if isinstance(op, PositionEmbed):
            learned = program.weight(op.weight).shape[0]
            if limits.max_model_len > learned:
                raise ConfigError(f"max_model_len must be at most {learned}, the positions that the model learned")
