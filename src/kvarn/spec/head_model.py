"""`HeadModel`: a program that a drafter runs beside the target's, as the engine plans and loads it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvarn.backends import Backend, Executable, KvCacheSpec, MemoryUse, StepLimits
from kvarn.program import Logits, Program
from kvarn.runner import Drafter
from kvarn.tensors import DType, Tensor, TensorSource
from kvarn.tensors.quantize import quantize_q4_1, quantize_q8_0


@dataclass(frozen=True)
class HeadModel:
    """What a drafter of its own program needs before it can run. Nothing is loaded yet."""

    program: Program
    weights: TensorSource
    buffers: tuple[str, ...]
    """Of the target's program, that the drafter wants to see; returned by every step."""
    shared: frozenset[str]
    """Weights that are the target's own, under the same names."""
    cache: Callable[[KvCacheSpec, StepLimits], KvCacheSpec]
    """The program's KV cache, by the target's and its largest step."""
    limits: Callable[[StepLimits], StepLimits]
    """The program's largest step, by the target's."""
    start: Callable[[Executable, StepLimits, int], Drafter]
    """Makes the drafter of the loaded program, the target's limits and block size. It owns the executable."""

    @cached_property
    def _dtypes(self) -> dict[str, DType]:
        own = (weight.name for weight in self.program.weights if weight.name not in self.shared)
        return {name: self.weights.tensor(name).dtype for name in own}

    def target_limits(self, limits: StepLimits) -> StepLimits:
        """The target's largest step with what is wanted of it."""
        return replace(limits, outputs=tuple(dict.fromkeys((*limits.outputs, *self.buffers))))

    def uses(self, backend: Backend) -> Callable[[KvCacheSpec, StepLimits], MemoryUse]:
        """What `load` will allocate, by the target's cache and limits.

        Its own cache does not grow with the target's, so it counts as activations.
        """

        def use(kv: KvCacheSpec, limits: StepLimits) -> MemoryUse:
            found = backend.memory_use(
                self.program, self._dtypes, self.cache(kv, limits), self.limits(limits), shared=self.shared
            )
            return replace(found, kv_cache=0, activations=found.activations + found.kv_cache)

        return use

    def load(self, backend: Backend, target: Executable, kv: KvCacheSpec, limits: StepLimits) -> Drafter:
        """The drafter beside the loaded target, whose cache and limits are given."""
        executable = backend.load(
            self.program, self.weights, self.cache(kv, limits), self.limits(limits), beside=target, shared=self.shared
        )
        return self.start(executable, limits, kv.block_size)


class HeadTensors:
    """`TensorSource` of heads (see `stored`), and of the target's own weights for shared names."""

    def __init__(
        self, tensors: Mapping[str, NDArray[np.floating]], target: TensorSource | None, shared: Collection[str] = ()
    ) -> None:
        """target: None where nothing will be loaded."""
        self._tensors = {name: stored(name, values) for name, values in tensors.items()}
        self._target = target
        self._shared = frozenset(shared)

    def tensor(self, name: str) -> Tensor:
        """The weight of that name."""
        if name in self._shared:
            assert self._target is not None, "loaded beside a model"
            return self._target.tensor(name)
        return self._tensors[name]

    def release(self) -> None:
        """Lets the target's pages go."""
        if self._target is not None:
            self._target.release()


def stored(name: str, values: NDArray[np.floating]) -> Tensor:
    """A tensor of heads as it is run: LM heads, most of what a guess reads, in 4 bits, other matrices in 8."""
    if values.ndim < 2 or values.shape[1] % DType.Q8_0.block_size:
        return Tensor.from_array(values.astype(np.float32))
    return quantize_q4_1(values) if name.endswith("lm_head.weight") else quantize_q8_0(values)


def logits_input(program: Program) -> str:
    """The buffer that the program's logits are made of: hidden states after the last norm, a row for each output."""
    return next(op.x for op in program.ops if isinstance(op, Logits) and op.out == program.output)
