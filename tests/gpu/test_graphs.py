"""Which decode steps are recorded and replayed, and what they are laid out for. The graphs are not CUDA's."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvarn.backends import InputBatch, StepLimits
from kvarn.backends.cuda.graphs import EAGER_RUNS, Bucket, Buckets, CudaRecorder, StepGraphs
from kvarn.backends.cuda.inputs import StepBuffers
from kvarn.backends.cuda.step_layout import StepLayout

BLOCK = 16
LIMITS = StepLimits(max_num_tokens=64, max_num_sequences=20, max_model_len=1500)
LARGEST = StepLayout(64, 20, 20, 1, -(-1500 // BLOCK), True)


def decodes(lengths, tokens=1):
    """A batch of sequences of these lengths, each of which computes its last tokens, the last of them sampled from.

    Its tables are as wide as the model is long, as a runner's are."""
    lengths = np.array(lengths, np.int32)
    query_start = (np.arange(lengths.size + 1) * tokens).astype(np.int32)
    positions = np.concatenate([np.arange(n - tokens, n) for n in lengths]).astype(np.int32)
    width = -(-max(1500, int(lengths.max())) // BLOCK)
    tables = (np.arange(lengths.size * width) % 50).astype(np.int32).reshape(-1, width)
    ids = np.arange(positions.size, dtype=np.int32) % 7
    return InputBatch.of_tables(ids, positions, query_start, lengths, tables, query_start[1:] - 1, block_size=BLOCK)


class FakeCard:
    """What a step does is its tokens times 10 and the number of its layout's rows; a graph does it again."""

    def __init__(self, *, refuses=()):
        self.buffers = StepBuffers(LARGEST, {}, torch.device("cpu"))
        self.launched, self.replayed, self.recorded = [], 0, 0
        self.refuses = refuses
        self.logits = torch.zeros((64, 1))
        self.graphs = StepGraphs(self.launch, self.buffers, LARGEST, LIMITS, self, BLOCK)

    def launch(self, step):
        self.launched.append(step)
        self.logits[: step.num_tokens, 0] = step.token_ids * 10 + step.num_tokens
        return self.logits[: step.num_tokens]

    def record(self, run):
        result = run()
        if len(result) in self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorded += 1
        step = self.launched[-1]

        class Graph:
            @staticmethod
            def replay():
                self.replayed += 1
                self.logits[: step.num_tokens, 0] = step.token_ids * 10 + step.num_tokens

        return Graph(), result

    def step(self, batch):
        return self.graphs.run(self.graphs.lay_out(batch))[:, 0].tolist()


@given(st.lists(st.integers(1, 1500), min_size=1, max_size=20))
def test_a_bucket_has_room_for_the_step_and_not_much_more(lengths):
    bucket = Buckets(LIMITS).of(decodes(lengths))
    count, longest = len(lengths), max(lengths)
    assert count <= bucket.sequences <= min(20, max(count * 2 if count < 4 else count + max(4, count // 8), 1))
    assert longest <= bucket.context <= max(1024, min(1500, 4 * longest))


def test_a_big_server_has_few_buckets():
    buckets = Buckets(StepLimits(max_num_tokens=8192, max_num_sequences=512, max_model_len=32768))
    sizes = {buckets.of(decodes([9] * count)).sequences for count in range(1, 513)}
    assert len(sizes) < 40
    assert buckets.count == 4 * len(sizes)
    assert {buckets.of(decodes([length])).context for length in (1, 600, 1025, 5000, 32768)} == {
        1024, 4096, 16384, 32768,
    }  # fmt: skip


def test_other_steps_are_in_no_bucket():
    buckets = Buckets(LIMITS)
    prompt, tree, silent = decodes([9], tokens=3), decodes([9, 5]), decodes([9, 5])
    assert buckets.of(prompt) is None
    tree = InputBatch(**{**fields(tree), "tree_parents": np.array([-1, -1], np.int32)})
    assert buckets.of(tree) is None
    silent = InputBatch(**{**fields(silent), "output_rows": np.array([1], np.int32)})
    assert buckets.of(silent) is None
    assert buckets.of(InputBatch(**{**fields(decodes([9])), "inputs": {"rows": np.zeros((1, 2), np.float32)}})) is None
    assert Buckets(StepLimits(64, 4, 1500)).of(decodes([9] * 5)) is None


def fields(batch):
    return {name: getattr(batch, name) for name in batch.__dataclass_fields__}


def test_rows_beyond_the_batch_write_nothing():
    card = FakeCard()
    card.step(decodes([40, 700, 3]))
    (step,) = card.launched
    assert (step.num_tokens, step.num_outputs, step.max_query, step.max_context) == (4, 4, 1, 1024)
    assert step.slot_mapping[3].tolist() == [-1]
    assert step.seq_lens.tolist() == [40, 700, 3, 0]
    assert step.query_start.tolist() == [0, 1, 2, 3, 3]
    assert step.block_tables.shape == (4, 1, 64)
    assert (step.block_tables[3] == -1).all()


def test_a_bucket_is_recorded_after_some_steps_and_replayed_from_then_on():
    card = FakeCard()
    for number in range(EAGER_RUNS):
        assert card.step(decodes([40, 50 + number])) == [2.0, 12.0]
    assert (len(card.launched), card.recorded, card.replayed) == (EAGER_RUNS, 0, 0)
    assert card.step(decodes([40, 60])) == [2.0, 12.0]
    assert (card.recorded, card.replayed) == (1, 0)
    launched = len(card.launched)
    assert card.step(decodes([41, 61])) == [2.0, 12.0]
    assert card.step(decodes([500, 8])) == [2.0, 12.0]
    assert (len(card.launched), card.recorded, card.replayed) == (launched, 1, 2)
    assert card.graphs.recorded == {Bucket(2, 1024)}


def test_a_replay_reads_what_lies_there_now():
    card = FakeCard()
    for _ in range(EAGER_RUNS + 1):
        card.step(decodes([40]))
    laid_out = card.graphs.lay_out(decodes([41]))
    laid_out.step.token_ids[0] = 6
    assert card.graphs.run(laid_out)[:, 0].tolist() == [61.0]
    assert card.replayed == 1


def test_what_was_used_is_recorded_while_there_is_nothing_to_do():
    card = FakeCard()
    assert not card.graphs.prepare()
    card.step(decodes([40]))
    card.step(decodes([40] * 3))
    card.step(decodes([9], tokens=3))
    assert card.graphs.prepare()
    step = card.launched[-1]
    assert step.slot_mapping.tolist() == [[-1]]
    assert step.seq_lens.tolist() == [0]
    assert not card.graphs.prepare()
    assert card.graphs.recorded == {Bucket(1, 1024), Bucket(4, 1024)}
    assert card.step(decodes([40] * 3)) == [4.0, 14.0, 24.0]
    assert card.replayed == 1


def test_what_cannot_be_recorded_is_launched_for_ever(caplog):
    card = FakeCard(refuses=(2,))
    for _ in range(EAGER_RUNS + 3):
        assert card.step(decodes([40, 50])) == [2.0, 12.0]
    assert (card.recorded, card.replayed) == (0, 0)
    assert caplog.text.count("cannot be recorded") == 1
    assert not card.graphs.prepare()


@pytest.mark.parametrize("refuses", [(), (1,)])
def test_forgotten_graphs_are_recorded_anew(refuses):
    card = FakeCard(refuses=refuses)
    for _ in range(EAGER_RUNS + 1):
        card.step(decodes([40]))
    card.graphs.forget()
    assert card.graphs.recorded == frozenset()
    assert card.step(decodes([40])) == [1.0]
    assert card.replayed == 0


def test_without_a_recorder_steps_are_laid_out_for_themselves():
    card = FakeCard()
    graphs = StepGraphs(card.launch, card.buffers, LARGEST, LIMITS, None, BLOCK)
    assert graphs.run(graphs.lay_out(decodes([40, 50, 60]))).shape == (3, 1)
    assert card.launched[-1].num_tokens == 3
    assert card.launched[-1].block_tables.shape == (3, 1, 4)


class FakeCuda:
    """Streams and graphs that note what is asked of them, and may refuse to record."""

    def __init__(self, refuses):
        self.noted, self.refuses, self.on = [], refuses, "steps"

    def Stream(self, _device):
        return self.named("recording")

    def current_stream(self):
        return self.named(self.on)

    def named(self, name):
        cuda = self

        class Stream:
            def wait_stream(self, other):
                cuda.noted.append(f"{name} waits for {other.name}")

        Stream.name = name
        return Stream()

    @contextlib.contextmanager
    def stream(self, stream):
        self.on = stream.name
        try:
            yield
        finally:
            self.on = "steps"

    @staticmethod
    def graph_pool_handle():
        return (0, 1)

    def CUDAGraph(self):
        cuda = self

        class Graph:
            def capture_begin(self, pool, capture_error_mode):
                cuda.noted.append(f"begin {pool} {capture_error_mode}")

            def capture_end(self):
                cuda.noted.append("end")
                if cuda.refuses:
                    raise RuntimeError("operation failed due to a previous error during capture")

        return Graph()


@pytest.mark.parametrize("refuses", [False, True])
def test_a_recording_waits_for_steps_and_steps_wait_for_it(refuses, monkeypatch):
    """Also where CUDA refuses, since its first run is at work on the same memory."""
    cuda = FakeCuda(refuses)
    for name in ("Stream", "current_stream", "stream", "graph_pool_handle", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    logits = torch.zeros(1)

    def run():
        cuda.noted.append(f"run on {cuda.on}")
        return logits

    recorder = CudaRecorder(torch.device("cuda"))
    with pytest.raises(RuntimeError, match="capture") if refuses else contextlib.nullcontext():
        assert recorder.record(run)[1] is logits
    assert cuda.noted == [
        "recording waits for steps", "run on recording", "begin (0, 1) thread_local", "run on recording", "end",
        "steps waits for recording",
    ]  # fmt: skip
