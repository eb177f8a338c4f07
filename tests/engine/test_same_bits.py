"""Promise 1: on the CPU a sequence's logits are the same bits, whoever else runs and however it is computed."""

import pytest
from tiny_engine import RecordingSampler, handmade_engine, request, run_core, tokens_of

from kvarn.tensors import DType

PROMPT = "The mill stands by the river, and the river turns the wheel, day and night."
OTHERS = [f"{i}: {'lorem ipsum ' * i}" for i in range(1, 8)]
MODELS = [
    ("llama", DType.F32),
    ("llama", DType.Q4_0),
    ("qwen3", DType.Q8_0),
    ("gemma3_text", DType.Q4_1),
    ("gpt2", DType.F16),
]


def run(requests, *, model=MODELS[0], **settings):
    """Runs the requests; returns logits of every sampled token as bytes, tokens by request, and statistics."""
    recorders = []

    def record(sampler):
        recorders.append(RecordingSampler(sampler))
        return recorders[0]

    core = handmade_engine(family=model[0], stored=model[1], wrap_sampler=record, **settings).core
    outputs = run_core(core, requests)
    stats = core.stats()
    core.close()
    return recorders[0].logits, {name: tokens_of(o) for name, o in outputs.items()}, stats


@pytest.fixture(params=MODELS, ids=lambda m: f"{m[0]}-{m[1].name}")
def model(request):
    return request.param


@pytest.fixture
def alone(model):
    """The logits of one greedy request that has the engine to itself, its prompt computed in one step."""
    logits, tokens, _ = run([request("a", PROMPT, max_tokens=40)], model=model, max_num_batched_tokens=128)
    assert len(logits) == len(tokens["a"]) == 40
    return logits, tokens["a"]


def test_alone_or_in_a_crowd(model, alone):
    crowd = [request(f"other {i}", text, max_tokens=5 * i + 1) for i, text in enumerate(OTHERS)]
    crowd.insert(4, request("a", PROMPT, max_tokens=40))
    logits, tokens, _ = run(crowd, model=model, max_num_batched_tokens=128)
    assert tokens["a"] == alone[1]
    assert {key: logits[key] for key in alone[0]} == alone[0]


@pytest.mark.parametrize("budget", [8, 13, 32])
def test_a_prompt_in_chunks_or_whole(model, alone, budget):
    logits, tokens, stats = run([request("a", PROMPT, max_tokens=40)], model=model, max_num_batched_tokens=budget)
    assert stats.steps == -(-len(PROMPT) // budget) + 39 + 1, "the last step tells the runner of the end"
    assert tokens["a"] == alone[1]
    assert logits == alone[0]


def test_preempted_or_not(model, alone):
    pair = [request("first", OTHERS[3], max_tokens=50), request("a", PROMPT, max_tokens=40)]
    num_blocks = 18 if model[0] == "gemma3_text" else 10  # of one of its two layers each
    logits, tokens, stats = run(pair, model=model, num_blocks=num_blocks, max_model_len=160)
    assert stats.preemptions > 0
    assert tokens["a"] == alone[1]
    assert {key: logits[key] for key in alone[0]} == alone[0]


def test_with_the_cache_or_computing_everything_anew(model, alone):
    logits, expected = alone
    prompt = tuple(PROMPT.encode())
    anew = [request(str(n), prompt + tuple(expected[:n]), max_tokens=1) for n in range(0, 40, 3)]
    again, tokens, _ = run(anew, model=model, max_num_batched_tokens=128, prefix_caching=False)
    for n in range(0, 40, 3):
        assert tokens[str(n)] == [expected[n]]
        position = len(prompt) + n
        assert again[(0, prompt + tuple(expected[:n]), position)] == logits[(0, prompt, position)]


def test_forked_or_alone(model, alone):
    logits, _, _ = run([request("a", PROMPT, max_tokens=40, n=4)], model=model)
    for stream in range(4):
        for (_, prompt, position), row in alone[0].items():
            assert logits[(stream, prompt, position)] == row


def test_on_one_thread_or_two(model, alone):
    """Threads split rows and tiles, never sums."""
    logits, _, _ = run([request("a", PROMPT, max_tokens=40)], model=model, max_num_batched_tokens=128, threads=2)
    assert logits == alone[0]


def test_the_reference_says_the_same_tokens():
    requests = [request(str(i), text, max_tokens=20) for i, text in enumerate([PROMPT, *OTHERS])]
    _, expected, _ = run(requests, backend="reference", dtype="float32")
    _, tokens, _ = run(requests, dtype="float32")
    assert tokens == expected
