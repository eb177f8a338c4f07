"""Guessing ahead changes how many steps it takes, and nothing else."""

from tiny_engine import handmade_engine, request, run_core, tokens_of

from kvarn.config import SpeculativeConfig

PROMPT = "the cat sat on the mat. the cat sat on the mat. the cat"


def run(speculative, requests, **settings):
    core = handmade_engine(speculative=speculative, **settings).core
    outputs = run_core(core, requests)
    stats = core.stats()
    core.close()
    return {name: tokens_of(o) for name, o in outputs.items()}, stats, outputs


def test_greedy_tokens_are_the_same_in_fewer_steps():
    expected, plain, _ = run(None, [request("a", PROMPT, max_tokens=60)])
    tokens, stats, _ = run(SpeculativeConfig(k=4), [request("a", PROMPT, max_tokens=60)])
    assert tokens == expected
    assert stats.steps < plain.steps
    assert stats.accepted_tokens == plain.steps - stats.steps
