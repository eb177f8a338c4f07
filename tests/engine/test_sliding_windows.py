"""Layers with windows in a running engine: far fewer blocks, the same bits as with all of them kept."""

from itertools import pairwise

import pytest
from test_speculation import Knowing
from tiny_engine import RecordingSampler, handmade_engine, request, run_core, tiny_engine, tokens_of

from kvarn.config import SpeculativeConfig
from kvarn.errors import CapacityError
from kvarn.program import KvGroups
from kvarn.tensors import DType
from kvarn.testing import tiny_model

WINDOW = 24
STORY = "The mill stood where the river bends, and the miller ground the grain of all who came. " * 4
CASES = [
    ("reference", "float32", DType.F32),
    ("cpu", "float16", DType.Q4_1),
    ("cpu", "int8", DType.F32),
    ("cpu", "int4", DType.F32),
]


def gemma(dtype=DType.F32, *, keep_all=False):
    """6 layers, of which the third and the last see all: three groups of two. keep_all: one, as without windows."""
    model = tiny_model("gemma3_text", num_hidden_layers=6, sliding_window_pattern=3, dtype=dtype)
    if keep_all:
        layers = model.program.kv_layers
        one = KvGroups((None,), tuple((0, slot) for slot in range(len(layers))), layers)
        model.program.__dict__["kv_groups"] = one
    return model


def mistral(dtype=DType.F32, *, keep_all=False):
    """Two layers with a window."""
    model = tiny_model("mistral", dtype=dtype)
    if keep_all:
        model.program.__dict__["kv_groups"] = KvGroups((None,), ((0, 0), (0, 1)), model.program.kv_layers)
    return model


@pytest.fixture
def engine():
    made = []

    def make(**settings):
        def record(sampler):
            made[-1].recorder = RecordingSampler(sampler)
            return made[-1].recorder

        made.append(Made())
        made[-1].core = handmade_engine(wrap_sampler=record, **settings).core
        return made[-1]

    yield make
    for one in made:
        one.core.close()


class Made:
    """A core, and the logits of all it sampled."""

    def run(self, *requests):
        outputs = run_core(self.core, list(requests))
        return {
            (name, index): tokens_of(parts, index)
            for name, parts in outputs.items()
            for index in {o.index for part in parts for o in part.outputs}
        }


def held(core):
    stats = core.stats()
    return stats.num_blocks - stats.free_blocks


@pytest.mark.parametrize("make_model", [gemma, mistral])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
@pytest.mark.parametrize("chunk", [17, 64])
def test_the_same_bits_as_with_all_kept(engine, case, chunk, make_model):
    backend, dtype, stored = case
    settings = {"backend": backend, "dtype": dtype, "max_num_batched_tokens": chunk}
    requests = [
        request("long", STORY[:300], max_tokens=40),
        request("short", "A mill", max_tokens=60),
        request("three", STORY[:70], max_tokens=30, n=3, temperature=1.0, seed=5),
    ]
    windowed = engine(model=make_model(stored), num_blocks=120, **settings)
    whole = engine(model=make_model(stored, keep_all=True), num_blocks=80, **settings)
    for turn in range(2):  # the second hits what the first left
        assert windowed.run(*requests) == whole.run(*requests), turn
    assert windowed.recorder.logits == whole.recorder.logits
    assert windowed.core.stats().prefix_hits == whole.core.stats().prefix_hits > 300


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: f"{case[0]}-{case[1]}")
def test_pressure_changes_no_bit(engine, case):
    """Preempted, evicted and found again, beside sequences that share beginnings and branch off within windows."""
    backend, dtype, stored = case
    settings = {"backend": backend, "dtype": dtype, "max_num_batched_tokens": 48, "max_model_len": 256}
    requests = [
        request(str(i), STORY[: 40 + 11 * (i % 4)] + f"{i % 3}" * 20, max_tokens=50, n=1 + (i % 5 == 0),
                temperature=1.0, seed=i)
        for i in range(12)
    ]  # fmt: skip
    calm = engine(model=gemma(stored, keep_all=True), num_blocks=300, **settings)
    pressed = engine(model=gemma(stored), num_blocks=34, **settings)
    assert pressed.run(*requests) == calm.run(*requests)
    stats = pressed.core.stats()
    assert stats.preemptions > 0 and stats.evicted_tokens > 0 and stats.prefix_hits > 0
    assert stats.free_blocks == 34
    if backend == "cpu":  # the reference's products round as their number of rows has it
        assert pressed.recorder.logits == calm.recorder.logits


REPEATING = "the mill by the river, the mill by the river, and the mill by "


@pytest.mark.parametrize("make_model", [gemma, mistral])
@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: f"{case[0]}-{case[1]}")
@pytest.mark.parametrize("pressure", [False, True])
@pytest.mark.parametrize("count", [1, 9])
def test_guesses_change_no_token(engine, case, pressure, count, make_model):
    """Some are right and some wrong, against what is said with all kept and nothing guessed.

    What was guessed takes blocks of every group and gives them back, also where others wait for them.
    """
    backend, dtype, stored = case
    settings = {"backend": backend, "dtype": dtype, "max_num_batched_tokens": 48, "max_model_len": 256,
                "max_num_seqs": 8}  # fmt: skip
    requests = [
        request(str(i), REPEATING[: 30 + 7 * (i % 4)] + "xyz"[i % 3] * 20 + REPEATING, max_tokens=60,
                n=1 + (i == 4), temperature=0.8 * (i % 2), seed=i)
        for i in range(count)
    ]  # fmt: skip
    plain = engine(model=make_model(stored, keep_all=True), num_blocks=300, **settings)
    expected = plain.run(*requests)
    prompts = {r.request_id: r.prompt_token_ids for r in requests}
    known = {(prompts[name], stream): said for (name, stream), said in expected.items()}
    groups = len(make_model().program.kv_groups)
    few = (8 if count == 1 else 12) * groups
    guessing = engine(
        model=make_model(stored), num_blocks=few if pressure else 300, speculative=SpeculativeConfig(k=6),
        wrap_drafter=lambda _: Knowing(known), **settings,
    )  # fmt: skip
    for turn in range(2):  # the second hits what the first left
        assert guessing.run(*requests) == expected, turn
    stats = guessing.core.stats()
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    assert stats.prefix_hits > 0
    assert stats.free_blocks == stats.num_blocks
    if count > 1:
        assert (stats.preemptions > 0) == pressure


def test_a_long_text_holds_exactly_so_many_blocks(engine):
    """Without a prefix cache: 330 tokens are 21 blocks of the layers that see all; the others hold 24 tokens and the
    last computed one, which may begin in the middle of a block, and while a prompt is computed its chunk of 32."""
    one = engine(model=gemma(), num_blocks=60, max_num_batched_tokens=32, prefix_caching=False, backend="reference",
                 dtype="float32")  # fmt: skip
    one.core.add(request("a", STORY[:320], max_tokens=11))
    seen = []
    while one.core.has_work():
        one.core.step()
        seen.append(held(one.core))
    # After a step of the prompt: two blocks more that see all, and twice two that hold the last 25 tokens.
    assert seen[:10] == [2 * n + 2 * 2 for n in range(1, 11)]
    # Then one token a step; the 8th moves the window out of a block.
    assert seen[10:] == [21 + 2 * 3] * 7 + [21 + 2 * 2] * 2 + [0, 0]


def test_a_cache_too_small_for_all_is_enough_for_what_is_seen():
    """max_model_len 400: 25 blocks that see all, and twice 4 at most with chunks of 16, instead of 75."""
    settings = {"family": "gemma3_text", "max_model_len": 400, "max_num_batched_tokens": 16, "max_num_seqs": 2}
    core = tiny_engine(**settings, num_blocks=25 + 4).core
    outputs = run_core(core, [request("a", STORY[:340], max_tokens=60)])
    assert len(tokens_of(outputs["a"])) == 60
    core.close()
    with pytest.raises(CapacityError, match="max_model_len 400 needs 29 blocks"):
        tiny_engine(**settings, num_blocks=28)


def test_the_plan_counts_what_windows_leave():
    plans = []
    tiny_engine(
        family="gemma3_text", max_model_len=512, max_num_seqs=3, num_blocks=None, max_num_batched_tokens=32,
        on_plan=plans.append,
    ).core.close()  # fmt: skip
    (plan,) = plans
    assert plan.windows == (None, WINDOW)
    alone, each = 32 + (WINDOW + 32 - 2) // 16 + 2, 32 + (WINDOW + 1 - 2) // 16 + 2
    assert plan.num_blocks == alone + 2 * each
    assert plan.full_sequences == 3
    assert plan.cache_tokens == 3 * 512


def test_what_the_plan_says_fits_runs_without_preemption():
    engine = tiny_engine(family="gemma3_text", max_model_len=256, max_num_seqs=3, num_blocks=None,
                         enable_prefix_caching=False)  # fmt: skip
    core = engine.core
    outputs = run_core(core, [request(str(i), STORY[i : i + 200], max_tokens=56) for i in range(3)])
    assert all(len(tokens_of(o)) == 56 for o in outputs.values())
    assert core.stats().preemptions == 0
    core.close()


def test_the_next_turn_of_a_chat_hits_all_of_the_last(engine):
    one = engine(model=gemma(), num_blocks=200, backend="reference", dtype="float32")
    text, cached = STORY[:200], []
    for turn in range(3):
        outputs = run_core(one.core, [request(str(turn), text, max_tokens=20)])[str(turn)]
        cached.append(outputs[-1].num_cached_tokens)
        text = tuple(text.encode()) if isinstance(text, str) else text
        text = (*text, *tokens_of(outputs), *b" And then?")
    assert cached == [0, 219, 249]


def test_steps_of_one_group_are_what_they_were(engine):
    """A model with layers of one kind: one table a sequence, of all its blocks."""
    steps = []
    one = engine(family="llama", backend="reference", dtype="float32")
    execute = one.core._runner.execute
    one.core._runner.execute = lambda step: (steps.append(step), execute(step))[1]
    one.run(request("a", STORY[:100], max_tokens=20))
    tables = [s.block_tables for step in steps for s in step.sequences]
    assert all(len(table) == 1 and min(table[0]) >= 0 for table in tables)
    assert all(a[0] is b[0] or len(b[0]) > len(a[0]) for a, b in pairwise(tables))
