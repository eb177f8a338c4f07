"""Keys and values into the cache: each type gives back what the reference says, and nothing else is written."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvarn.backends.cuda.kernels.kv_write import KV_DTYPES, LayerKv, kv_torch_dtype, kv_write
from kvarn.backends.reference import functions as f
from kvarn.errors import ConfigError

SLOTS = [7, 0, -1, 30]


def written(device, stored, keys, values):
    """A cache of 32 slots with two heads, poisoned, with the vectors in `SLOTS`."""
    kv = LayerKv.empty(32, 2, keys.shape[2], values.shape[2], stored, device)
    for tensor in (kv.keys, kv.values, kv.key_scales, kv.value_scales):
        if tensor is not None:
            tensor.view(torch.uint8).fill_(0x55)
    slots = torch.tensor([[0, slot] for slot in SLOTS], device=device)[:, 1]
    kv_write(keys.to(device), values.to(device), slots, kv)
    return kv


def given_back(cache, scales):
    x = cache.float() if scales is None else cache.float() * scales[..., None]
    return x.cpu().numpy()


def as_stored(x, stored):
    if stored in ("float16", "float32", "int8"):
        return f.stored_vectors(x, stored)
    dtype = KV_DTYPES[stored]
    limit = torch.finfo(dtype).max
    return torch.from_numpy(x).clamp(-limit, limit).to(dtype).float().numpy()


@pytest.mark.parametrize("stored", KV_DTYPES)
def test_vectors_come_back_as_the_type_holds_them(stored, device):
    generator = np.random.default_rng(1)
    keys, values = (generator.standard_normal((4, 2, dim)).astype(np.float32) * 3 for dim in (20, 12))
    keys[0, 0] *= 1e-3
    keys[1, 1] = 0
    values[3, 0, :2] = 1e30, -1e30
    kv = written(device, stored, torch.from_numpy(keys), torch.from_numpy(values))
    kept = [row for row, slot in enumerate(SLOTS) if slot >= 0]
    for cache, scales, x in ((kv.keys, kv.key_scales, keys), (kv.values, kv.value_scales, values)):
        got = given_back(cache, scales)
        np.testing.assert_array_equal(got[[SLOTS[row] for row in kept]], as_stored(x, stored)[kept])


def test_other_slots_are_left_alone(device):
    kv = written(device, "int8", torch.ones(4, 2, 20), torch.ones(4, 2, 12))
    others = [slot for slot in range(32) if slot not in SLOTS]
    for tensor in (kv.keys, kv.values, kv.key_scales, kv.value_scales):
        assert (tensor[others].view(torch.uint8) == 0x55).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_activations_may_be_a_slice_of_a_wider_row(dtype, device):
    rows = torch.randn(4, 2 * 20 + 2 * 12 + 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    keys, values = rows[:, :40].unflatten(1, (2, 20)), rows[:, 40:64].unflatten(1, (2, 12))
    kv = written(device, "float32", keys, values)
    assert torch.equal(kv.keys[[7, 0, 30]].cpu(), keys[[0, 1, 3]].float())
    assert torch.equal(kv.values[[7, 0, 30]].cpu(), values[[0, 1, 3]].float())


def test_a_type_that_the_card_does_not_have_is_refused_by_name():
    with pytest.raises(ConfigError, match="one of float16, bfloat16, float32, int8, fp8_e4m3 on cuda, not 'int4'"):
        kv_torch_dtype("int4")


def test_vectors_of_another_size_are_refused(device):
    kv = LayerKv.empty(32, 2, 24, 12, "float16", device)
    with pytest.raises(ValueError, match="2 vectors of 20 elements a token do not fit"):
        kv_write(torch.ones(4, 2, 20), torch.ones(4, 2, 12), torch.arange(4), kv)
