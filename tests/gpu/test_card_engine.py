"""The whole engine on the CUDA back-end: greedy answers are those of other back-ends, up to stated ties."""

import numpy as np
import pytest
from op_programs import ragged
from tiny_engine import request, run_core, tiny_engine, tokens_of

from kvarn.backends import KvCacheSpec, StepLimits
from kvarn.backends.cpu import CpuBackend
from kvarn.config import CudaConfig
from kvarn.models import load_model
from kvarn.testing.models import tiny_model
from kvarn.text import load_tokenizer
from kvarn.weights import open_model

TIE = 0.04
"""Logits that are nearer to one another, relative to the largest, may change places: the CPU rounds activations to 8
bits for each 32, the card keeps 8 of each. Of SmolLM2's logits any one differs by 0.035 at most so far."""


def answers(backend, **more):
    model = tiny_model("llama", num_hidden_layers=1)
    engine = tiny_engine(backend=backend, model=model, max_num_batched_tokens=24, max_num_seqs=3, **more)
    asked = [request(name, text, max_tokens=6) for name, text in (("a", "abcabc"), ("b", "x" * 30), ("c", "hello"))]
    outputs = run_core(engine.core, asked)
    engine.core.close()
    return {name: tokens_of(parts) for name, parts in outputs.items()}


def test_an_engine_of_a_tiny_model(device):
    """Prompts in chunks, decodes beside them, greedy: float32 on both."""
    assert answers("cuda", cuda=CudaConfig("float32", device=device)) == answers("reference")


@pytest.mark.gpu
@pytest.mark.e2e
@pytest.mark.parametrize("weights", ["stored", "dense"])
def test_smollm2_says_what_it_says_on_the_cpu(device, weights, smollm2_path):
    """Its greedy tokens, one after the other on the text that the CPU goes on with. Where the two differ, both logits
    must be a tie: the CPU's own logits of the two tokens differ by less than `TIE` of the largest."""
    if device != "cuda":
        pytest.skip("needs a card: the interpreter takes minutes")
    from kvarn.backends.cuda import CudaBackend

    with open_model(smollm2_path) as files:
        model, tokenizer = load_model(files), load_tokenizer(files)
        ids = tokenizer.encode("The three laws of motion say that")
        limits, spec = StepLimits(64, 1, 256), KvCacheSpec(16, 16, "float16")
        backends = (CpuBackend(), CudaBackend(CudaConfig(weights=weights)))
        cpu, card = (backend.load(model.program, model.weights, spec, limits) for backend in backends)
        given, start, ties = ids, 0, 0
        for _ in range(128):
            batch = ragged([(given, start)], outputs=[len(given) - 1])
            wanted, got = (np.array(one.execute(batch)["logits"][0]) for one in (cpu, card))
            best, said = int(wanted.argmax()), int(got.argmax())
            ties += best != said
            assert wanted[best] - wanted[said] <= TIE * np.abs(wanted).max()
            given, start = [best], start + len(given)
        assert ties <= 6
        cpu.close()
        card.close()
