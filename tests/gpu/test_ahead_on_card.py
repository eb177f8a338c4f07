"""Steps that are submitted to a CUDA executable say what executed ones say, on the card or in Triton's interpreter."""

import numpy as np
import pytest
import torch

from kvarn.backends import InputBatch, KvCacheSpec, StepLimits
from kvarn.backends.ahead import AheadExecutable
from kvarn.backends.cuda import CudaBackend, graphs
from kvarn.backends.cuda.ahead import StepsOnCard
from kvarn.backends.cuda.graphs import Bucket, StepGraphs
from kvarn.backends.cuda.sampling_layout import SamplingLayout
from kvarn.backends.cuda.step_layout import StepLayout
from kvarn.config import CudaConfig
from kvarn.request import SamplingParams
from kvarn.runner import BatchBuilder
from kvarn.sampling import RuleBook
from kvarn.sampling.reference import choose
from kvarn.step import NewSequence, ScheduledSequence
from kvarn.testing import tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = StepLimits(max_num_tokens=16, max_num_sequences=4, max_model_len=64)
KV = KvCacheSpec(num_blocks=8, block_size=16, dtype="float32")
SEQUENCES = [
    NewSequence(0, (72, 105), SamplingParams(temperature=0.0, logit_bias={7: 0.5}), 1, 0),
    NewSequence(1, (5, 6, 7), SamplingParams(temperature=1.0, top_p=0.8, allowed_token_ids=tuple(range(90))), 2, 0),
]


@pytest.fixture(scope="module")
def executable():
    model = tiny_model("llama", num_hidden_layers=1)
    loaded = CudaBackend(CudaConfig("float32", device=DEVICE)).load(model.program, model.weights, KV, LIMITS)
    yield loaded
    loaded.close()


def batch(tokens, starts):
    parts = [
        ScheduledSequence(number, tuple(ids), start, ((number,),), True)
        for number, (ids, start) in enumerate(zip(tokens, starts, strict=True))
    ]
    return BatchBuilder(LIMITS, KV.block_size).build(parts), [part.end for part in parts]


def rule_book(sequences=SEQUENCES):
    book = RuleBook(259)
    for sequence in sequences:
        book.add(sequence)
    return book


def executed(executable, steps):
    """The tokens of each step, one step at a time."""
    book, said, tokens, starts = rule_book(), [], [s.prompt_token_ids for s in SEQUENCES], [0, 0]
    for _ in range(steps):
        step, ends = batch(tokens, starts)
        said.append(choose(executable.execute(step)["logits"], book.of([0, 1], ends)).tolist())
        tokens, starts = [[token] for token in said[-1]], ends
    return said


def test_tokens_are_fed_on_the_card(executable):
    assert isinstance(executable, AheadExecutable)
    expected = executed(executable, 4)
    book, said = rule_book(), []
    step, ends = batch([s.prompt_token_ids for s in SEQUENCES], [0, 0])
    executable.submit(step, book.of([0, 1], ends), np.full(5, -1, np.int32))
    for _ in range(3):
        starts = ends
        step, ends = batch([[0], [0]], starts)
        executable.submit(step, book.of([0, 1], ends), np.array([0, 1], np.int32))
        said.append(executable.collect().tolist())
    said.append(executable.collect().tolist())
    assert said == expected


def test_rows_are_taken_from_where_they_were(executable):
    """A sequence that is alone in the second step was the second row of the first."""
    expected = executed(executable, 2)
    book = rule_book()
    step, ends = batch([s.prompt_token_ids for s in SEQUENCES], [0, 0])
    executable.submit(step, book.of([0, 1], ends), np.full(5, -1, np.int32))
    alone = InputBatch.of_tables(
        np.zeros(1, np.int32), np.array([3], np.int32), np.array([0, 1], np.int32), np.array([4], np.int32),
        np.array([[1]], np.int32), np.zeros(1, np.int32), block_size=16,
    )  # fmt: skip
    executable.submit(alone, book.of([1], [4]), np.array([1], np.int32))
    with pytest.raises(ValueError, match="collect one first"):
        executable.submit(alone, book.of([1], [4]), np.array([1], np.int32))
    assert executable.collect().tolist() == expected[0]
    assert executable.collect().tolist() == [expected[1][1]]


class Again:
    """Records what is launched, to launch it again."""

    def __init__(self):
        self.num_replayed = 0

    def record(self, run):
        result = run()

        class Recording:
            @staticmethod
            def replay():
                self.num_replayed += 1
                run()

        return Recording(), result


def test_steps_of_a_bucket_say_what_others_say(executable, monkeypatch):
    """Three sequences in a bucket for four: in a step that is launched, in one that is recorded, in one replayed."""
    monkeypatch.setattr(graphs, "EAGER_RUNS", 1)
    three = [*SEQUENCES, NewSequence(2, (9,), SamplingParams(temperature=0.0, frequency_penalty=1.0), 3, 0)]
    prompts = [sequence.prompt_token_ids for sequence in three]

    def answers(book, graphed):
        on_card = StepsOnCard(graphed, lambda batch: None, SamplingLayout(16, 4, 259), executable.device)
        said, tokens, starts = [], prompts, [0, 0, 0]
        for number in range(4):
            step, ends = batch(tokens, starts)
            previous = np.full(step.num_tokens, -1, np.int32) if not number else np.arange(3, dtype=np.int32)
            on_card.submit(step, book.of([0, 1, 2], ends, None if not number else [0, 1, 2]), previous)
            if number:
                said.append(on_card.collect().tolist())
                for sequence, token in enumerate(said[-1]):
                    book.said(sequence, token)
            tokens, starts = [[0], [0], [0]], ends
        return [*said, on_card.collect().tolist()]

    largest, recorder = StepLayout.largest(executable.program, KV, LIMITS), Again()
    plain, recorded = (
        StepGraphs(executable.launch, executable.step_buffers, largest, LIMITS, one, KV.block_size)
        for one in (None, recorder)
    )
    assert answers(rule_book(three), recorded) == answers(rule_book(three), plain)
    assert recorder.num_replayed == 1
    assert recorded.recorded == {Bucket(4, LIMITS.max_model_len)}


def test_what_is_discarded_is_gone(executable):
    book = rule_book()
    step, ends = batch([s.prompt_token_ids for s in SEQUENCES], [0, 0])
    for _ in range(2):
        executable.submit(step, book.of([0, 1], ends), np.full(5, -1, np.int32))
    executable.discard()
    executable.submit(step, book.of([0, 1], ends), np.full(5, -1, np.int32))
    assert executable.collect().tolist() == executed(executable, 1)[0]
    assert not executable.prepare()
