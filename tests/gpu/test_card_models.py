"""Whole tiny models: the CUDA back-end says what the reference back-end says."""

import numpy as np
import pytest
import torch
from card_models import assert_near, card, load, run
from op_programs import ragged

from kvarn.backends import StepLimits
from kvarn.backends.cuda import bind
from kvarn.backends.reference import ReferenceBackend
from kvarn.backends.trees import with_trees
from kvarn.tensors import DType
from kvarn.testing.models import SETTINGS, tiny_model

SMALL = {"num_hidden_layers": 1, "vocab_size": 300}
IDS = [int(token) for token in np.random.default_rng(7).integers(0, 256, 60)]
TABLES = [[5, 2, 7], [1, 6, 0]]


def both(device, model, steps, kv="float32", share=1e-5, **settings):
    """Runs the same steps on both back-ends and compares each."""
    executables = [load(backend, model, kv) for backend in (card(device, **settings), ReferenceBackend())]
    for parts, tables, more in steps:
        got, wanted = (run(executable, parts, tables, **more) for executable in executables)
        assert_near(got, wanted, share)
    for executable in executables:
        executable.close()


RAGGED = [
    ([(IDS[:18], 0), (IDS[20:23], 0)], TABLES, {}),
    ([(IDS[18:19], 18), (IDS[23:27], 3)], TABLES, {}),
    ([(IDS[19:20], 19)], TABLES[:1], {}),
]
"""Two prompts in scattered blocks; a decode beside a chunk; a decode alone."""
SHORT = [([(IDS[:4], 0), (IDS[4:5], 0)], TABLES, {}), ([(IDS[5:6], 4)], TABLES[:1], {})]
"""The same with as little as shows what a type or a form does."""
WINDOWS = {"mistral": {"sliding_window": 5}, "gemma3_text": {"sliding_window": 5, "num_hidden_layers": 2}}
"""Five tokens; of Gemma's two layers one has such a window."""


@pytest.mark.parametrize("family", SETTINGS)
def test_every_family(device, family):
    both(device, tiny_model(family, **{**SMALL, **WINDOWS.get(family, {})}), RAGGED)


@pytest.mark.parametrize(("kv", "share"), [("float16", 2e-3), ("int8", 2e-2)])
def test_stored_types_of_the_cache(device, kv, share):
    both(device, tiny_model("qwen3", **SMALL), SHORT, kv=kv, share=share)


@pytest.mark.parametrize(("kv", "share"), [("bfloat16", 2e-2), ("fp8_e4m3", 0.2)])
def test_types_of_the_cache_that_only_cards_have(device, kv, share):
    model = tiny_model("llama", **SMALL)
    ours, reference = load(card(device), model, kv), load(ReferenceBackend(), model)
    for parts, tables, _ in SHORT:
        assert_near(run(ours, parts, tables), run(reference, parts, tables), share)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_types_that_are_computed_in(device, dtype):
    """Eight bits of fraction, or eleven."""
    both(device, tiny_model("llama", **SMALL), SHORT, share=4e-2 if dtype == "bfloat16" else 6e-3, dtype=dtype)


@pytest.mark.parametrize("stored", [DType.Q8_0, DType.Q4_K])
def test_quantized_files_keep_their_values(device, stored):
    wide = {"hidden_size": 256, "intermediate_size": 256} if stored.block_size > 32 else {}
    both(device, tiny_model("llama", dtype=stored, **SMALL, **wide), SHORT, weights="stored")


@pytest.mark.parametrize(("form", "share"), [("int8", 0.05), ("fp8", 0.15), ("int4", 0.4)])
def test_forms_that_lose_something_lose_little(device, form, share):
    both(device, tiny_model("llama", **SMALL), SHORT, weights=form, share=share)


def test_trees_of_drafts(device):
    """Branches behind known tokens, across a window's end, beside a decode."""
    model = tiny_model("mistral", **SMALL, sliding_window=5)
    executables = [load(backend, model) for backend in (card(device), ReferenceBackend())]
    for executable in executables:
        run(executable, [(IDS[:12], 0), (IDS[:3], 0)], TABLES)
    plain = ragged([(IDS[12:22], 12), (IDS[3:4], 3)], tables=TABLES)
    batch = with_trees(plain, [(-1, 0, -1, 1, 2, 2, 3, 0), ()])
    got, wanted = (executable.execute(batch)["logits"].copy() for executable in executables)
    assert_near(got, wanted)
    for executable in executables:
        executable.close()


def test_outputs_by_name(device):
    """Those asked for at load come without asking; others cost a plan of their own, and change nothing."""
    model = tiny_model("gemma3_text", **SMALL)
    names = sorted({buffer.name for buffer in model.program.buffers} - {"logits"})
    limits = StepLimits(16, 2, 64, 14, outputs=("x",))
    ours, reference = (load(backend, model, limits=limits) for backend in (card(device), ReferenceBackend()))
    batch = ragged([(IDS[:9], 0)], outputs=[3, 8])
    plain = {name: values.copy() for name, values in ours.execute(batch).items()}
    assert set(plain) == {"logits", "x"}
    got, wanted = ours.execute(batch, names), reference.execute(batch, names)
    assert set(got) == {"logits", *names}
    for name in wanted:
        assert_near(got[name], wanted[name])
    for name in plain:
        np.testing.assert_array_equal(plain[name], got[name])
    with pytest.raises(ValueError, match="no buffer 'z'"):
        ours.execute(batch, ["z"])


def test_sums_are_float32_in_a_step_and_as_they_were_after_it(device, monkeypatch):
    blas = torch.backends.cuda.matmul

    def rounded():
        return blas.allow_bf16_reduced_precision_reduction, blas.allow_fp16_reduced_precision_reduction

    executable, found = load(card(device), tiny_model("llama", **SMALL)), []
    monkeypatch.setattr(bind, "linear", lambda *_: found.append(rounded()))
    before = rounded()
    run(executable, [(IDS[:3], 0)], TABLES[:1])
    assert set(found) == {(False, False)} and rounded() == before == (True, True)


def test_a_step_may_need_no_logits(device):
    model = tiny_model("qwen3", **SMALL)
    both(device, model, [([(IDS[:9], 0)], TABLES[:1], {"outputs": []}), ([(IDS[9:10], 9)], TABLES[:1], {})])
