"""A real model on the reference back-end says what another engine says of it."""

import numpy as np
import pytest
from logits import step

from kvarn.backends import KvCacheSpec, StepLimits
from kvarn.backends.reference import ReferenceBackend
from kvarn.models import load_model
from kvarn.text import load_tokenizer
from kvarn.weights import open_model


@pytest.mark.e2e
def test_smollm2_goes_on_as_llama_cpp_does_on_dequantized_weights(smollm2_path):
    """llama.cpp's greedy tokens of the same file with all weights stored in float32, so that it quantizes nothing."""
    with open_model(smollm2_path) as files:
        model, tokenizer = load_model(files), load_tokenizer(files)
        executable = ReferenceBackend().load(
            model.program, model.weights, KvCacheSpec(2, 16, "float32"), StepLimits(16, 1, 32)
        )
        ids = tokenizer.encode("The capital of France is")
        start, new = 0, []
        while len(new) < 8:
            logits = step(executable, [(np.array(ids[start:]), start)], [[0, 1]])
            start = len(ids)
            new.append(int(logits[-1].argmax()))
            ids.append(new[-1])
        assert tokenizer.decode(new) == " Paris.\n\nThe answer is:"
