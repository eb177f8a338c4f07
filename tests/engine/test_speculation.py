"""Guessing ahead changes how many steps it takes, and nothing else."""

import functools
import random
from dataclasses import replace

import pytest
from pairwise import SAMPLING, pairwise, uncovered
from tiny_engine import EOS, Script, handmade_engine, nearly, request, run_core, text_of, tiny_engine, tokens_of

from kvarn.config import SpeculativeConfig
from kvarn.draft_tree import levels
from kvarn.engine.events import merge_outputs
from kvarn.errors import RequestError
from kvarn.request import FinishReason, Request, SamplingParams
from kvarn.runner import MoveSeconds, Proposal
from kvarn.spec.ngram import NgramDrafter

PROMPT = "the cat sat on the mat. the cat sat on the mat. the cat"
NGRAM = SpeculativeConfig(k=4)


class Knowing(NgramDrafter):
    """Knows what every sequence will say, and is wrong now and then; sometimes it does not know and looks it up."""

    def __init__(self, answers, tree=False):
        """tree: it makes trees of what it knows and of what is wrong."""
        super().__init__(2, 4)
        self.tree = tree
        self.answers = answers
        self.random = random.Random(5)
        self.streams = {}

    def add(self, sequence):
        super().add(sequence)
        self.streams[sequence.sequence_id] = sequence.prompt_token_ids, sequence.stream

    def propose(self, scheduled, sampled, values):
        looked_up = {p.sequence_id: p for p in super().propose(scheduled, sampled, values)}
        for part in scheduled.sequences:
            prompt, stream = self.streams[part.sequence_id]
            known = len(self._texts[part.sequence_id].tokens) - len(prompt)
            answer = self.answers.get((prompt, stream), ())[known : known + part.num_drafts_wanted]
            if answer and self.random.random() < 0.8:
                guess = self.grow(answer, part.num_nodes_wanted) if self.tree else self.follow(answer)
                looked_up[part.sequence_id] = Proposal(part.sequence_id, guess[0], parents=guess[1])
        return list(looked_up.values())

    def guess(self, token):
        return token if self.random.random() < 0.8 else self.random.randrange(256)

    def follow(self, answer):
        return tuple(self.guess(token) for token in answer), None

    def grow(self, answer, count):
        """Guesses that follow any of those before them, behind which is what would be right after as many tokens."""
        tokens, parents = [], []
        for place in range(count):
            parent = self.random.randrange(max(-1, place - 4), place)
            level = levels([*parents, parent])[-1]
            if level < len(answer):
                tokens.append(self.guess(answer[level]))
                parents.append(parent)
            else:
                break
        return tuple(tokens), tuple(parents)


def run(speculative, requests, **settings):
    """Tokens by request, statistics and outputs."""
    core = handmade_engine(speculative=speculative, **settings).core
    outputs = run_core(core, requests)
    stats = core.stats()
    core.close()
    return {name: tokens_of(o) for name, o in outputs.items()}, stats, outputs


def test_greedy_tokens_are_the_same_in_fewer_steps():
    expected, plain, _ = run(None, [request("a", PROMPT, max_tokens=60)])
    tokens, stats, outputs = run(NGRAM, [request("a", PROMPT, max_tokens=60)])
    assert tokens == expected
    assert stats.steps == plain.steps - stats.accepted_tokens < plain.steps
    assert sum(stats.accepted_by_position) == stats.accepted_tokens < stats.draft_tokens <= 4 * stats.drafts
    assert list(stats.accepted_by_position) == sorted(stats.accepted_by_position, reverse=True)
    last = outputs["a"][-1]
    assert (last.num_draft_tokens, last.num_accepted_tokens) == (stats.draft_tokens, stats.accepted_tokens)
    assert plain.drafts == plain.draft_tokens == 0


LOOKAHEAD = SpeculativeConfig("lookahead", k=40, window=4, ngram=3, guesses=4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
def test_lookahead_says_the_same_in_fewer_steps(family, dtype):
    """Prompts that say nothing twice. What a window begins with is drawn by the seed."""
    settings = {"family": family, "dtype": dtype, "num_blocks": 256}
    prompts = [bytes(range(40 + i, 80 + i)).decode("latin1") for i in (0, 3)]
    requests = [
        request(f"{i}{name}", prompt, max_tokens=70, **sampling)
        for i, prompt in enumerate(prompts)
        for name, sampling in (("greedy", {"seed": 7}), ("hot", {"temperature": 0.4, "seed": 7}))
    ]
    for some in (requests[:1], requests):
        expected, plain, _ = run(None, some, **settings)
        tokens, stats, _ = run(LOOKAHEAD, some, **settings)
        assert tokens == expected
        assert stats.steps < plain.steps
        assert len(stats.accepted_by_position) <= 4 + 3 - 2 + 1, "as far ahead as the window goes"
        assert stats.free_blocks == stats.num_blocks


FACTORS = {
    "speculative": [
        NGRAM, SpeculativeConfig(k=1), SpeculativeConfig(k=7, max_step_drafts=8), SpeculativeConfig(),
        SpeculativeConfig(k=12), SpeculativeConfig("draft", k=3, model="tiny"),
        SpeculativeConfig("draft", model="tiny"), SpeculativeConfig("ngram+draft", k=3, model="tiny"),
        SpeculativeConfig("ngram+draft", model="tiny"),
    ],
    "drafter": ["chain", "tree", "lookahead"],
    "family": ["llama", "gemma3_text"],
    "batch": [1, 16],
    "prefix_cache": [True, False],
    "budget": [24, 256],
    "memory": ["ample", "tight", "tier"],
    "dtype": ["float16", "int8", "int4"],
    "n": [1, 3],
    "sampling": ["greedy", "hot", "penalties"],
    "logprobs": [None, 2],
    "ends": ["length", "stop string", "stop token", "min_tokens"],
    "abort": [False, True],
}
CASES = pairwise(FACTORS)
# Bytes and pairs of bytes that come in random texts now and then.
STOPS = {
    "length": {"ignore_eos": True},
    "stop string": {"stop": ("A", "B", "C", "x", "0"), "ignore_eos": True},
    "stop token": {"stop_token_ids": tuple(range(100, 105))},
    "min_tokens": {"stop_token_ids": tuple(range(40, 60)), "min_tokens": 9, "stop": ("a", "e")},
}


def test_every_pair_of_values_is_in_some_case():
    assert not uncovered(FACTORS, CASES)
    assert len(CASES) < 40


def asked(case):
    """The requests of a case; some begin alike."""
    sampling = {**SAMPLING[case["sampling"]], **STOPS[case["ends"]], "n": case["n"], "logprobs": case["logprobs"]}
    texts = [f"{'lorem ipsum dolor sit amet ' * (i % 3)}{i} and {i} and {i} and" for i in range(case["batch"])]
    return [
        Request(str(i), tuple(text.encode()), SamplingParams(**{"max_tokens": 20 + i % 5, **sampling}))
        for i, text in enumerate(texts)
    ]


def start(case, folder, speculative):
    caching, tier = case["prefix_cache"], {}
    if caching and case["memory"] == "tier":
        tier = {"kv_offload_bytes": 1 << 20, "kv_offload_dir": str(folder), "identity": "tiny"}
    few, many = (20, 512) if case["family"] == "gemma3_text" else (8, 256)  # it has two KV groups
    draft = nearly(case["family"], 0, 0.1) if speculative.source == "draft" else None
    return tiny_engine(
        family=case["family"],
        backend="cpu",
        draft=draft,
        dtype=case["dtype"],
        num_blocks=many if case["memory"] == "ample" else few,
        max_model_len=128,
        max_num_batched_tokens=case["budget"],
        enable_prefix_caching=caching,
        speculative=speculative,
        **tier,
    ).core


@functools.cache
def expected_answers(**case):
    """What everybody says alone, one after the other, without speculation."""
    core = tiny_engine(family=case["family"], backend="cpu", dtype=case["dtype"], max_model_len=128).core
    answers = {r.request_id: merge_outputs(run_core(core, [r])[r.request_id]).outputs for r in asked(case)}
    core.close()
    return answers


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(v) for v in list(case.values())[1:]))
def test_the_same_answers_with_everything_else(case, tmp_path, monkeypatch):
    """Tokens, texts, logprobs and reasons to end, to the bit."""
    asked_for = ("family", "batch", "dtype", "n", "sampling", "logprobs", "ends")
    expected = expected_answers(**{name: case[name] for name in asked_for})
    requests = asked(case)
    prompts = {r.request_id: r.prompt_token_ids for r in requests}
    known = {(prompts[i], part.index): part.token_ids for i, parts in expected.items() for part in parts}
    speculative = case["speculative"]
    if speculative.source != "draft" and case["drafter"] == "lookahead":
        speculative = replace(speculative, method="lookahead", window=2, ngram=3, guesses=2)
    elif speculative.source != "draft":
        drafter = Knowing(known, case["drafter"] == "tree")
        monkeypatch.setattr("kvarn.engine.load.make_drafter", lambda *_, **__: drafter)
    monkeypatch.setattr("kvarn.engine.tier.measure_move", lambda executable, file: MoveSeconds(0.0, 0.0))
    core = start(case, tmp_path, speculative)
    outputs = {r.request_id: [] for r in requests}
    for r in requests:
        core.add(r)
    aborted = requests[0].request_id if case["abort"] else None
    while core.has_work():
        for event in core.step():
            outputs[event.request_id].append(event)
        if aborted in outputs and len(outputs[aborted]) == 3 and not outputs[aborted][-1].finished:
            outputs[aborted].append(core.abort(aborted))
    for name, parts in expected.items():
        got = merge_outputs(outputs[name])
        if name == aborted and any(part.finish_reason is FinishReason.ABORT for part in got.outputs):
            for part in got.outputs:
                whole = next(p for p in parts if p.index == part.index)
                assert part.token_ids == whole.token_ids[: len(part.token_ids)]
                assert part.logprobs == whole.logprobs[: len(part.logprobs)]
        else:
            assert got.outputs == parts
            assert 0 <= got.num_accepted_tokens <= sum(len(part.token_ids) for part in parts)
            assert got.num_accepted_tokens <= got.num_draft_tokens
    stats = core.stats()
    core.close()
    assert stats.free_blocks == stats.num_blocks
    tight = case["memory"] != "ample"
    if tight and case["family"] == "gemma3_text":
        return  # what is left over, and who is preempted for it, depends on what falls out of windows
    if case["speculative"].k is not None and case["batch"] == 16:
        assert stats.accepted_tokens < stats.draft_tokens
        assert stats.accepted_tokens > 0 or case["drafter"] == "lookahead"
    if tight and case["batch"] == 16:
        assert stats.preemptions > 0


def test_a_stop_string_inside_a_draft_ends_the_text_there():
    """What was accepted behind it is dropped, and counted nowhere."""
    said = "abc END def ghi jkl"
    requests = [request("a", "x" + said * 2, stop=("END",), max_tokens=19)]
    core = handmade_engine(wrap_sampler=lambda s: Script(s, said), speculative=SpeculativeConfig(k=16)).core
    outputs = run_core(core, requests)["a"]
    assert text_of(outputs) == "abc "
    assert tokens_of(outputs) == list(b"abc END")
    last = outputs[-1]
    assert (last.outputs[0].finish_reason, last.outputs[0].stop_reason) == (FinishReason.STOP, "END")
    stats = core.stats()
    assert stats.steps < 7
    assert stats.generated_tokens == 7
    assert stats.accepted_tokens == last.num_accepted_tokens < 7
    assert stats.free_blocks == stats.num_blocks
    core.close()


@pytest.mark.parametrize(
    ("sampling", "said", "reason", "stop"),
    [
        ({"ignore_eos": False}, [*b"abc", EOS], FinishReason.STOP, None),
        ({"stop_token_ids": (ord("c"),)}, list(b"abc"), FinishReason.STOP, ord("c")),
        ({"max_tokens": 3}, list(b"abc"), FinishReason.LENGTH, None),
        ({"stop": ("bc",), "ignore_eos": False}, list(b"abc"), FinishReason.STOP, "bc"),
    ],
    ids=["eos", "stop token", "length", "stop string before eos"],
)
def test_an_end_inside_a_draft_is_the_end(sampling, said, reason, stop):
    script = [*b"abc", EOS, *b"defghi"]
    core = handmade_engine(wrap_sampler=lambda s: Script(s, script), speculative=SpeculativeConfig(k=16)).core
    prompt = (1, *script, 2, *script)
    outputs = run_core(core, [request("a", prompt, **{"max_tokens": 10, **sampling})])["a"]
    assert tokens_of(outputs) == said
    part = outputs[-1].outputs[0]
    assert (part.finish_reason, part.stop_reason) == (reason, stop)
    assert core.stats().generated_tokens == len(said)
    core.close()


def test_a_request_may_have_less_or_none_and_not_more():
    core = handmade_engine(speculative=NGRAM).core
    outputs = run_core(core, [request(str(k), PROMPT, max_tokens=40, num_speculative_tokens=k) for k in (0, 1, 4)])
    assert outputs["0"][-1].num_draft_tokens == 0
    assert outputs["1"][-1].num_accepted_tokens > 0
    assert max(len(part.token_ids) for o in outputs["1"] for part in o.outputs) == 2
    assert max(len(part.token_ids) for o in outputs["4"] for part in o.outputs) > 2
    with pytest.raises(RequestError, match=r"must be 0 to 4.*not 5") as caught:
        core.add(request("5", PROMPT, num_speculative_tokens=5))
    assert caught.value.field == "num_speculative_tokens"
    core.close()
    core = handmade_engine().core
    core.check(request("0", PROMPT, num_speculative_tokens=0))
    with pytest.raises(RequestError, match="without speculative decoding"):
        core.check(request("1", PROMPT, num_speculative_tokens=1))
    core.close()


def test_counts_go_on_after_a_failed_step():
    core = handmade_engine(speculative=NGRAM).core
    run_core(core, [request("a", PROMPT, max_tokens=40)])
    before = core.stats()
    core.reset()
    run_core(core, [request("a", PROMPT, max_tokens=40)])
    after = core.stats()
    assert after.accepted_tokens == 2 * before.accepted_tokens > 0
    assert after.accepted_by_position == tuple(2 * count for count in before.accepted_by_position)
    core.close()
