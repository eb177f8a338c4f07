"""Beam search finds what trying everything finds, and computes of each beam little more than its last token."""

import asyncio
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import EOS, request, tiny_engine

from kvarn.engine import LLM, AsyncLLM
from kvarn.engine.beam import Beam, BeamParams, BeamSearch
from kvarn.errors import RequestError
from kvarn.request import FinishReason, SamplingParams

PROMPT = b"once upon a time, "


def plain_search(likeliest, prompt, width, max_tokens, penalty, ends):
    """The same as its definition reads, without an early end. likeliest(tokens, count): what follows."""

    def score(tokens, logprob):
        return logprob / (len(prompt) + len(tokens) - (tokens[-1] in ends)) ** penalty

    open_beams, ended = [((), 0.0)], []
    for _ in range(max_tokens):
        grown = []
        for tokens, logprob in open_beams:
            for token, more in likeliest(prompt + tokens, 2 * width):
                (ended if token in ends else grown).append(((*tokens, token), logprob + more))
        open_beams = sorted(grown, key=lambda beam: (-score(*beam), beam[0]))[:width]
    return sorted(ended + open_beams, key=lambda beam: (-score(*beam), beam[0]))


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(2, 6), st.integers(1, 4), st.integers(1, 6),
    st.sampled_from([-1.0, 0.0, 1.0, 3.0]),
)  # fmt: skip
def test_it_is_what_its_definition_says(seed, vocab, width, max_tokens, penalty):
    def likeliest(tokens, count):
        weights = [1 + hash((seed, tokens, token)) % 1000 for token in range(vocab)]
        found = [(token, math.log(weight / sum(weights))) for token, weight in enumerate(weights)]
        return sorted(found, key=lambda item: -item[1])[:count]

    prompt, ends = (7, 7, 7), {0}
    search = BeamSearch(BeamParams(width, penalty), len(prompt), max_tokens, ends)
    while search.open:
        search.take([likeliest(prompt + beam.token_ids, 2 * width) for beam in search.open])
    expected = plain_search(likeliest, prompt, width, max_tokens, penalty, ends)[:width]
    assert [beam.token_ids for beam in search.best(width)] == [tokens for tokens, _ in expected]
    for beam in search.best(width):
        assert (beam.finish_reason is FinishReason.STOP) == (beam.token_ids[-1] in ends)


def test_where_every_beam_is_kept_it_finds_the_likeliest_of_all():
    """Two tokens of which all beams are kept: nothing is likelier than what it finds."""
    odds = {token: math.log(weight) for token, weight in enumerate((0.5, 0.3, 0.2))}
    after = {0: {0: 0.4, 1: 0.35, 2: 0.25}, 1: {0: 0.9, 1: 0.05, 2: 0.05}, 2: {0: 0.1, 1: 0.1, 2: 0.8}}
    search = BeamSearch(BeamParams(3), 1, 2, ())
    search.take([list(odds.items())])
    search.take([[(t, math.log(p)) for t, p in after[beam.token_ids[0]].items()] for beam in search.open])
    every = {(a, b): odds[a] + math.log(after[a][b]) for a, b in itertools.product(range(3), repeat=2)}
    assert [beam.token_ids for beam in search.best(3)] == sorted(every, key=every.__getitem__, reverse=True)[:3]
    assert search.best(1)[0].token_ids == (1, 0), "which is not what greedy choice finds"


def test_an_end_that_nothing_can_better_ends_the_search():
    search = BeamSearch(BeamParams(1, 0.0), 10, 1000, {5})
    search.take([[(5, math.log(0.9)), (6, math.log(0.1))]])
    assert search.open == []
    assert search.best(1) == [Beam((5,), math.log(0.9), FinishReason.STOP)]


@pytest.mark.parametrize("settings", [{}, {"enable_prefix_caching": False}, {"max_num_seqs": 1}, {"num_blocks": 12}])
@pytest.mark.parametrize("width", [1, 4])
def test_over_a_model(settings, width):
    llm = LLM.from_engine(tiny_engine(backend="cpu", max_model_len=128, **settings))

    def likeliest(tokens, count):
        one = SamplingParams(max_tokens=1, temperature=0.0, logprobs=count, ignore_eos=True)
        return llm.generate([tokens], one)[0].choices[0].logprobs[0].top

    expected = plain_search(likeliest, tuple(PROMPT), width, 6, 1.0, {EOS})[:width]
    found = llm.beam_search(tuple(PROMPT), BeamParams(width), SamplingParams(max_tokens=6, n=width))
    assert [choice.token_ids for choice in found] == [tokens for tokens, _ in expected]
    assert [choice.index for choice in found] == list(range(width))
    if width == 1:
        greedy = llm.generate([tuple(PROMPT)], SamplingParams(max_tokens=6, temperature=0.0))[0].choices[0]
        assert (found[0].token_ids, found[0].text) == (greedy.token_ids, greedy.text)
    llm.close()


def test_beams_share_what_they_have_in_common():
    computed = []
    engine = tiny_engine(backend="cpu", num_blocks=64)
    execute = engine.core._runner.execute

    def watched(scheduled):
        computed.append(sum(len(part.token_ids) for part in scheduled.sequences))
        return execute(scheduled)

    engine.core._runner.execute = watched
    with LLM.from_engine(engine) as llm:
        llm.beam_search(tuple(b"x" * 60), BeamParams(4), SamplingParams(max_tokens=10, n=4))
        assert llm.stats().free_blocks == 64
    assert sum(computed) == 60 + 4 * 9, "the prompt, and the last token of each beam"


def test_asynchronously_beside_others():
    async def run():
        async with AsyncLLM(tiny_engine(backend="cpu", num_blocks=128)) as llm:
            others = [llm.generate(request(str(i), f"other {i}", max_tokens=30)) for i in range(3)]
            asked = request("beams", PROMPT.decode(), n=3, max_tokens=8, ignore_eos=False)
            first, second = await asyncio.gather(
                llm.beam_search(asked, BeamParams(3)),
                llm.beam_search(request("again", PROMPT.decode(), n=3, max_tokens=8, ignore_eos=False), BeamParams(3)),
            )
            assert first.beams == second.beams and len(first.beams) == 3
            task = asyncio.create_task(llm.beam_search(request("gone", "x", max_tokens=400), BeamParams(3)))
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            for stream in others:
                assert [output async for output in stream][-1].finished
            alone = await llm.beam_search(asked, BeamParams(3))
            assert alone.beams == first.beams and alone.num_cached_tokens > 0
            for _ in range(600):
                if llm.stats().free_blocks == 128:
                    return
                await asyncio.sleep(0.05)
            raise AssertionError("blocks are lost")

    asyncio.run(run())


@pytest.mark.parametrize(
    ("sampling", "field"),
    [({"max_tokens": None}, "max_tokens"), ({"n": 3}, "n"), ({"logprobs": 1}, "logprobs"), ({"top_p": 0.5}, "top_p")],
)
def test_what_does_not_go_with_it_is_refused(make_llm, sampling, field):
    llm = make_llm()
    with pytest.raises(RequestError) as found:
        llm.beam_search("x", BeamParams(2), SamplingParams(**{"max_tokens": 3, **sampling}))
    assert found.value.field == field


@pytest.mark.parametrize(("wrong", "field"), [((0,), "best_of"), ((11,), "best_of"), ((2, 11.0), "length_penalty")])
def test_limits(wrong, field):
    with pytest.raises(RequestError) as found:
        BeamParams(*wrong)
    assert found.value.field == field
