"""Evicted blocks come back from a file: the same bits, after a restart too, and never what is wrong in it."""

import pytest
from tiny_engine import request, run_core, tiny_engine, tokens_of

from kvarn.engine.tier import FILE_NAME
from kvarn.errors import ConfigError
from kvarn.runner import MoveSeconds

TEXTS = [letter * 90 for letter in "abcdefgh"]


@pytest.fixture
def engine(tmp_path):
    """Engines over one folder; each must be closed before the next is made."""
    made = []

    def make(backend="cpu", **settings):
        tier = {"kv_offload_bytes": 1 << 20, "kv_offload_dir": str(tmp_path), "identity": "tiny"}
        dtype = "float32" if backend == "reference" else "float16"
        settings = {"backend": backend, "dtype": dtype, "num_blocks": 16, "max_model_len": 160} | tier | settings
        made.append(tiny_engine(**settings).core)
        return made[-1]

    yield make
    for core in made:
        core.close()


@pytest.fixture(autouse=True)
def always_worth_it(monkeypatch):
    """A tiny model computes a block faster than any file gives it back."""
    monkeypatch.setattr("kvarn.engine.tier.measure_move", lambda executable, file: MoveSeconds(0.0, 0.0))


def answers(core, texts=TEXTS, **sampling):
    """Tokens, and cached tokens, of requests that come one after the other."""
    said, cached = [], []
    for text in texts:
        outputs = run_core(core, [request("r", text, **sampling)])["r"]
        said.append(tokens_of(outputs))
        cached.append(outputs[-1].num_cached_tokens)
    return said, cached


@pytest.mark.parametrize(("backend", "dtype"), [("cpu", "float16"), ("cpu", "int4"), ("reference", "float32")])
def test_what_was_evicted_is_loaded_and_says_the_same(engine, backend, dtype):
    core = engine(backend, dtype=dtype, family="gemma3_text", num_blocks=20)  # of one layer each
    first, _ = answers(core, logprobs=3)
    assert core.stats().evicted_tokens > 0
    computed = core.stats().prompt_tokens - core.stats().prefix_hits
    again, cached = answers(core, logprobs=3)
    assert again == first
    assert cached == [80 if text in TEXTS[:6] else count for text, count in zip(TEXTS, cached, strict=True)]
    assert core.stats().loaded_tokens >= 6 * 80
    assert core.stats().prompt_tokens - core.stats().prefix_hits < computed + 8 * 16


def test_the_next_engine_finds_what_the_last_one_had(engine):
    core = engine()
    first, _ = answers(core)
    core.close()
    core = engine()
    again, cached = answers(core)
    assert again == first
    assert all(count >= 80 for count in cached)


@pytest.mark.parametrize("change", [{"identity": "other"}, {"dtype": "int8"}, {"backend": "cpu"}], ids=str)
def test_another_model_or_type_of_cache_finds_nothing(engine, change):
    """The reference's blocks have the same size whatever they are rounded to."""
    core = engine("reference")
    answers(core)
    core.close()
    core = engine(**{"backend": "reference", **change})
    assert answers(core)[1][0] == 0


def test_blocks_that_changed_on_disk_are_computed_again(engine, tmp_path):
    core = engine()
    first, _ = answers(core)
    core.close()
    path = tmp_path / FILE_NAME
    data = bytearray(path.read_bytes())
    for position in range(len(data) // 8, len(data), 3000):
        data[position] ^= 1
    path.write_bytes(data)
    core = engine()
    again, cached = answers(core)
    assert again == first
    assert min(cached) < 80
    assert cached[0] % 16 == 0


@pytest.mark.parametrize("tier_bytes", [0, 1 << 20], ids=["recompute", "swap"])
def test_64_clients_over_a_tenth_of_their_cache_say_what_they_say_without_pressure(engine, tier_bytes):
    """Each takes 130 tokens with some prompts alike, all together 520 blocks."""
    texts = [TEXTS[i % 3][: 16 * (i % 5)] + f"{i:03}" + "lorem ipsum " * 8 for i in range(64)]
    requests = [
        request(str(i), text[:90], max_tokens=40, temperature=1.0, seed=i, n=1 + (i % 8 == 0))
        for i, text in enumerate(texts)
    ]
    settings = {"max_num_seqs": 16, "max_num_queued_requests": 64, "max_num_batched_tokens": 64}
    pressed = engine(num_blocks=52, kv_offload_bytes=tier_bytes, **settings)
    crowd = run_core(pressed, requests)
    assert pressed.stats().preemptions > 0
    assert pressed.stats().evicted_tokens > 0
    assert (pressed.stats().loaded_tokens > 0) == (tier_bytes > 0)
    assert pressed.stats().free_blocks == 52
    calm = engine(num_blocks=800, kv_offload_bytes=0, enable_prefix_caching=False, **settings)
    alone = run_core(calm, requests)
    assert calm.stats().preemptions == 0
    for one in requests:
        for index in range(one.sampling.n):
            said = tokens_of(crowd[one.request_id], index)
            assert len(said) == 40
            assert said == tokens_of(alone[one.request_id], index)


def test_where_computing_is_faster_nothing_is_moved(engine, monkeypatch):
    monkeypatch.setattr("kvarn.engine.tier.measure_move", lambda executable, file: MoveSeconds(1e9, 1e9))
    core = engine()
    first, _ = answers(core)
    before = core.stats()
    answers(core)
    assert core.stats().saved_tokens == before.saved_tokens
    assert core.stats().evicted_tokens > before.evicted_tokens
    core.close()  # saves what it has
    core = engine()
    run_core(core, [request("measured", "z" * 40)])
    assert answers(core)[0] == first
    assert core.stats().loaded_tokens == 0


def test_a_model_without_identity_and_a_tier_without_a_cache_are_refused(engine):
    with pytest.raises(ConfigError, match="not read from files"):
        engine(identity="")
    with pytest.raises(ConfigError, match="enable_prefix_caching must be true where there is kv_offload_bytes"):
        engine(enable_prefix_caching=False)


def test_what_is_forgotten_is_in_no_tier_and_no_later_start_has_it(engine):
    core = engine()
    first, _ = answers(core)
    held = core.stats().cached_blocks
    assert held > 0
    assert core.forget_cached() == held
    assert core.stats().cached_blocks == 0
    loaded = core.stats().loaded_tokens
    again, cached = answers(core)
    assert again == first
    assert cached == [0] * len(TEXTS)
    assert core.stats().loaded_tokens == loaded
    core.forget_cached()
    core.close()
    _, cached = answers(engine())
    assert cached == [0] * len(TEXTS)
