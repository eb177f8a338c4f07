"""The prefix cache in a running engine: what is computed, what is told, and that no bit changes."""

from dataclasses import replace

import pytest
from tiny_engine import RecordingSampler, Wrapper, handmade_engine, request, run_core, tiny_engine, tokens_of

from kvarn.errors import CapacityError, ConfigError, RequestError
from kvarn.request import Request
from kvarn.tensors import DType

SYSTEM = "You are the miller of a mill by the river, and you answer in few words. "
TURNS = [SYSTEM + "What turns the wheel?", SYSTEM + "What do you grind, and for whom?"]
MODELS = [
    ("llama", DType.F32, "reference", "float32"),
    ("llama", DType.Q4_0, "cpu", "float16"),
    ("gemma3_text", DType.Q4_1, "cpu", "int8"),
    ("qwen3", DType.Q8_0, "cpu", "int4"),
]


class Computed(Wrapper):
    """An executable that notes the tokens of every step as (token, position)."""

    def __init__(self, inner) -> None:
        super().__init__(inner)
        self.steps = []

    def execute(self, batch, outputs=()):
        self.steps.append(list(zip(batch.token_ids.tolist(), batch.positions.tolist(), strict=True)))
        return self.inner.execute(batch, outputs)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.steps))


class Bench:
    """A core, what it computed, and the logits of all it sampled."""

    def __init__(self, **settings):
        self.core = handmade_engine(wrap_executable=self._count, wrap_sampler=self._record, **settings).core

    def _count(self, executable):
        self.computed = Computed(executable)
        return self.computed

    def _record(self, sampler):
        self.recorder = RecordingSampler(sampler)
        return self.recorder

    def run(self, *requests):
        """(outputs, tokens computed) of requests that come together."""
        before = self.computed.num_tokens
        outputs = run_core(self.core, list(requests))
        return outputs, self.computed.num_tokens - before


@pytest.fixture
def bench():
    made = []

    def make(**settings):
        made.append(Bench(**settings))
        return made[-1]

    yield make
    for one in made:
        one.core.close()


def cached(outputs):
    return outputs[-1].num_cached_tokens


@pytest.mark.parametrize("model", MODELS, ids=lambda m: f"{m[0]}-{m[2]}-{m[3]}")
def test_hits_change_no_bit(bench, model):
    family, stored, backend, dtype = model
    settings = {"family": family, "stored": stored, "backend": backend, "dtype": dtype}
    with_cache, without = bench(**settings), bench(**settings, prefix_caching=False)
    said = ""
    for turn in range(3):
        # A conversation, beside which others branch off inside a block and at its border.
        texts = [TURNS[0] + said, TURNS[1], TURNS[0][: 64 + turn] + "!", TURNS[0][:32] + "?"]
        requests = [request(f"{turn}-{i}", text, max_tokens=12) for i, text in enumerate(texts)]
        hit, computed = with_cache.run(*requests)
        missed, all_computed = without.run(*requests)
        assert computed < all_computed
        assert {name: tokens_of(o) for name, o in hit.items()} == {name: tokens_of(o) for name, o in missed.items()}
        said += "".join(chr(token % 128) for token in tokens_of(hit[f"{turn}-0"])) + " And then?"
    if backend == "cpu":  # the reference's rows depend on one another in the last bits
        assert with_cache.recorder.logits == without.recorder.logits
    assert with_cache.core.stats().prefix_hits > 0


def test_the_next_turn_computes_its_new_tokens_only(bench):
    one = bench()
    first = request("1", TURNS[0], max_tokens=20)
    outputs, computed = one.run(first)
    assert cached(outputs["1"]) == 0
    answer = tuple(tokens_of(outputs["1"]))
    assert computed == len(TURNS[0]) + 19
    new = tuple(b" And what else?")
    outputs, computed = one.run(Request("2", first.prompt_token_ids + answer + new, first.sampling))
    assert computed == 1 + len(new) + 19, "the answer's last token was sampled, but not computed"
    assert cached(outputs["2"]) == len(TURNS[0]) + 19


def test_requests_that_come_together_compute_what_they_share_once(bench):
    one = bench(max_num_batched_tokens=64)
    texts = [SYSTEM + f"{i}: how much is a sack?" for i in range(6)]
    outputs, computed = one.run(*(request(str(i), text, max_tokens=1) for i, text in enumerate(texts)))
    shared, whole = len(SYSTEM), len(SYSTEM) // 16 * 16
    own = sum(len(text) - shared for text in texts)
    assert shared + own <= computed <= whole + own + 6 * (shared - whole), "at most the last, partly shared block anew"
    assert sum(cached(o) for o in outputs.values()) == sum(map(len, texts)) - computed
    stats = one.core.stats()
    assert stats.prefix_queries == stats.prompt_tokens == sum(map(len, texts))
    assert stats.prefix_hits == sum(map(len, texts)) - computed


def test_n_answers_count_the_prompt_once(bench):
    one = bench()
    one.run(request("warm", TURNS[0], max_tokens=1))
    outputs, computed = one.run(request("n", TURNS[0], max_tokens=1, n=4))
    assert cached(outputs["n"]) == len(TURNS[0]) - 1
    assert computed == 4
    assert one.core.stats().prefix_queries == 2 * len(TURNS[0])


def test_what_is_found_again_after_a_preemption_is_no_hit_of_the_request(bench):
    one = bench(num_blocks=10, max_model_len=160)
    pair = [request("a", "x" * 60, max_tokens=50), request("b", "y" * 60, max_tokens=50)]
    outputs, _ = one.run(*pair)
    stats = one.core.stats()
    assert stats.preemptions > 0
    assert [cached(outputs[name]) for name in "ab"] == [0, 0]
    assert stats.prefix_hits > 0
    assert stats.evicted_tokens > 0
    assert stats.prefix_queries > 120


def test_a_preempted_request_computes_again_only_what_was_evicted(bench):
    pair = [request("a", "x" * 60, max_tokens=50), request("b", "y" * 60, max_tokens=50)]
    _, computed = bench(num_blocks=12, max_model_len=160).run(*pair)
    _, all_again = bench(num_blocks=12, max_model_len=160, prefix_caching=False).run(*pair)
    assert computed < all_again


def test_nobody_sees_what_another_salt_has_computed(bench):
    """The side channel: which tokens are computed in which step is the same, whatever the other salt has sent."""
    mine = [replace(request(str(i), text, max_tokens=5), cache_salt="mine") for i, text in enumerate(TURNS)]
    others = [replace(r, request_id=f"other {r.request_id}", cache_salt="other") for r in mine]
    tenants = [replace(r, request_id=f"tenant {r.request_id}", tenant="another") for r in mine]
    alone, after = bench(), bench()
    after.run(*others, *tenants)
    seen = len(after.computed.steps)
    outputs, _ = alone.run(*mine)
    same_outputs, _ = after.run(*mine)
    assert after.computed.steps[seen:] == alone.computed.steps
    assert untimed(same_outputs) == untimed(outputs)


def untimed(outputs):
    return {name: [replace(output, times=None) for output in several] for name, several in outputs.items()}


def test_nobody_waits_for_what_another_salt_computes(bench):
    """In one step both compute the same; of one salt the second would wait for the first."""
    pair = [replace(request(salt, SYSTEM[:40], max_tokens=1), cache_salt=salt) for salt in "ab"]
    one, same = bench(max_num_batched_tokens=128), bench(max_num_batched_tokens=128)
    one.run(*pair)
    same.run(*(replace(r, cache_salt="a") for r in pair))
    assert [len(step) for step in one.computed.steps] == [80]
    assert [len(step) for step in same.computed.steps] == [40, 1]


def test_counters_do_not_go_down_and_nothing_is_found_after_a_failed_step(bench):
    one = bench()
    one.run(request("1", TURNS[0], max_tokens=2))
    one.run(request("2", TURNS[0], max_tokens=2))
    hits = one.core.stats().prefix_hits
    one.core.reset()
    assert one.core.stats().prefix_hits == hits > 0
    outputs, _ = one.run(request("3", TURNS[0], max_tokens=2))
    assert cached(outputs["3"]) == 0


def test_cached_blocks_count_as_free():
    core = tiny_engine().core
    run_core(core, [request("1", TURNS[0], max_tokens=2)])
    stats = core.stats()
    assert stats.free_blocks == stats.num_blocks
    assert stats.cached_blocks == -(-(len(TURNS[0]) + 1) // 16)
    core.close()


def test_a_salt_has_a_limit():
    with pytest.raises(RequestError, match="at most 256 characters, not '257 characters'") as caught:
        Request("a", (1,), cache_salt="x" * 257)
    assert caught.value.field == "cache_salt"


class TestSharedSystemPrompts:
    def test_all_salts_share_them(self):
        engine = tiny_engine(shared_system_prompts=(SYSTEM,), max_model_len=256)
        chats = [
            engine.tokenizer.encode_chat([{"role": "system", "content": SYSTEM}, {"role": "user", "content": said}])
            for said in ("What turns the wheel?", "Who are you?")
        ]
        for salt, ids, found in (("a", chats[0], False), ("b", chats[1], True)):
            outputs = run_core(engine.core, [replace(request(salt, tuple(ids)), cache_salt=salt)])
            assert (cached(outputs[salt]) >= len(SYSTEM) // 16 * 16) == found
        engine.core.close()

    def test_they_must_leave_room(self):
        with pytest.raises(CapacityError, match="the shared prefixes take 5 blocks of KV cache, but there are 4"):
            tiny_engine(shared_prefixes=(tuple(range(80)),), num_blocks=4)

    def test_they_need_the_cache(self):
        with pytest.raises(ConfigError, match="enable_prefix_caching must be true where there are shared prefixes"):
            tiny_engine(shared_system_prompts=(SYSTEM,), enable_prefix_caching=False)


def test_forgetting_the_cache_leaves_what_runs_as_it_is():
    core = tiny_engine(num_blocks=64).core
    said = run_core(core, [request("a", "x" * 80, max_tokens=30)])["a"]
    core.add(request("a", "x" * 80, max_tokens=30))
    events = []
    for step in range(60):
        if step in (1, 3, 10):
            core.forget_cached()
        events += core.step() if core.has_work() else []
    assert tokens_of(events) == tokens_of(said)
    assert core.stats().free_blocks == core.stats().num_blocks
    assert core.forget_cached() > 0
    assert core.stats().cached_blocks == 0
    core.close()
