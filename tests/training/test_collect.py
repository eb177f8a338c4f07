"""What heads learn from: prompts of a file, and each answer with the hidden states it came from."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from learnable import learnable

from kvarn.backends import InputBatch, KvCacheSpec, StepLimits
from kvarn.backends.cpu import CpuBackend
from kvarn.config import CacheConfig, EngineConfig, SchedulerConfig
from kvarn.engine import build_engine
from kvarn.errors import ConfigError
from kvarn.testing import byte_tokenizer
from kvarn.training.batches import chosen, make_batch, windows_of
from kvarn.training.collect import HELD_OUT_EVERY, Recorder, collect, unit_rows
from kvarn.training.prompts import read_prompts
from kvarn.training.store import TextStore

WIDTH = 8


def test_prompts_are_lines_or_objects(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("one\n\n  two  \n{\n", encoding="utf-8")
    assert read_prompts(text).texts == ("one", "two", "{")
    lines = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "d"}]
    objects = [{"prompt": "a"}, {"question": "b", "answer": "x"}, {"turns": ["c", "x"]}, {"messages": messages}]
    lines.write_text("\n".join(map(json.dumps, [*objects, {"text": "e", "prompt": "f"}])) + "\n")
    found = read_prompts(lines)
    assert found.texts == ("a", "b", "c", messages, "f")
    tokenizer = byte_tokenizer()
    assert found.token_ids(tokenizer, 3) == tokenizer.encode_chat(messages)
    assert read_prompts(text).sha256 != found.sha256


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no prompts"),
        (b"\n \n", "has no prompts"),
        (b'{"prompt": "a"}\nno\n', "line 2 is not JSON"),
        (b"[1]\n", "line 1 must be an object with one of messages, prompt"),
        (b'{"prompt": 3}\n', "line 1 must be"),
        (b'{"prompt": "  "}\n', "line 1 must be"),
        (b'{"turns": []}\n', "line 1 must be"),
        (b'{"messages": ["a"]}\n', "line 1 must be"),
        (b"\xff\n", "not UTF-8 at byte 0"),
    ],
)
def test_prompts_that_are_none_are_named(tmp_path, content, words):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_prompts(path)


TEXTS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS, st.integers(1, 60), st.integers(0, 31))
def test_texts_are_there_again_or_not_at_all(tmp_path_factory, lengths, capacity, torn):
    folder, rng = tmp_path_factory.mktemp("store"), np.random.default_rng(1)
    store = TextStore(folder, WIDTH, capacity * (2 * WIDTH + 4), {"a": 1})
    kept = []
    for number, (prompt, answer) in enumerate(lengths):
        tokens = rng.integers(0, 99, prompt + answer).astype(np.int32)
        rows = rng.standard_normal((prompt + answer - 1, WIDTH)).astype(np.float16)
        if store.add(number, prompt, tokens, rows):
            kept.append((number, prompt, tokens, rows))
    assert store.num_tokens == sum(len(tokens) for _, _, tokens, _ in kept) <= capacity
    if torn and kept:  # the process died while it wrote the last span
        spans = folder / "spans"
        spans.write_bytes(spans.read_bytes()[:-torn])
        kept.pop()
    again = TextStore(folder, WIDTH, capacity * (2 * WIDTH + 4), {"a": 1})
    assert len(again.texts) == len(kept)
    for text, (number, prompt, tokens, rows) in zip(again.texts, kept, strict=True):
        assert (text.number, text.prompt_length, text.length) == (number, prompt, len(tokens))
        np.testing.assert_array_equal(again.tokens[text.start : text.start + text.length], tokens)
        np.testing.assert_array_equal(again.features[text.start : text.start + text.length - 1], rows)
    with pytest.raises(ConfigError, match="another model, data file or setting"):
        TextStore(folder, WIDTH, capacity * (2 * WIDTH + 4), {"a": 2})


def test_damaged_spans_are_refused(tmp_path):
    store = TextStore(tmp_path, WIDTH, 1000, {})
    store.add(0, 1, np.zeros(3, np.int32), np.zeros((2, WIDTH), np.float16))
    (tmp_path / "spans").write_bytes(np.array([0, 49, 1, 30], np.int64).tobytes())
    with pytest.raises(ConfigError, match="damaged"):
        TextStore(tmp_path, WIDTH, 1000, {})


def answered(tmp_path, numbers, *, num_blocks=64, num_bytes=1 << 20, chunk=64):
    """The store after the tiny model has answered prompts, and how often it was preempted."""
    model = learnable()
    store = TextStore(tmp_path, 64, num_bytes, {})
    recorders = []

    def recorder(program):
        recorders.append(Recorder(program, store))
        return recorders[0]

    config = EngineConfig(
        max_model_len=128, threads=1, cache=CacheConfig(num_blocks=num_blocks, enable_prefix_caching=False),
        scheduler=SchedulerConfig(8, chunk),
    )  # fmt: skip
    core = build_engine(model, byte_tokenizer(), config, new_drafter=recorder).core
    told = []
    collect(
        core, recorders[0], lambda n: tuple(b"lorem ipsum dolor " * (n % 4) + b"%d" % n), numbers, max_tokens=24,
        temperature=0.7, max_num_seqs=8, enough=lambda: False, progress=told.append,
    )  # fmt: skip
    preemptions = core.stats().preemptions
    core.close()
    return store, preemptions


def test_hidden_states_are_those_of_the_whole_text(tmp_path):
    """Collected in chunks, batches and after preemptions: the same bits as computed at once."""
    store, preemptions = answered(tmp_path, range(12), num_blocks=8, chunk=16)
    assert preemptions > 0
    assert sorted(text.number for text in store.texts) == list(range(12))
    model = learnable()
    executable = CpuBackend(threads=1).load(
        model.program, model, KvCacheSpec(8, 16, "float16"), StepLimits(128, 1, 128, outputs=("x",))
    )
    for text in store.texts:
        tokens = store.tokens[text.start : text.start + text.length]
        assert bytes(tokens[: text.prompt_length].astype(np.uint8)).endswith(b"%d" % text.number)
        assert text.length - text.prompt_length <= 24
        rows = unit_rows(executable.execute(InputBatch.of_one(tokens[:-1]))["x"])
        np.testing.assert_array_equal(store.features[text.start : text.start + text.length - 1], rows)
    executable.close()


def test_a_full_store_ends_it(tmp_path):
    store, _ = answered(tmp_path, range(40), num_bytes=120 * (2 * 64 + 4))
    assert 0 < store.num_tokens <= 120
    assert len(store.texts) < 40


def test_held_out_prompts_are_answered_with_the_likeliest_tokens(tmp_path):
    number = HELD_OUT_EVERY
    store, _ = answered(tmp_path, [number])
    model = learnable()
    executable = CpuBackend(threads=1).load(
        model.program, model, KvCacheSpec(8, 16, "float16"), StepLimits(128, 1, 128, 127)
    )
    (text,) = store.texts
    tokens = store.tokens[: text.length]
    answer = text.length - text.prompt_length
    logits = executable.execute(InputBatch.of_one(tokens[:-1], num_outputs=answer))["logits"]
    np.testing.assert_array_equal(logits.argmax(1), tokens[text.prompt_length :])
    executable.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS, st.integers(1, 7), st.integers(1, 4), st.integers(0, 5))
def test_each_guess_of_each_answer_is_in_one_window(tmp_path_factory, lengths, length, ahead, context):
    """And says which token came there."""
    rng = np.random.default_rng(2)
    store = TextStore(tmp_path_factory.mktemp("store"), WIDTH, 1 << 14, {})
    for number, (prompt, answer) in enumerate(lengths):
        tokens = rng.integers(0, 1 << 20, prompt + answer).astype(np.int32)
        rows = np.repeat(tokens[:-1, None] % 1000, WIDTH, 1).astype(np.float16)  # each row is of its token
        store.add(number, prompt, tokens, rows)
    windows = windows_of(store.texts, length, context)
    asked = []
    for window in windows:
        batch = make_batch(store, [window], length, ahead)
        for i, k in zip(*np.nonzero(batch.valid[0]), strict=True):
            place = window.text.start + window.first + i
            assert batch.tokens[0, i] == store.tokens[place]
            assert batch.features[0, i, 0] == np.float16(store.tokens[place] % 1000)
            assert batch.features[0, i + 1 + k, 0] == np.float16(store.tokens[place + 1 + k] % 1000)
            assert batch.tokens[0, i + 2 + k] == store.tokens[place + 2 + k]
            asked.append((place, int(k)))
    expected = [
        (text.start + i, k)
        for text in store.texts
        for i in range(text.prompt_length - 1, text.length)
        for k in range(ahead)
        if i + 2 + k < text.length
    ]
    assert sorted(asked) == expected
    if windows:
        each = max(1, len(windows) // 3)
        epoch = [window for step in range(each) for window in chosen(windows, 3, 1, step)]
        assert len(epoch) == len({id(w) for w in epoch}) >= min(len(windows), 3 * each)
        assert chosen(windows, 3, 1, 5) == chosen(windows, 3, 1, 5)
