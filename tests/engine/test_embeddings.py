"""Embeddings: what the reference says of hidden states, the same bits however computed, and what is refused."""

import functools

import numpy as np
import pytest
from tiny_engine import handmade_engine, request, run_core, shared_model, tiny_engine, tokens_of

from kvarn.backends import InputBatch, KvCacheSpec, StepLimits
from kvarn.config import SpeculativeConfig
from kvarn.engine import make_backend
from kvarn.errors import RequestError
from kvarn.program import Logits
from kvarn.request import Pooling, Request, SamplingParams
from kvarn.tensors import DType

TEXT = "The mill stands by the river, and the river turns the wheel, day and night."
FAMILIES = ["llama", "mistral", "qwen3", "gemma3_text", "gpt2"]
BOTH = pytest.mark.parametrize("pooling", list(Pooling))


def asked(name, text=TEXT, pooling=Pooling.MEAN):
    return Request(name, tuple(text.encode()), SamplingParams(max_tokens=1), pooling=pooling)


def run(requests, **settings):
    """Embeddings by name, and the statistics."""
    usual = {"backend": "cpu", "dtype": "float16", "model": shared_model("llama", 0, DType.Q4_0)}
    engine = tiny_engine(**{**usual, **settings})
    outputs = run_core(engine.core, requests)
    stats = engine.core.stats()
    engine.core.close()
    return {name: parts[-1].embedding for name, parts in outputs.items()}, stats


@functools.cache
def alone(pooling):
    return run([asked("a", pooling=pooling)], max_num_batched_tokens=128)[0]["a"]


def oracle(model, text, pooling):
    """The hidden states that the logits of each token are made of, from one step of the reference back-end."""
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    program, groups = model.program, len(model.program.kv_groups)
    limits = StepLimits(len(ids), 1, 512, len(ids) - 1)
    executable = make_backend("reference").load(program, model.weights, KvCacheSpec(64, 16, "float32"), limits)
    hidden = next(op.x for op in program.ops if isinstance(op, Logits))
    batch = InputBatch.of_one(ids, num_outputs=len(ids), num_groups=groups)
    rows = executable.execute(batch, (hidden,))[hidden].astype(np.float64)
    return rows.mean(axis=0) if pooling is Pooling.MEAN else rows[-1]


@BOTH
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_reference_says(family, pooling):
    model = shared_model(family, 0)
    found, _ = run([asked("a", pooling=pooling)], model=model, backend="cpu", dtype="float32")
    expected = oracle(model, TEXT, pooling)
    assert len(found["a"]) == model.config.hidden_size
    np.testing.assert_allclose(found["a"], expected, rtol=2e-4, atol=2e-4)


@BOTH
def test_the_same_bits_in_a_crowd(pooling):
    crowd = [request(f"talk {i}", "lorem " * (i + 1), max_tokens=20) for i in range(4)]
    crowd += [asked(f"other {i}", "ipsum " * (3 * i + 1), list(Pooling)[i % 2]) for i in range(3)]
    crowd.insert(3, asked("a", pooling=pooling))
    assert run(crowd)[0]["a"] == alone(pooling)


@BOTH
@pytest.mark.parametrize("budget", [8, 13, 32])
def test_the_same_bits_in_chunks(budget, pooling):
    found, stats = run([asked("a", pooling=pooling)], max_num_batched_tokens=budget)
    assert stats.steps > len(TEXT) / budget
    assert found["a"] == alone(pooling)


@BOTH
def test_the_same_bits_after_a_preemption(pooling):
    # The first one's answer grows until it needs the blocks of the second one's prompt, which is half computed.
    pair = [request("first", "x" * 40, max_tokens=60), asked("a", pooling=pooling)]
    found, stats = run(pair, num_blocks=9, max_num_seqs=2, max_num_batched_tokens=3, max_model_len=110)
    assert stats.preemptions > 0
    assert found["a"] == alone(pooling)


@BOTH
def test_the_same_bits_where_the_cache_has_the_prompt(pooling):
    warm = [request("talk", TEXT, max_tokens=4)]
    engine = tiny_engine(backend="cpu", dtype="float16", model=shared_model("llama", 0, DType.Q4_0))
    run_core(engine.core, warm)
    (output,) = run_core(engine.core, [asked("a", pooling=pooling)])["a"]
    engine.core.close()
    assert output.embedding == alone(pooling)
    assert (output.num_cached_tokens > 0) == (pooling is Pooling.LAST), "a mean needs every token"


def test_an_embedding_leaves_the_answers_of_others_alone():
    talk = [request(f"talk {i}", "lorem " * (i + 1), max_tokens=20) for i in range(4)]
    engine = tiny_engine(backend="cpu", dtype="float16")
    quiet = run_core(engine.core, talk)
    mixed = run_core(engine.core, [*talk[:2], asked("a"), *talk[2:]])
    engine.core.close()
    assert {name: tokens_of(mixed[name]) for name in quiet} == {name: tokens_of(quiet[name]) for name in quiet}


def test_streams_get_a_token_of_each_step_while_a_long_text_is_embedded():
    core = tiny_engine(backend="cpu", dtype="float16", max_num_seqs=4, max_num_batched_tokens=16).core
    core.add(request("talk", "hi", max_tokens=100))
    core.step()
    core.add(asked("a", "x" * 200))
    embedded, steps = False, 0
    while not embedded:
        events = {event.request_id: event for event in core.step()}
        assert len(events["talk"].outputs[0].token_ids) == 1
        embedded, steps = "a" in events, steps + 1
    assert steps >= 200 / 16
    core.close()


def test_beside_speculation():
    speculative = SpeculativeConfig(method="ngram", k=4)
    crowd = [request("talk", "abcabcabcabcabc", max_tokens=30), asked("a")]
    assert run(crowd, speculative=speculative)[0]["a"] == alone(Pooling.MEAN)


def test_no_answer_has_an_embedding():
    assert run([request("talk", TEXT)])[0] == {"talk": None}


def test_an_engine_without_pooling_says_so():
    core = handmade_engine().core
    with pytest.raises(RequestError, match="no embeddings") as caught:
        core.check(asked("a"))
    core.close()
    assert caught.value.field == "pooling"


@pytest.mark.parametrize("sampling", [{}, {"max_tokens": 2}, {"max_tokens": 1, "n": 2}])
def test_an_embedding_is_asked_for_with_one_token(sampling):
    with pytest.raises(RequestError, match="max_tokens and n"):
        Request("a", (1,), SamplingParams(**sampling), pooling=Pooling.MEAN)
