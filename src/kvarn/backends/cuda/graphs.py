"""Steps that are launched in one call: CUDA graphs of decode steps, recorded beside serving.

A step in which every sequence computes one token is laid out for a bucket, a little more than it has, so that all steps
of a bucket launch the same kernels on the same addresses. The first ones of a bucket are launched kernel by kernel, as
all other steps are; then its launches are recorded once, and replayed.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from kvarn.backends.base import InputBatch, StepLimits
from kvarn.backends.cuda.step_layout import StepLayout

if TYPE_CHECKING:
    import torch

    from kvarn.backends.cuda.inputs import StepBuffers, StepTensors

logger = logging.getLogger(__name__)
EAGER_RUNS = 4
"""Steps of a bucket that are launched kernel by kernel before it is recorded while others wait: most graphs are
recorded when there is nothing to do, and a bucket that is hardly ever used is not worth a pause."""
LEAST_CONTEXT = 1024


@dataclass(frozen=True, slots=True)
class Bucket:
    """Steps of at most so many sequences, none of which has more tokens than `context`."""

    sequences: int
    context: int


class Buckets:
    """Which bucket a step is in. It has a few rows for nothing, an eighth of them where they are many, and block
    tables that are up to four times as wide as they need be."""

    def __init__(self, limits: StepLimits) -> None:
        self._sizes = _sizes(min(limits.max_num_sequences, limits.max_num_tokens, limits.max_num_outputs))
        self._contexts = _contexts(limits.max_model_len)

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._sizes) * len(self._contexts)

    def of(self, batch: InputBatch) -> Bucket | None:
        """None where some sequence computes more than a token, or one that is not sampled from."""
        count = batch.num_sequences
        if not batch.num_tokens == count == batch.output_rows.size or batch.tree_parents is not None or batch.inputs:
            return None
        context = int(batch.seq_lens.max())
        if count > self._sizes[-1] or context > self._contexts[-1]:
            return None
        sizes, contexts = self._sizes, self._contexts
        return Bucket(sizes[bisect_left(sizes, count)], contexts[bisect_left(contexts, context)])


def _sizes(most: int) -> tuple[int, ...]:
    sizes = [1, 2, 4]
    while sizes[-1] < most:
        sizes.append(sizes[-1] + max(4, sizes[-1] // 8 // 4 * 4))
    return (*(size for size in sizes if size < most), most)


def _contexts(most: int) -> tuple[int, ...]:
    contexts = [LEAST_CONTEXT]
    while contexts[-1] < most:
        contexts.append(4 * contexts[-1])
    return (*(context for context in contexts if context < most), most)


class Recording(Protocol):
    """What was launched, to be launched again."""

    def replay(self) -> None:
        """Queues it on the current stream."""
        ...


class Recorder(Protocol):
    """Records launches."""

    def record(self, run: Callable[[], torch.Tensor]) -> tuple[Recording, torch.Tensor]:
        """Runs it once for what it does, after all that was queued on the current stream, and once to record it.

        Also returns the tensor that a replay leaves its result in."""
        ...


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A step that lies on the card, to be run next."""

    step: StepTensors
    bucket: Bucket | None
    num_outputs: int


class StepGraphs:
    """Runs steps, in buckets where it can. Owns the recordings."""

    def __init__(
        self,
        launch: Callable[[StepTensors], torch.Tensor],
        buffers: StepBuffers,
        largest: StepLayout,
        limits: StepLimits,
        recorder: Recorder | None,
        block_size: int,
    ) -> None:
        """launch: queues a step's kernels and allocates nothing; what it returns lies in the same place for all steps
        of a layout. largest: layout of the largest step. recorder: None: nothing is recorded."""
        self._launch = launch
        self._buffers = buffers
        self._largest = largest
        self._buckets = Buckets(limits)
        self._recorder = recorder
        self._block_size = block_size
        self._runs: Counter[Bucket] = Counter()
        """Of buckets that are not recorded."""
        self._recordings: dict[Bucket, tuple[Recording, torch.Tensor] | None] = {}
        """None: it cannot be recorded."""

    @property
    def recorded(self) -> frozenset[Bucket]:
        """Buckets whose steps are replayed."""
        return frozenset(bucket for bucket, recording in self._recordings.items() if recording is not None)

    def lay_out(self, batch: InputBatch) -> LaidOut:
        """Takes a checked batch to the card, laid out as its bucket is. Valid until the next call."""
        bucket = None if self._recorder is None else self._buckets.of(batch)
        count = int(batch.output_rows.size)
        context = int(batch.seq_lens.max()) if bucket is None else bucket.context
        # Tables come as wide as the longest sequence that there may ever be.
        tables = batch.block_tables[:, :, : -(-context // self._block_size)]
        batch = replace(batch, block_tables=tables)
        if bucket is None:
            return LaidOut(self._buffers.fill(batch), None, count)
        step = self._buffers.fill(batch, self._layout(bucket))
        return LaidOut(replace(step, max_query=1, max_context=bucket.context), bucket, count)

    def run(self, laid_out: LaidOut) -> torch.Tensor:
        """Queues the step: its logits, float32[R, vocab], until the next one."""
        return self._run(laid_out)[: laid_out.num_outputs]

    def prepare(self) -> bool:
        """Records a bucket that was used; False where none is left. No step may lie on the card unfinished."""
        bucket = next(iter(self._runs), None)
        if bucket is None:
            return False
        step = self._buffers.fill(_nothing(self._largest), self._layout(bucket))
        self._record(bucket, replace(step, max_query=1, max_context=bucket.context))
        return bool(self._runs)

    def forget(self) -> None:
        """Drops the recordings and the memory they hold."""
        self._recordings.clear()
        self._runs.clear()

    def _run(self, laid_out: LaidOut) -> torch.Tensor:
        step, bucket = laid_out.step, laid_out.bucket
        if bucket is None:
            return self._launch(step)
        if bucket in self._recordings:
            recorded = self._recordings[bucket]
            if recorded is None:
                return self._launch(step)
            recording, logits = recorded
            recording.replay()
            return logits
        self._runs[bucket] += 1
        return self._launch(step) if self._runs[bucket] <= EAGER_RUNS else self._record(bucket, step)

    def _record(self, bucket: Bucket, step: StepTensors) -> torch.Tensor:
        """Runs the step, and records its bucket on the way."""
        assert self._recorder is not None
        del self._runs[bucket]
        try:
            self._recordings[bucket] = recorded = self._recorder.record(lambda: self._launch(step))
        except RuntimeError:
            logger.exception("steps of %d sequences cannot be recorded; they are launched one by one", bucket.sequences)
            self._recordings[bucket] = None
            return self._launch(step)
        return recorded[1]

    def _layout(self, bucket: Bucket) -> StepLayout:
        count = bucket.sequences
        blocks = -(-bucket.context // self._block_size)
        return StepLayout(count, count, count, self._largest.groups, blocks, False)


def _nothing(largest: StepLayout) -> InputBatch:
    """A batch of no sequences, which laid out for more writes nothing."""
    none, groups = np.zeros(0, np.int32), largest.groups
    tables = np.zeros((0, groups, 0), np.int32)
    return InputBatch(none, none, np.zeros((0, groups), np.int64), np.zeros(1, np.int32), none, tables, none)


class CudaRecorder:
    """Records CUDA graphs, all of whose memory is one pool, since no two run at once.

    Recording happens on a stream of its own, in the caller's thread: what other threads do on the card is let be.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self._torch = torch
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], torch.Tensor]) -> tuple[Recording, torch.Tensor]:
        """See `Recorder.record`. Raises RuntimeError where CUDA refuses."""
        cuda = self._torch.cuda
        graph = cuda.CUDAGraph()
        self._stream.wait_stream(cuda.current_stream())
        try:
            with cuda.stream(self._stream):
                run()  # what is compiled, chosen or allocated at first use must be before a recording begins
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    result = run()
                finally:
                    graph.capture_end()
        finally:  # also where CUDA refuses: the first run may still be at work where the next one will be
            cuda.current_stream().wait_stream(self._stream)
        return graph, result
