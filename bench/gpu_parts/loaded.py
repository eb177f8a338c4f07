"""Random models on kvarn's CUDA back-end: loaded, stepped and planned as the engine does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_parts.shapes import Sizes
from kvarn.backends import InputBatch, KvCacheSpec, MemoryUse, StepLimits
from kvarn.backends.cuda import CudaBackend
from kvarn.backends.cuda.ahead import StepsOnCard
from kvarn.backends.cuda.executable import CudaExecutable
from kvarn.backends.cuda.graphs import StepGraphs
from kvarn.backends.cuda.sampling_layout import SamplingLayout
from kvarn.backends.cuda.step_layout import StepLayout
from kvarn.backends.row_rules import RowRules
from kvarn.config import CudaConfig
from kvarn.kv_types import KV_TYPES
from kvarn.models.in_memory import InMemoryModel
from kvarn.program import Embed
from kvarn.program.counts import Counts, StepShape, count_step, total
from kvarn.request import SamplingParams
from kvarn.sampling.rules import RuleBook
from kvarn.step import NewSequence

BLOCK_SIZE = 16
UNDER_WAY = 2
"""Steps begun before the oldest one's tokens are read: as the engine does it."""
COPIED_AT_ONCE = 64
"""Blocks: what a copy holds meanwhile must not be the most that is held."""
WARM_STEPS = 8
"""More than are launched one by one before a graph is recorded."""
Step = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Form:
    """Of matrices: its name in kvarn's settings, and what an element takes at least, its scale's share in it."""

    weights: str
    element_bytes: float
    row_bytes: int = 0
    """Of a scale for each row."""


FORMS = {
    "bf16": Form("dense", 2.0),
    "int8": Form("int8", 1.0, 4),
    "fp8": Form("fp8", 1.0, 4),
    "int4": Form("int4", 0.5 + 4 / 128),
}
"""By the names of the tables. int4: a 16-bit scale and offset for 128, as most checkpoints have it."""


class _Chooses(Protocol):
    """See `kvarn.backends.ahead.AheadExecutable`."""

    def submit(self, batch: InputBatch, rules: RowRules, previous: NDArray[np.int32]) -> None: ...

    def collect(self) -> NDArray[np.int32]: ...

    def discard(self) -> None: ...


class Loaded:
    """A model on the device, with room for the steps of `Sizes`. Does not own the executable."""

    def __init__(self, executable: CudaExecutable, model: InMemoryModel, form: Form) -> None:
        self._executable = executable
        self._form = form
        self._vocab = model.config.vocab_size
        self._tables = {op.weight for op in model.program.ops if isinstance(op, Embed)}
        self._filled = 0

    def prefill(self, length: int) -> Step:
        """A step that computes a prompt of random tokens."""
        self._filled = 0
        batch = self._prompt(length)
        return lambda _i: self._launch(batch)

    def decode(self, batch: int, context: int, *, graphs: bool) -> Step:
        """A step of one token for each of `batch` sequences, the last of `context`, greedily chosen on the card from
        what the step before chose. All sequences have keys and values, in blocks of their own.

        graphs: launches are replayed, and only the step's arrays are new.
        """
        self._fill(batch, context)
        chooses: _Chooses = self._executable if graphs else self._without_graphs()
        chooses.discard()
        arrays, rules = self._decodes(batch, context), self._greedy(batch, context)
        begun = 0

        def step(_i: int) -> None:
            nonlocal begun
            previous = np.arange(batch, dtype=np.int32) if begun else np.full(batch, -1, np.int32)
            chooses.submit(arrays, rules, previous)
            begun += 1
            if begun >= UNDER_WAY:
                chooses.collect()

        for i in range(WARM_STEPS if self._executable.device.type == "cuda" else 0):
            step(i)
        return step

    def cost(self, shape: StepShape) -> Counts:
        """The fewest operations and bytes of such a step, with the weights and the cache as they are stored."""
        kv = KV_TYPES[self._executable.kv.dtype]
        return total(count_step(self._executable.program, shape, self._bytes, kv))

    def logits(self, prompt: list[int]) -> torch.Tensor:
        """float32 [vocab], behind the prompt."""
        batch = InputBatch.of_one(prompt, block_size=BLOCK_SIZE)
        return torch.from_numpy(np.array(self._executable.execute(batch)[self._executable.program.output][0]))

    def _bytes(self, name: str) -> int:
        weight = self._executable.program.weight(name)
        form = FORMS["bf16"] if len(weight.shape) != 2 or name in self._tables else self._form
        return int(weight.num_elements * form.element_bytes) + weight.shape[0] * form.row_bytes

    def _without_graphs(self) -> _Chooses:
        """The same, over the same weights and cache, where nothing is recorded."""
        it = self._executable
        largest = StepLayout.largest(it.program, it.kv, it.limits)
        graphs = StepGraphs(it.launch, it.step_buffers, largest, it.limits, None, it.kv.block_size)
        return StepsOnCard(graphs, lambda _batch: None, SamplingLayout.largest(it.program, it.limits), it.device)

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

    def _greedy(self, batch: int, context: int) -> RowRules:
        book = RuleBook(self._vocab)
        for number in range(batch):
            book.add(NewSequence(number, (), SamplingParams(temperature=0.0), 0, 0))
        return book.of(range(batch), [context] * batch)

    def _fill(self, batch: int, context: int) -> None:
        """Computes a context, and copies its blocks for all other sequences."""
        per = -(-context // BLOCK_SIZE)
        if self._filled == batch * per:
            return
        self._launch(self._prompt(context))
        for first in range(per, batch * per, COPIED_AT_ONCE):
            blocks = range(first, min(first + COPIED_AT_ONCE, batch * per))
            self._executable.copy_blocks([(block % per, block) for block in blocks])
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
    return CudaBackend(settings(device, sizes, weights)).memory_use(model.program, dtypes, kv, limits)


@contextmanager
def load(model: InMemoryModel, device: torch.device, sizes: Sizes, *, weights: str, kv_type: str) -> Iterator[Loaded]:
    """The model on the device, for as long as the `with` lasts. weights: a name of `FORMS`."""
    kv, limits = room(sizes, kv_type)
    executable = CudaBackend(settings(device, sizes, weights)).load(model.program, model, kv, limits)
    try:
        yield Loaded(executable, model, FORMS[weights])
    finally:
        executable.discard()
        executable.close()


def settings(device: torch.device, sizes: Sizes, weights: str) -> CudaConfig:
    """kvarn's, for weights of that name in `FORMS`."""
    return CudaConfig(
        dtype=sizes.dtype, weights=FORMS[weights].weights, weight_group=sizes.int4_group, device=str(device)
    )
