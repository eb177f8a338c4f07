"""A loaded program on the card: weights, cache, activations, and the calls of a step."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kvarn.backends.base import InputBatch, KvCacheSpec, MemoryUse, StepLimits
from kvarn.backends.checks import check_batch
from kvarn.backends.cuda.ahead import StepsOnCard
from kvarn.backends.cuda.bind import Call, Parts, bind
from kvarn.backends.cuda.cache import KvStore
from kvarn.backends.cuda.frame import Frame
from kvarn.backends.cuda.graphs import CudaRecorder, StepGraphs
from kvarn.backends.cuda.inputs import StepBuffers, StepTensors
from kvarn.backends.cuda.launches import View
from kvarn.backends.cuda.lower import lower
from kvarn.backends.cuda.memory import assign, matrix_forms, memory_use, rotary_tables
from kvarn.backends.cuda.results import StepResults
from kvarn.backends.cuda.sampling_layout import SamplingLayout
from kvarn.backends.cuda.scratch import scratch_bytes
from kvarn.backends.cuda.step_layout import StepLayout
from kvarn.backends.cuda.weights import TORCH_DTYPES, WeightLoader, Weights
from kvarn.backends.plans import Plans
from kvarn.backends.row_rules import RowRules
from kvarn.config import CudaConfig
from kvarn.errors import EngineError
from kvarn.program import Program, RopeTable, Rows
from kvarn.tensors import TensorSource


@dataclass(frozen=True, slots=True)
class Plan:
    """The calls of a step in order, and where its outputs are afterwards."""

    calls: tuple[Call, ...]
    frame: Frame
    outputs: dict[str, View]


class CudaExecutable:
    """See `kvarn.backends.base.Executable`. Owns all of its memory on the device; one caller at a time.

    `launch` is for those who go on on the card: it takes tensors there and leaves logits there. `submit` and `collect`
    are `AheadExecutable`'s: they choose tokens there, too, and replay graphs of decode steps where there are such.
    """

    def __init__(
        self,
        program: Program,
        source: TensorSource,
        kv: KvCacheSpec,
        limits: StepLimits,
        config: CudaConfig,
        *,
        known: Weights | None = None,
        shared: Collection[str] = (),
        graphs: bool = True,
    ) -> None:
        """known: weights that another executable holds, those of the names `shared`. graphs: whether any are recorded;
        only on a card. Raises ConfigError, UnsupportedModelError, and ModelFileError from the source."""
        self.program = program
        self.kv = kv
        self.limits = limits
        self.config = config
        self.device = device = torch.device(config.device)
        own = (weight.name for weight in program.weights if weight.name not in shared)
        dtypes = {name: source.tensor(name).dtype for name in own}
        self._memory = memory_use(program, dtypes, kv, limits, config, shared, graphs=graphs)
        self._forms = matrix_forms(program, dtypes, config, shared)
        lowered = lower(program, self._forms, limits.outputs)
        weights = WeightLoader(program, source, config, self._forms).load(lowered, known or Weights())
        tables = {table: rotary_table(table, limits.max_model_len, device) for table in rotary_tables(program)}
        scratch = torch.empty(scratch_bytes(program, lowered, self._forms, limits), dtype=torch.uint8, device=device)
        cache = KvStore(program.kv_groups, kv, device)
        self._parts: Parts | None = Parts(
            program, weights, cache, kv.block_size, tables, scratch, limits.max_model_len
        )
        inputs = {name: program.buffer(name).width for name in program.inputs}
        largest = StepLayout.largest(program, kv, limits)
        self.step_buffers = StepBuffers(largest, inputs, device)
        self._plans = Plans(program, limits.outputs, self._build)
        recorder = CudaRecorder(device) if graphs and device.type == "cuda" else None
        self._graphs = StepGraphs(self.launch, self.step_buffers, largest, limits, recorder, kv.block_size)
        self._on_card = StepsOnCard(self._graphs, self._check, SamplingLayout.largest(program, limits), device)

    def execute(self, batch: InputBatch, outputs: Sequence[str] = ()) -> Mapping[str, NDArray[np.float32]]:
        """Runs one step and waits for it (see `Executable`). A result leaves the card when it is first looked at."""
        plan = self._plans.returning(outputs)
        self._check(batch)
        if plan is self._plans.main:
            laid_out = self._graphs.lay_out(batch)
            self._graphs.run(laid_out)
            step = laid_out.step
        else:
            step = self.step_buffers.fill(batch)
            self._run(plan, step)
        plan.frame.begin(step.num_tokens, step.num_outputs)  # which a replay does not say
        rows = {Rows.TOKENS: batch.num_tokens, Rows.OUTPUTS: int(batch.output_rows.size)}
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        found = ((name, plan.frame.at(view)[: rows[view.place.rows]]) for name, view in plan.outputs.items())
        return StepResults(dict(found))

    def launch(self, step: StepTensors) -> torch.Tensor:
        """Queues one step on the current stream; does not wait. Logits, float32 (R, vocab), there till the next.

        Nothing is checked; who calls it vouches for what `execute` would check. Allocates nothing of its own, so that
        it can be captured in a graph; the kernels' first calls for a size may compile.
        """
        plan = self._plans.main
        self._run(plan, step)
        return plan.frame.at(plan.outputs[self.program.output])

    def output(self, name: str) -> torch.Tensor:
        """On the device, one of `StepLimits.outputs` or the logits, as the last `launch` left it."""
        plan = self._plans.main
        return plan.frame.at(plan.outputs[name])

    def submit(self, batch: InputBatch, rules: RowRules, previous: NDArray[np.int32]) -> None:
        """See `AheadExecutable.submit`."""
        self._on_card.submit(batch, rules, previous)

    def collect(self) -> NDArray[np.int32]:
        """See `AheadExecutable.collect`."""
        return self._on_card.collect()

    def discard(self) -> None:
        """See `AheadExecutable.discard`."""
        self._on_card.discard()

    def prepare(self) -> bool:
        """See `AheadExecutable.prepare`: records a graph."""
        return self._graphs.prepare()

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole KV blocks (source, destination), in order. Raises ValueError."""
        self._open().cache.copy_blocks(pairs)

    def move_slots(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies keys and values from slot to slot in all layers (see `Executable`). Raises ValueError."""
        self._open().cache.move_slots(pairs)

    def commit(self) -> int:
        """Nothing is left to back: memory on the card is there when it is allocated."""
        return 0

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block."""
        return self._open().cache.block_bytes

    def read_block(self, block: int, out: NDArray[np.uint8]) -> None:
        """Copies a block's keys and values to uint8[block_bytes] on the host. Raises ValueError."""
        self._open().cache.read_block(block, out)

    def write_block(self, block: int, data: NDArray[np.uint8]) -> None:
        """Sets a block to what `read_block` gave. Raises ValueError."""
        self._open().cache.write_block(block, data)

    def shared_weights(self, names: Collection[str]) -> Weights:
        """Weights for another executable, which holds them as long as it needs them."""
        return self._open().weights.only(names)

    def memory(self) -> MemoryUse:
        """Bytes held, but for extra outputs' plans."""
        return self._memory

    def close(self) -> None:
        """Gives the memory back to the card. Idempotent."""
        self._on_card.discard()
        self._graphs.forget()
        self._parts = None
        self._plans.close()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _check(self, batch: InputBatch) -> None:
        check_batch(batch, self.program, self.kv, self.limits)
        most = self.limits.max_num_outputs
        if batch.output_rows.size > most:
            raise ValueError(f"{batch.output_rows.size} rows with logits, at most {most} are allowed")

    def _open(self) -> Parts:
        if self._parts is None:
            raise EngineError("the executable is closed")
        return self._parts

    def _build(self, outputs: tuple[str, ...]) -> Plan:
        lowered = lower(self.program, self._forms, (*self.limits.outputs, *outputs))
        dtype = self.config.dtype
        frame = Frame(assign(lowered, self.limits, dtype), TORCH_DTYPES[dtype], self.device)
        parts = self._open()
        return Plan(tuple(bind(launch, parts, frame) for launch in lowered.launches), frame, lowered.outputs)

    def _run(self, plan: Plan, step: StepTensors) -> None:
        plan.frame.begin(step.num_tokens, step.num_outputs)
        with torch.inference_mode(), float32_sums():
            for call in plan.calls:
                call(step)


@contextmanager
def float32_sums() -> Iterator[None]:
    """cuBLAS adds up shares of a product in float32, as the other kernels do: torch lets it round them to 16 bits
    otherwise. Put back at the end, for others in the process."""
    blas = torch.backends.cuda.matmul
    before = blas.allow_bf16_reduced_precision_reduction, blas.allow_fp16_reduced_precision_reduction
    blas.allow_bf16_reduced_precision_reduction = blas.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        blas.allow_bf16_reduced_precision_reduction, blas.allow_fp16_reduced_precision_reduction = before


def rotary_table(table: RopeTable, positions: int, device: torch.device) -> torch.Tensor:
    """Cosines and sines of positions 0, 1, …: float32 (positions, 2, pairs), computed in float64."""
    angles = np.arange(positions, dtype=np.float64)[:, None] * np.asarray(table.inv_freq)[None, :]
    both = np.stack([np.cos(angles), np.sin(angles)], axis=1) * table.attention_factor
    out = torch.empty(both.shape, dtype=torch.float32, device=device)
    return out.copy_(torch.from_numpy(both.astype(np.float32)))
