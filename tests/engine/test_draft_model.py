"""A smaller model guesses: answers stay the same, its memory is planned, and a model that does not fit is refused."""

import json
import re
from dataclasses import replace

import pytest
from tiny_engine import nearly, request, run_core, shared_model, tiny_engine, tokens_of
from typer.testing import CliRunner

from kvarn.cli.app import app
from kvarn.config import CacheConfig, EngineConfig, SpeculativeConfig
from kvarn.engine import make_backend
from kvarn.engine.draft import DraftModel
from kvarn.engine.load import load_engine
from kvarn.errors import CapacityError, ConfigError, KvarnError
from kvarn.planning import Available
from kvarn.runner import MoveSeconds
from kvarn.spec.draft_model import DraftModelDrafter
from kvarn.spec.ngram import NgramDrafter
from kvarn.spec.same_vocabulary import check_same_vocabulary
from kvarn.testing import byte_tokenizer, tiny_model
from kvarn.testing.gguf import write_tiny_gguf
from kvarn.text import spellings

DRAFT = SpeculativeConfig("draft", k=3, model="tinier")
TEXTS = [f"{'lorem ipsum dolor sit amet ' * (i % 4)}{i} and {i}" for i in range(16)]
PLAIN = {"backend": "cpu", "dtype": "float16", "max_model_len": 192, "num_blocks": 128, "max_num_seqs": 16}


def answers(texts, *, one_by_one=False, sampling=None, **settings):
    core = tiny_engine(**{**PLAIN, **settings}).core
    asked = [request(str(i), text, **{"max_tokens": 30, **(sampling or {})}) for i, text in enumerate(texts)]
    outputs = {}
    for requests in [[r] for r in asked] if one_by_one else [asked]:
        outputs |= run_core(core, requests)
    stats = core.stats()
    core.close()
    return {name: tokens_of(o) for name, o in outputs.items()}, stats


SAMPLING = pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.8, "top_p": 0.9, "seed": 4}], ids=str
)


@SAMPLING
@pytest.mark.parametrize("batch", [1, 16])
def test_answers_are_the_same_in_fewer_steps(batch, sampling):
    texts = TEXTS[:batch]
    expected, plain = answers(texts, sampling=sampling)
    tokens, stats = answers(texts, sampling=sampling, speculative=DRAFT, draft=nearly("llama", 0, 0.02))
    assert tokens == expected
    assert stats.steps < plain.steps
    assert 0.2 < stats.accepted_tokens / stats.draft_tokens < 1
    assert stats.draft_seconds > 0


@SAMPLING
def test_a_model_that_guesses_for_itself_is_always_right(sampling):
    """With hits in the prefix cache, chunks and preemptions: its keys and values are where the tokens are."""
    _, stats = answers(
        [*TEXTS, *TEXTS[:4]], sampling=sampling, speculative=DRAFT, draft=shared_model("llama", 0), num_blocks=10,
        max_model_len=128, max_num_batched_tokens=40,
    )  # fmt: skip
    assert stats.preemptions > 0
    assert stats.prefix_hits > 0
    assert stats.accepted_tokens == stats.draft_tokens > 300


def drafts_of(sampling, **settings):
    """Lengths of the drafts that were verified, and the answer."""
    core = tiny_engine(**PLAIN, draft=nearly("llama", 0, 0.02), speculative=replace(DRAFT, **settings)).core
    lengths, execute = [], core._runner.execute

    def watched(scheduled):
        lengths.extend(len(part.draft) for part in scheduled.sequences if part.draft)
        return execute(scheduled)

    core._runner.execute = watched
    outputs = run_core(core, [request("a", TEXTS[3], max_tokens=40, **sampling)])
    core.close()
    return lengths, tokens_of(outputs["a"])


def test_a_draft_model_stops_where_it_is_less_sure_than_it_is_to_be():
    """Whose answer is greedy: guesses that are drawn are as good where many tokens are likely."""
    k_each, expected = drafts_of({}, k=4)
    stopped, said = drafts_of({}, k=4, p_min=0.05)
    ones, the_same = drafts_of({}, k=4, p_min=1.0)
    assert expected == said == the_same
    assert set(k_each[:-2]) == {4}
    assert 1 in stopped, "it differs from place to place"
    assert max(stopped) > 2
    assert set(ones) == {1}, "the first guess is made in any case"
    drawn, _ = drafts_of({"temperature": 1.0}, k=4, p_min=1.0)
    assert set(drawn[:-2]) == {4}


def test_what_the_prefix_cache_has_the_draft_model_need_not_read_again(monkeypatch):
    """It computes what the target computes, and its guesses, but not a beginning that both have already."""
    core = tiny_engine(**PLAIN, speculative=DRAFT, draft=shared_model("llama", 0)).core
    drafter = core._runner._drafter
    run, counted = drafter._run, []
    monkeypatch.setattr(drafter, "_run", lambda steps: counted.append(sum(s.num_rows for s in steps)) or run(steps))
    text = "a beginning that is long enough for some blocks of the cache. " * 2
    run_core(core, [request("a", text + "one", max_tokens=8)])
    first, counted[:] = sum(counted), []
    run_core(core, [request("b", text + "two", max_tokens=8)])
    assert first >= len(text)
    assert sum(counted) < 40
    assert core.stats().accepted_tokens == core.stats().draft_tokens
    core.close()


def test_texts_are_read_in_chunks_while_steps_go_on():
    core = tiny_engine(**PLAIN, max_num_batched_tokens=192, speculative=DRAFT, draft=shared_model("llama", 0)).core
    core.add(request("a", "x" * 150, max_tokens=12))
    gained = []
    while core.has_work():
        gained += [len(o.outputs[0].token_ids) for o in core.step()]
    assert gained[:2] == [1, 1], "of 150 tokens 64 are read before each of two steps"
    assert gained[2] == 4, "and the rest with the first guess"
    core.close()


BOTH = SpeculativeConfig("ngram+draft", k=3, max_k=6, model="tinier")


@SAMPLING
@pytest.mark.parametrize("batch", [1, 16])
def test_what_is_found_is_copied_and_the_rest_asked_of_the_model(batch, sampling, monkeypatch):
    texts = TEXTS[:batch]
    expected, plain = answers(texts, sampling=sampling)
    whole = {tuple(text.encode()): expected[str(number)] for number, text in enumerate(texts)}

    def guess(drafter, sequence_id, count):
        """What will be said, now and then, with a mistake at the end."""
        text = drafter._texts[sequence_id]
        known = len(text.tokens) - len(text.new.prompt_token_ids)
        found = whole[text.new.prompt_token_ids][known : known + count]
        return () if known % 3 else (*found[:3], 0)[:count]

    monkeypatch.setattr(NgramDrafter, "_guess", guess)
    tokens, stats = answers(texts, sampling=sampling, speculative=BOTH, draft=nearly("llama", 0, 0.02))
    assert tokens == expected
    assert stats.steps < plain.steps
    assert 0 < stats.accepted_copies < stats.copied_tokens
    computed, right = stats.draft_tokens - stats.copied_tokens, stats.accepted_tokens - stats.accepted_copies
    assert 0 < right < computed


def test_what_was_copied_is_read_with_the_next_guess_and_not_before(monkeypatch):
    """A draft model that is the model itself is right after copies too, and reads the copied tokens in one step."""
    calls, reads = [], []

    def guess(_drafter, _sequence_id, _count):
        """Copies for some steps, all wrong, then nothing any more."""
        calls.append(1)
        return (0, 0) if len(calls) < 9 else ()

    monkeypatch.setattr(NgramDrafter, "_guess", guess)
    core = tiny_engine(**PLAIN, speculative=BOTH, draft=shared_model("llama", 0)).core
    model = core._runner._drafter._other
    run = model._run
    monkeypatch.setattr(model, "_run", lambda steps: reads[-1].append(sum(s.num_rows for s in steps)) or run(steps))
    core.add(request("a", "one two three ", max_tokens=40))
    while core.has_work():
        reads.append([])
        core.step()
    assert reads[:8] == [[]] * 8, "while copies come nothing is read"
    assert reads[8] == [14 + 9, 1, 1], "what came meanwhile is read with the first guess"
    stats = core.stats()
    assert stats.accepted_copies == 0 < stats.copied_tokens
    assert stats.accepted_tokens == stats.draft_tokens - stats.copied_tokens > 10
    core.close()


def test_a_long_copy_is_not_read_as_long_as_it_goes_on(monkeypatch):
    """However much there is to read by then."""
    said = answers(["one two three "], sampling={"max_tokens": 90})[0]["0"]
    copied, reads = [], []

    def guess(drafter, sequence_id, count):
        known = len(drafter._texts[sequence_id].tokens) - 14
        copied.append(known)
        return tuple(said[known : known + count]) if len(copied) <= 10 else ()

    monkeypatch.setattr(NgramDrafter, "_guess", guess)
    core = tiny_engine(**PLAIN, speculative=BOTH, draft=shared_model("llama", 0)).core
    model = core._runner._drafter._other
    run = model._run
    monkeypatch.setattr(model, "_run", lambda steps: reads.append(len(copied)) or run(steps))
    assert tokens_of(run_core(core, [request("a", "one two three ", max_tokens=90)])["a"]) == said
    stats = core.stats()
    assert stats.accepted_copies == stats.copied_tokens == 60
    assert min(reads) > 10, "nothing is read before there is nothing to copy"
    assert stats.accepted_tokens == stats.draft_tokens > 70
    core.close()


def test_blocks_that_a_second_tier_brings_back_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr("kvarn.engine.tier.measure_move", lambda executable, file: MoveSeconds(0.0, 0.0))
    settings = {"num_blocks": 12, "kv_offload_bytes": 1 << 20, "kv_offload_dir": str(tmp_path), "identity": "tiny"}
    expected, _ = answers([*TEXTS, *TEXTS], one_by_one=True)
    tokens, stats = answers([*TEXTS, *TEXTS], speculative=DRAFT, draft=shared_model("llama", 0), **settings)
    assert tokens == expected
    assert stats.loaded_tokens > 0
    assert stats.accepted_tokens == stats.draft_tokens


def test_the_target_may_have_windows_and_the_draft_model_others():
    """The draft model is in the blocks of the layers that see all."""
    expected, _ = answers(TEXTS, family="gemma3_text")
    for family, seed in (("gemma3_text", 0), ("llama", 1), ("mistral", 0)):
        tokens, stats = answers(
            TEXTS, family="gemma3_text", speculative=DRAFT, draft=shared_model(family, seed), num_blocks=64
        )
        assert tokens == expected
        if family == "gemma3_text":
            assert stats.accepted_tokens == stats.draft_tokens > 300


def test_a_vocabulary_of_another_size_is_filled_up():
    """Ids without tokens do not matter; those that one model lacks are not guessed, and taken for others."""
    expected, _ = answers(TEXTS[:4])
    for size in (259, 300, 258):
        draft = tiny_model("llama", vocab_size=size)
        tokens, stats = answers(TEXTS[:4], speculative=DRAFT, draft=draft)
        assert tokens == expected
        assert stats.draft_tokens > 0


@pytest.mark.parametrize("tied", [True, False])
@SAMPLING
def test_a_draft_model_with_a_draft_vocabulary_says_nothing_else(sampling, tied, monkeypatch):
    """It is the target itself, so whatever it can say is right."""
    model = tiny_model("llama", tie_word_embeddings=tied)
    said = set()
    guess = DraftModelDrafter._guess
    monkeypatch.setattr(
        DraftModelDrafter, "_guess", lambda self, going: (guess(self, going), said.update(g.draft[-1] for g in going))
    )
    found = {}
    for vocab in (0, 120, 10_000):
        chosen = replace(DRAFT, draft_vocab=vocab)
        said.clear()
        found[vocab] = answers(TEXTS[:8], sampling=sampling, speculative=chosen, draft=model, model=model)
        assert (max(said) < 120) == (vocab == 120)
    (tokens, whole), (fewer, cut), (same, uncut) = found.values()
    assert tokens == fewer == same
    assert whole.accepted_tokens == whole.draft_tokens == uncut.accepted_tokens
    assert 0 < cut.accepted_tokens < whole.accepted_tokens


def test_a_draft_vocabulary_makes_weights_smaller_and_is_in_the_plan():
    model, plans = tiny_model("llama", tie_word_embeddings=False), []
    for vocab in (0, 64):
        chosen = replace(DRAFT, draft_vocab=vocab)
        tiny_engine(speculative=chosen, draft=model, on_plan=plans.append).core.close()
    width = model.program.weight("embed.weight").shape[1]
    assert 0 < plans[0].drafter.weights - plans[1].drafter.weights <= 259 * width * 5
    for wrong in ({"draft_vocab": -1}, {"draft_vocab": 8, "method": "ngram", "model": ""}):
        with pytest.raises(ConfigError, match="draft_vocab must be at least 0, and 0 without a draft model"):
            replace(DRAFT, **wrong)


def test_a_draft_model_of_fewer_positions_guesses_up_to_there():
    draft = tiny_model("llama", max_position_embeddings=64)
    expected, _ = answers(["abc"], sampling={"max_tokens": 120})
    assert len(expected["0"]) == 120
    tokens, stats = answers(["abc"], sampling={"max_tokens": 120}, speculative=DRAFT, draft=draft)
    assert tokens == expected
    assert 20 < stats.accepted_tokens < 64


def test_another_vocabulary_is_refused_by_its_first_token():
    check_same_vocabulary(["a", "b"], ["a", "b", "", ""], "target", "draft")
    check_same_vocabulary(["a", "b", ""], ["a", "b"], "target", "draft")
    for ours, theirs, words in (
        (["a", "b"], ["a", "c"], "draft has another vocabulary than target: token 1 is 'c' there, 'b' here"),
        (["a", "b"], ["a"], "token 1 is none there, 'b' here"),
        (["a"], ["a", "b"], "token 1 is 'b' there, none here"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_same_vocabulary(ours, theirs, "target", "draft")
    draft = DraftModel(tiny_model(), ["a", "b"], make_backend("cpu"), "other")
    with pytest.raises(ConfigError, match="other has another vocabulary than tiny: token 0"):
        draft.check(shared_model("llama", 0).program, spellings(byte_tokenizer().vocabulary), "tiny", None)


def test_a_target_that_forgets_is_refused_unless_texts_are_short():
    with pytest.raises(ConfigError, match=r"a layer that sees all tokens.*see the last 24.*max_model_len up to 24"):
        answers(["abc"], family="mistral", speculative=DRAFT, draft=shared_model("llama", 0))
    short = {"family": "mistral", "max_model_len": 24, "sampling": {"max_tokens": 12}}
    expected, _ = answers(["abc"], **short)
    tokens, stats = answers(["abc"], **short, speculative=DRAFT, draft=shared_model("mistral", 0))
    assert tokens == expected
    assert stats.accepted_tokens == stats.draft_tokens > 0


def test_its_memory_is_planned_and_refused_where_it_does_not_fit(monkeypatch):
    plans = []
    draft = tiny_model("llama", num_hidden_layers=4)
    tiny_engine(**PLAIN, on_plan=plans.append).core.close()
    engine = tiny_engine(**PLAIN, speculative=DRAFT, draft=draft, on_plan=plans.append)
    alone, both = plans
    assert both.drafter.kv_cache == 2 * both.use.kv_cache == 2 * alone.use.kv_cache, "four layers beside two"
    assert both.total == both.use.total + both.drafter.total
    loaded = engine.core._runner._drafter
    held = loaded._executable.info().memory
    assert both.drafter.activations == held.activations + loaded._probabilities.nbytes
    assert (both.drafter.weights, both.drafter.kv_cache) == (held.weights, held.kv_cache)
    engine.core.close()
    monkeypatch.setattr("kvarn.engine.backends.available_memory", lambda: Available(alone.total + 1000, "a test"))
    settings = {**PLAIN, "memory_utilization": 1.0}
    tiny_engine(**settings).core.close()
    with pytest.raises(CapacityError, match=r"takes 1\.1 MiB of weights.*at least 1\.5 MiB must be available"):
        tiny_engine(**settings, speculative=DRAFT, draft=draft)


def test_the_plan_command_counts_it(tmp_path):
    target, draft = (str(write_tiny_gguf(tmp_path / f"{name}.gguf")) for name in ("target", "draft"))
    settings = ["plan", target, "--memory", "64MiB", "--max-num-seqs", "4", "--threads", "1"]
    chosen = ["--speculative", f"method=draft,model={draft}"]
    alone = json.loads(CliRunner().invoke(app, [*settings, "--json"]).output)["served"]
    both = json.loads(CliRunner().invoke(app, [*settings, *chosen, "--json"]).output)["served"]
    assert alone["drafter"] is None
    assert both["drafter"]["kv_cache"] == both["use"]["kv_cache"]
    taken = [both[part][name] for part in ("use", "drafter") for name in both[part] if name != "parts"]
    assert both["total"] == sum(taken)
    assert both["use"]["parts"] == both["drafter"]["parts"] == [], "which only a card has"
    table = CliRunner().invoke(app, [*settings, *chosen]).output
    assert re.search(r"draft model +\S+ \S+ +\S+ \S+ of it KV cache", table)
    assert "draft model" not in CliRunner().invoke(app, settings).output


def test_both_models_are_read_from_files(tmp_path):
    target, draft = (write_tiny_gguf(tmp_path / f"{name}.gguf") for name in ("target", "draft"))
    config = EngineConfig(
        threads=1, cache=CacheConfig(num_blocks=32), packed_cache_bytes=0,
        speculative=SpeculativeConfig("draft", k=3, model=str(draft)),
    )  # fmt: skip
    core = load_engine(str(target), config).core
    run_core(core, [request("a", "abc", max_tokens=20)])
    stats = core.stats()
    core.close()
    core.close()
    assert stats.accepted_tokens == stats.draft_tokens > 10
    missing = SpeculativeConfig("draft", model=str(tmp_path / "none.gguf"))
    with pytest.raises(KvarnError, match=r"none\.gguf"):
        load_engine(str(target), EngineConfig(speculative=missing))
