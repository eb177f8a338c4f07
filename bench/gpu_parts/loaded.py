"""Random models on kvarn's CUDA back-end: loaded, stepped and planned as the engine does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from gpu_parts.shapes import Sizes
from kvarn.backends import InputBatch, KvCacheSpec, MemoryUse, StepLimits
from kvarn.backends.cuda.backend import CudaBackend
from kvarn.backends.cuda.executable import CudaExecutable
from kvarn.backends.cuda.forms import WeightForm, matrix_bytes
from kvarn.kv_types import KV_TYPES
from kvarn.models.in_memory import InMemoryModel
from kvarn.program import Embed
from kvarn.program.counts import Counts, StepShape, count_step, total

BLOCK_SIZE = 16
FORMS = {
    "bf16": WeightForm("dense"),
    "int8": WeightForm("int8"),
    "fp8": WeightForm("fp8"),
    "int4": WeightForm("int4", 128),
}
"""Forms of weights by the names of the tables; int4 has a scale for each 128, as most checkpoints of it do."""
Step = Callable[[int], object]


class Loaded:
    """A model on the device, with room for the steps of `Sizes`. Owns the executable."""

    def __init__(self, executable: CudaExecutable, model: InMemoryModel, form: WeightForm) -> None:
        self._executable = executable
        self._form = form
        self._vocab = model.config.vocab_size
        self._tables = {op.weight for op in model.program.ops if isinstance(op, Embed)}
        self._filled = 0

    def prefill(self, length: int) -> Step:
        """A step that computes a prompt of random tokens."""
        batch = self._prompt(length)
        return lambda _i: self._launch(batch)

    def decode(self, batch: int, context: int, *, graphs: bool) -> Step:
        """A step of one token for each of `batch` sequences, the last of `context`. All of them have keys and values,
        in blocks of their own. graphs: launches are replayed, and only the step's arrays are new."""
        self._fill(batch, context)
        arrays = self._decodes(batch, context)
        if not graphs or self._executable.device.type != "cuda":
            return lambda _i: self._launch(arrays)
        step = self._executable.step_buffers.fill(arrays)
        self._executable.launch(step)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._executable.launch(step)

        def replay(_i: int) -> None:
            self._executable.step_buffers.fill(arrays)
            graph.replay()

        return replay

    def cost(self, shape: StepShape) -> Counts:
        """The fewest operations and bytes of such a step, with the weights and the cache as they are stored."""
        kv = KV_TYPES[self._executable.kv.dtype]
        return total(count_step(self._executable.program, shape, self._bytes, kv))

    def _bytes(self, name: str) -> int:
        weight = self._executable.program.weight(name)
        if len(weight.shape) != 2:
            return 2 * weight.num_elements
        form = WeightForm("dense") if name in self._tables else self._form
        return matrix_bytes(form, *weight.shape, self._executable.dtype, lambda size: size)

    def _launch(self, batch: InputBatch) -> None:
        self._executable.launch(self._executable.step_buffers.fill(batch))

    def _prompt(self, length: int) -> InputBatch:
        ids = np.random.default_rng(length).integers(0, self._vocab, length)
        return InputBatch.of_one(ids, block_size=BLOCK_SIZE)

    def _decodes(self, batch: int, context: int) -> InputBatch:
        per = -(-context // BLOCK_SIZE)
        starts = np.arange(batch + 1, dtype=np.int32)
        return InputBatch.of_tables(
            token_ids=np.random.default_rng(batch).integers(0, self._vocab, batch).astype(np.int32),
            positions=np.full(batch, context - 1, np.int32),
            query_start=starts,
            seq_lens=np.full(batch, context, np.int32),
            tables=np.arange(batch * per, dtype=np.int32).reshape(batch, per),
            output_rows=starts[:-1],
            block_size=BLOCK_SIZE,
        )

    def _fill(self, batch: int, context: int) -> None:
        """Computes a context, and copies its blocks for all other sequences."""
        per = -(-context // BLOCK_SIZE)
        if self._filled == batch * per:
            return
        self._launch(self._prompt(context))
        self._executable.copy_blocks([(block % per, block) for block in range(per, batch * per)])
        self._filled = batch * per


def room(sizes: Sizes, kv_type: str) -> tuple[KvCacheSpec, StepLimits]:
    """For all steps of `Sizes`."""
    longest = max(sizes.prefill_lengths)
    most = max(sizes.decode_batches)
    blocks = max(most * -(-sizes.decode_context // BLOCK_SIZE), -(-longest // BLOCK_SIZE))
    limits = StepLimits(max(longest, most, sizes.decode_context), most, max(longest, sizes.decode_context))
    return KvCacheSpec(blocks, BLOCK_SIZE, kv_type), limits


def plan(model: InMemoryModel, device: torch.device, sizes: Sizes, *, weights: str, kv_type: str) -> MemoryUse:
    """What `load` will take."""
    kv, limits = room(sizes, kv_type)
    dtypes = {name: tensor.dtype for name, tensor in model.tensors.items()}
    return _backend(device, sizes, weights).memory_use(model.program, dtypes, kv, limits)


@contextmanager
def load(
    model: InMemoryModel, device: torch.device, sizes: Sizes, *, weights: str, kv_type: str
) -> Iterator[Loaded]:
    """The model on the device, for as long as the `with` lasts. weights: a name of `FORMS`."""
    kv, limits = room(sizes, kv_type)
    executable = _backend(device, sizes, weights).load(model.program, model, kv, limits)
    try:
        yield Loaded(executable, model, FORMS[weights])
    finally:
        executable.close()


def first_logits(model: InMemoryModel, device: torch.device, sizes: Sizes, prompt: list[int]) -> torch.Tensor:
    """float32 [vocab], behind the prompt, with the weights as they are."""
    with load(model, device, sizes, weights="bf16", kv_type=sizes.dtype) as loaded:
        executable = loaded._executable
        logits = executable.execute(InputBatch.of_one(prompt, block_size=BLOCK_SIZE))[model.program.output]
    return torch.from_numpy(np.array(logits[0]))


def _backend(device: torch.device, sizes: Sizes, weights: str) -> CudaBackend:
    return CudaBackend(sizes.dtype, FORMS[weights], str(device))
