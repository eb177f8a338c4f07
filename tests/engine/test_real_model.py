"""Promise 1 on a real model: quiet, crowded, in chunks, preempted — the same tokens and the same logprobs."""

import pytest

from kvarn.config import SpeculativeConfig
from kvarn.engine import LLM
from kvarn.request import SamplingParams

QUESTIONS = [
    "Why is the sky blue?", "Name three rivers.", "What is a mill?", "Write a haiku about rain.", "What is 7 times 8?",
    "Who wrote Hamlet? " * 20,
]  # fmt: skip
SAMPLING = [
    SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=0.8, seed=11, top_p=0.95, max_tokens=24, ignore_eos=True, logprobs=2),
]


def answers(path, **settings):
    """(tokens, logprobs) of every question under both kinds of sampling, asked one by one or all at once."""
    one_by_one = settings.pop("one_by_one", False)
    with LLM(str(path), **settings) as llm:
        prompts = [llm.tokenizer.encode_chat([{"role": "user", "content": q}]) for q in QUESTIONS]
        asked = [(prompt, sampling) for sampling in SAMPLING for prompt in prompts]
        if one_by_one:
            completions = [llm.generate([prompt], sampling)[0] for prompt, sampling in asked]
        else:
            completions = llm.generate([p for p, _ in asked], [s for _, s in asked])
        return [(c.token_ids, c.choices[0].logprobs) for c in completions], llm.stats()


@pytest.mark.e2e
def test_the_same_answers_whoever_else_asks(smollm2_path):
    quiet, _ = answers(smollm2_path, one_by_one=True, num_blocks=64)
    crowded, _ = answers(smollm2_path, num_blocks=512)
    assert crowded == quiet
    squeezed, stats = answers(smollm2_path, num_blocks=24, max_num_batched_tokens=24, max_num_seqs=12)
    assert stats.preemptions > 0
    assert squeezed == quiet


@pytest.mark.e2e
def test_the_same_answers_with_tokens_guessed_ahead(smollm2_path):
    quiet, _ = answers(smollm2_path, one_by_one=True, num_blocks=64)
    for k in (4, None):
        guessed, stats = answers(smollm2_path, num_blocks=512, speculative=SpeculativeConfig(k=k))
        assert guessed == quiet
        assert (stats.accepted_tokens > 0) or k is None
    squeezed, stats = answers(
        smollm2_path, num_blocks=24, max_num_batched_tokens=48, max_num_seqs=12, speculative=SpeculativeConfig(k=4)
    )
    assert stats.preemptions > 0 and stats.accepted_tokens > 0
    assert squeezed == quiet


@pytest.mark.e2e
def test_the_same_answers_with_a_draft_model_that_is_always_right(smollm2_path):
    """The model guesses for itself: in chunks and after preemptions too its own keys and values are the same."""
    quiet, _ = answers(smollm2_path, one_by_one=True, num_blocks=64)
    squeezed, stats = answers(
        smollm2_path, num_blocks=16, max_num_batched_tokens=48, max_num_seqs=12,
        speculative=SpeculativeConfig("draft", k=4, model=str(smollm2_path)),
    )  # fmt: skip
    assert squeezed == quiet
    assert stats.preemptions > 0
    assert stats.accepted_tokens == stats.draft_tokens > 100
