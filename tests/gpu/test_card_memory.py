"""What the CUDA back-end takes of a card is what it said before, through loading and all kinds of steps."""

import dataclasses

import numpy as np
import pytest
import torch
from card_models import BLOCK, LIMITS, card
from live_bytes import LiveBytes
from op_programs import groups_of, ragged

from kvarn.backends import KvCacheSpec, MemoryUse, StepLimits
from kvarn.backends.cuda.libraries import allocated_bytes
from kvarn.backends.cuda.memory import aligned
from kvarn.request import SamplingParams
from kvarn.sampling import RuleBook
from kvarn.step import NewSequence
from kvarn.tensors import DType
from kvarn.testing.models import tiny_model

WITHIN = 0.05
SMALL_STEPS = StepLimits(max_num_tokens=24, max_num_sequences=4, max_model_len=64)


def planned(backend, model, spec, limits):
    dtypes = {weight.name: model.tensor(weight.name).dtype for weight in model.program.weights}
    return backend.memory_use(model.program, dtypes, spec, limits)


def held(executable):
    """Of all tensors that an executable holds, each as the allocator rounds it."""
    parts = executable._open()
    weights = [*parts.weights.vectors.values()]
    for matrix in parts.weights.matrices.values():
        values = (getattr(matrix, field.name) for field in dataclasses.fields(matrix))
        weights += [value for value in values if torch.is_tensor(value)]
    unique = {tensor.data_ptr(): tensor for tensor in weights}
    return MemoryUse(
        weights=sum(aligned(tensor.nbytes) for tensor in unique.values()),
        tables=sum(aligned(table.nbytes) for table in parts.tables.values()),
        kv_cache=parts.cache.nbytes,
        activations=executable._plans.main.frame.nbytes + aligned(parts.scratch.nbytes)
        + aligned(executable.step_buffers.nbytes),
    )  # fmt: skip


@pytest.mark.parametrize("weights", ["dense", "stored", "int4", "int8", "fp8"])
@pytest.mark.parametrize(
    ("family", "sizes"), [("gemma3_text", {"hidden_size": 320}), ("gpt2", {"n_embd": 320}), ("qwen2", {})]
)
def test_what_is_held_is_what_was_planned(device, family, sizes, weights):
    """Wide enough that a vector's type shows in whole pieces of the allocator."""
    model = tiny_model(family, dtype=DType.Q8_0, **sizes)
    backend = card(device, "bfloat16", weights)
    spec = KvCacheSpec(4 * groups_of(model), BLOCK, "int8")
    said = planned(backend, model, spec, LIMITS)
    executable = backend.load(model.program, model, spec, LIMITS)
    assert executable.memory() == said
    assert held(executable) == dataclasses.replace(said, parts=())
    tokens = next(part for part in said.parts if part.name == "choice of tokens")
    assert aligned(executable._on_card.chooser.nbytes) == tokens.num_bytes
    executable.close()


def every_kind_of_step(executable):
    """Prompts and decodes, with rules of all kinds."""
    vocab, limits = executable.program.vocab_size, executable.limits
    book = RuleBook(vocab)
    for number in range(limits.max_num_sequences):
        params = SamplingParams(
            temperature=0.0, repetition_penalty=1.2, allowed_token_ids=tuple(range(number, vocab, 2))
        )
        book.add(NewSequence(number, tuple(range(vocab)), params, number, 0))
    count, groups = limits.max_num_sequences, groups_of(executable)
    each = limits.max_num_tokens // count
    per = each // BLOCK + 1
    tables = [range(number * per, (number + 1) * per) for number in range(count)]
    outputs = [each * (number + 1) - 1 for number in range(count)]
    prompts = ragged([(range(each), 0)] * count, tables=tables, outputs=outputs, num_groups=groups)
    decodes = ragged([([1], each)] * count, tables=tables, num_groups=groups)
    executable.execute(prompts)
    previous = np.full(count * each, -1, np.int32)
    executable.submit(prompts, book.of(range(count), [each] * count), previous)
    rules = book.of(range(count), [each + 1] * count, list(range(count)))
    executable.submit(decodes, rules, np.arange(count, dtype=np.int32))
    executable.collect()
    executable.collect()


def all_that_is_done_with_blocks(executable):
    """Copies of many, moves of all slots, one to the host and back."""
    blocks = executable.kv.num_blocks
    executable.copy_blocks([(block, block + blocks // 2) for block in range(blocks // 2)])
    executable.move_slots([(slot, slot + 1) for slot in range(blocks * BLOCK - 1)])
    data = np.zeros(executable.block_bytes, np.uint8)
    executable.read_block(0, data)
    executable.write_block(1, data)


@pytest.mark.parametrize(("weights", "kv"), [("int4", "int8"), ("fp8", "bfloat16")])
def test_the_most_that_lives_is_what_was_planned(device, weights, kv):
    """Counted tensor by tensor, in the interpreter: little weights and cache, so that all else shows."""
    if device != "cpu":
        pytest.skip("a card's allocator counts by itself")
    model = tiny_model("llama", num_hidden_layers=1, vocab_size=300, tie_word_embeddings=False)
    backend = card(device, "float32", weights)
    spec = KvCacheSpec(32, BLOCK, kv)
    said = planned(backend, model, spec, SMALL_STEPS)
    with LiveBytes() as live:
        executable = backend.load(model.program, model, spec, SMALL_STEPS)
        loaded, loading = live.now, live.most
        live.most = 0
        every_kind_of_step(executable)
        assert live.most == loaded, "a step allocates"
        all_that_is_done_with_blocks(executable)
    hosts = [*executable.step_buffers._hosts, *executable._on_card._read]
    on_host = sum(aligned(tensor.nbytes) for tensor in hosts)  # pinned, where there is a card
    later = sum(part.num_bytes for part in said.parts if part.name == "copies of blocks")
    assert loaded - on_host == said.total - later
    most, beside = live.most - on_host, said.weights + said.tables + said.kv_cache
    assert most <= said.total
    assert most - beside == pytest.approx(said.total - beside, rel=WITHIN)
    widest = 4 * max(weight.num_elements for weight in model.program.weights)
    assert loading - said.weights <= 6 * widest  # as `weights.PIECE_BYTES` counts on, where matrices are large
    executable.close()


@pytest.mark.gpu
def test_the_cards_peak_is_what_was_planned(device):
    """Within 5 %, of a model of 500 MB: loading, steps of all kinds, and many decodes. Graphs are not torch's."""
    if device != "cuda":
        pytest.skip("needs a card")
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "vocab_size": 32000}
    model = tiny_model("llama", dtype=DType.BF16, num_attention_heads=16, num_key_value_heads=4, **sizes)
    limits = StepLimits(1024, 16, 512)
    spec = KvCacheSpec(512, BLOCK, "float16")
    backend = card(device, "bfloat16")
    said = planned(backend, model, spec, limits)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    executable = backend.load(model.program, model, spec, limits)
    every_kind_of_step(executable)
    all_that_is_done_with_blocks(executable)
    for _ in range(8):
        executable.execute(ragged([([1], 100)] * 16))
    peak = torch.cuda.max_memory_allocated() - before
    executable.close()
    assert peak == pytest.approx(allocated_bytes(said), rel=WITHIN)
