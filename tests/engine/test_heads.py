"""Medusa and EAGLE change how many steps it takes, and nothing else; and they guess what torch says they should."""

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from random_heads import heads_file, random_heads
from tiny_engine import request, run_core, shared_model, tiny_engine, tokens_of

from kvarn.config import SpeculativeConfig
from kvarn.draft_tree import chain, levels
from kvarn.spec import eagle
from kvarn.spec.chain import WIDTH
from kvarn.spec.heads import KINDS, read_heads
from kvarn.spec.ngram import NgramDrafter
from kvarn.spec.rings import Rings

FAMILIES = ("llama", "mistral", "gemma3_text", "gpt2")
PROMPTS = ["lorem ipsum dolor sit amet " * (i % 3) + f"{i} and {i}" for i in range(6)]


def requests(**sampling):
    return [request(str(i), text, max_tokens=20 + i % 5, **sampling) for i, text in enumerate(PROMPTS)]


def run(core, asked):
    outputs = run_core(core, asked)
    stats = core.stats()
    core.close()
    return {name: [tokens_of(o, i) for i in range(3)] for name, o in outputs.items()}, stats


@functools.cache
def plain(backend, family, dtype, hot):
    core = tiny_engine(backend=backend, family=family, dtype=dtype, max_model_len=128).core
    return run(core, requests(**sampling(hot)))[0]


def sampling(hot):
    return {"temperature": 1.0, "top_p": 0.95, "seed": 5, "n": 2} if hot else {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [3, 1, None])
@pytest.mark.parametrize("hot", [False, True], ids=["greedy", "hot"])
@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("llama", {}),
        ("llama", {"num_blocks": 6, "max_model_len": 96, "max_num_batched_tokens": 24}),
        ("mistral", {"max_num_seqs": 3, "dtype": "int4"}),
        ("gemma3_text", {"enable_prefix_caching": False}),
        ("gpt2", {"max_num_batched_tokens": 48, "num_blocks": 40}),
    ],
    ids=["llama", "tight", "windows int4", "mixed windows", "layer norm"],
)
def test_answers_are_the_same(kind, k, hot, family, given, tmp_path):
    """Greedy and at a temperature, with preemptions, chunks and hits between; sure heads guess in every step."""
    heads = heads_file(tmp_path, shared_model(family, 0), kind)
    settings = {"backend": "cpu", "max_model_len": 128, "dtype": "float16", **given}
    core = tiny_engine(family=family, speculative=SpeculativeConfig(kind, k=k, heads=heads), **settings).core
    got, stats = run(core, requests(**sampling(hot)))
    assert got == plain("cpu", family, settings["dtype"], hot)
    assert stats.free_blocks == stats.num_blocks
    if "max_model_len" in given:
        assert stats.preemptions > 0
    elif k is not None:
        assert stats.draft_tokens > 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [3, None])
def test_what_is_found_is_copied_and_the_rest_asked_of_heads(kind, k, tmp_path, monkeypatch):
    heads = heads_file(tmp_path, shared_model("llama", 0), kind)
    chosen = SpeculativeConfig(f"ngram+{kind}", k=k, heads=heads)
    found = NgramDrafter._guess
    # Three of four times nothing is found, and otherwise something.
    monkeypatch.setattr(
        NgramDrafter, "_guess",
        lambda self, number, count: () if len(self._texts[number].tokens) % 4 else found(self, number, count) or (9,),
    )  # fmt: skip
    core = tiny_engine(backend="cpu", dtype="float16", speculative=chosen, max_model_len=128).core
    got, stats = run(core, requests())
    assert got == plain("cpu", "llama", "float16", False)
    if k is not None:
        assert 0 < stats.copied_tokens < stats.draft_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_backend_runs_heads_too(kind, tmp_path):
    heads = heads_file(tmp_path, shared_model("llama", 0), kind)
    core = tiny_engine(speculative=SpeculativeConfig(kind, k=3, heads=heads), max_model_len=128).core
    got, stats = run(core, requests())
    assert got == plain("reference", "llama", "float32", False)
    assert stats.draft_tokens > 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_may_have_none(kind, tmp_path):
    heads = heads_file(tmp_path, shared_model("llama", 0), kind)
    core = tiny_engine(backend="cpu", speculative=SpeculativeConfig(kind, k=3, heads=heads)).core
    outputs = run_core(core, [request(str(k), "abc", max_tokens=30, num_speculative_tokens=k) for k in (0, 1, 3)])
    drafted = [outputs[str(k)][-1].num_draft_tokens for k in (0, 1, 3)]
    assert drafted[0] == 0 < drafted[1] < drafted[2]
    core.close()


@pytest.mark.parametrize("kind", KINDS)
def test_what_heads_take_is_in_the_plan(kind, tmp_path):
    heads = heads_file(tmp_path, shared_model("llama", 0), kind)
    plans = []
    for speculative in (SpeculativeConfig("ngram"), SpeculativeConfig(kind, heads=heads)):
        tiny_engine(backend="cpu", speculative=speculative, on_plan=plans.append).core.close()
    params = sum(values.size for values in random_heads(shared_model("llama", 0), kind).tensors.values())
    assert plans[0].drafter is None
    taken = plans[1].drafter
    assert taken.weights > params / 2
    assert taken.activations > (8 * eagle.ring_blocks(24) * 16 * 2 * 32 * 4 if kind == "eagle" else 0)
    assert taken.kv_cache == 0 and plans[1].num_blocks == plans[0].num_blocks
    sized = {"backend": "cpu", "num_blocks": None, "kv_cache_bytes": 1 << 20, "max_model_len": 64}
    for speculative in (SpeculativeConfig("ngram"), SpeculativeConfig(kind, heads=heads)):
        tiny_engine(speculative=speculative, on_plan=plans.append, **sized).core.close()
    assert plans[3].num_blocks == plans[2].num_blocks, "a size of the cache is the target's alone"


class Watching:
    """Keeps what a drafter proposed, and what it was shown."""

    def __init__(self, drafter):
        self.drafter, self.texts, self.rows, self.proposed, self.steps = drafter, {}, {}, {}, 0

    def __getattr__(self, name):
        return getattr(self.drafter, name)

    def add(self, new):
        self.texts[new.sequence_id] = list(new.prompt_token_ids)
        self.rows[new.sequence_id] = []
        self.drafter.add(new)

    def propose(self, scheduled, sampled, values):
        for token in sampled:
            self.texts[token.sequence_id].append(token.token_id)
        row = 0
        for part in scheduled.sequences:
            end = min(row + part.num_rows, row + len(self.texts[part.sequence_id]) - 1 - part.start)
            self.rows[part.sequence_id] += list(values["x"][row:end].copy())
            row += part.num_rows
        self.steps += 1
        if self.steps % 52 > 12:  # for so many steps nothing is wanted, so that hidden states wait
            parts = [replace(part, num_drafts_wanted=0) for part in scheduled.sequences]
            scheduled = replace(scheduled, sequences=tuple(parts))
        proposals = self.drafter.propose(scheduled, sampled, values)
        for proposal in proposals:
            at = proposal.sequence_id, len(self.texts[proposal.sequence_id])
            self.proposed[at] = proposal.token_ids, proposal.parents or chain(len(proposal.token_ids))
        return proposals


@pytest.mark.parametrize(("backend", "share"), [("reference", 1.0), ("cpu", 0.8)])
@pytest.mark.parametrize("kind", KINDS)
def test_guesses_are_those_of_the_trained_net(kind, backend, share, tmp_path, monkeypatch):
    """The same tokens as torch finds from the same hidden states and stored weights, in float32; most of them where
    activations are quantized."""
    torch = pytest.importorskip("torch", reason="torch is not installed: heads are trained with it")
    from kvarn.spec.head_model import stored
    from kvarn.tensors.dequantize import dequantize
    from kvarn.training.nets import make_net
    from kvarn.training.target import Target

    model = shared_model("llama", 0)
    path = heads_file(tmp_path, model, kind, sure=6.0, window=40)
    monkeypatch.setattr(eagle, "MOST_AHEAD", 3)
    watching = []
    load = "kvarn.spec.head_model.HeadModel.load"
    original = eagle.HeadModel.load
    monkeypatch.setattr(load, lambda *a, **k: watching.append(Watching(original(*a, **k))) or WithBuffer(watching[0]))
    config = SpeculativeConfig(kind, k=3, heads=path)
    core = tiny_engine(
        backend=backend, speculative=config, max_model_len=256, enable_prefix_caching=False
    ).core
    run(core, [request(str(i), text, max_tokens=150) for i, text in enumerate(PROMPTS[:3])])
    heads, target = read_heads(Path(path), kind), Target(model.program, model)
    params = {
        name: torch.from_numpy(np.array(dequantize(stored(name, v)), np.float32))
        for name, v in heads.tensors.items()
    }
    net = make_net(kind, heads.shape, params, target)
    (seen,) = watching
    compared = branches = right = 0
    for sequence, text in seen.texts.items():
        rows = np.stack(seen.rows[sequence]).astype(np.float32)
        for length in range(len(PROMPTS[sequence]) + 1, len(text) - 4):
            proposed, parents = seen.proposed.get((sequence, length), ((), ()))
            if not proposed:
                continue
            # Hidden states of all tokens but the last; guesses go on from their own.
            features = np.zeros((1, length + 3, rows.shape[1]), np.float32)
            features[0, : length - 1] = rows[: length - 1]
            tokens = np.zeros((1, length + 4), np.int64)
            tokens[0, :length] = text[:length]
            along, at = [], -1  # the likeliest branch
            while at in parents[at + 1 :]:
                at = parents.index(at, at + 1)
                along.append(proposed[at])
            tokens[0, length : length + len(along)] = along
            shown = target.normed(features) if kind == "medusa" else features
            with torch.no_grad():
                logits = net.guess(torch.from_numpy(shown), torch.from_numpy(tokens), length - 1, 3)
            order = [heads.draft_ids[torch.argsort(guess[0, -1], descending=True).numpy()] for guess in logits]
            for token, level, parent in zip(proposed, levels(parents), parents, strict=True):
                right += token in order[level][:WIDTH]
                assert kind == "medusa" or parent < 0 or proposed[parent] == along[level - 1]
            right += sum(token == level[0] for token, level in zip(along, order, strict=False))
            compared += len(proposed) + len(along)
            branches += list(parents) != sorted(set(parents))
    assert compared > 100
    assert right >= share * compared
    assert branches > 0


class WithBuffer:
    """A drafter that is shown the hidden states of all tokens, too."""

    def __init__(self, watching):
        self.watching = watching

    def __getattr__(self, name):
        return getattr(self.watching, name)

    @property
    def buffers(self):
        return tuple({*self.watching.drafter.buffers, "x"})


def test_rings_are_shared_out_and_taken_back():
    rings = Rings(2)
    assert rings.of(7, {7}) == rings.of(7, {7}) == (0, None)
    assert rings.of(8, {7, 8}) == (1, None)
    assert rings.of(9, {8, 9}) == (0, 7), "the one that is not in the step"
    rings.free(8)
    rings.free(99)
    assert rings.of(7, {7, 9}) == (1, None)
