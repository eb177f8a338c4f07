"""Keys and values past element 2³¹ of a cache: where 32 bits of an offset would not do.

The cache begins in the middle of memory that is as large again below it, so that an offset that wraps around is wrong
and not a crash. On a CPU only the pages are there that somebody writes to.
"""

import pytest
import torch

from kvarn.backends.cuda.kernels.attention import AttentionWorkspace, attention
from kvarn.backends.cuda.kernels.attention_plan import AttentionPlan
from kvarn.backends.cuda.kernels.kv_write import LayerKv, kv_write
from kvarn.backends.cuda.kernels.rope import Rotation, rope_kv_write

HEADS, DIM, BLOCK = 8, 128, 16
FAR = (1 << 31) // (HEADS * DIM) // BLOCK + 1
"""A block whose slots' elements are past 2³¹."""
SLOTS = (FAR + 1) * BLOCK
APART = 1 << 20
TOKENS = 3
ROTATION = Rotation(torch.ones((TOKENS, 2, DIM // 2)), True)


@pytest.fixture(scope="module")
def far(device):
    """A layer's cache of bytes with so many slots; keys and values lie apart where the far block is."""
    memory = torch.empty((1 << 31) + SLOTS * HEADS * DIM + APART, dtype=torch.uint8, device=device)
    begin = 1 << 31
    keys, values = (
        memory[start : start + SLOTS * HEADS * DIM].view(torch.float8_e4m3fn).view(SLOTS, HEADS, DIM)
        for start in (begin, begin + APART)
    )
    return LayerKv(keys, values)


def rows(device):
    """Keys and values that e4m3 has."""
    numbers = torch.randint(-8, 9, (2, TOKENS, HEADS, DIM), generator=torch.Generator().manual_seed(3))
    return numbers.to(torch.float32).to(device)


@pytest.mark.parametrize("rotated", [False, True])
def test_what_is_written_far_back_is_read_there(far, device, rotated):
    near = LayerKv.empty(2 * BLOCK, HEADS, DIM, DIM, "fp8_e4m3", device)
    keys, values = rows(device)
    positions = torch.arange(TOKENS, dtype=torch.int32, device=device)
    found = []
    for cache, block in ((near, 1), (far, FAR)):
        slots = block * BLOCK + torch.arange(TOKENS, device=device)
        if rotated:
            rotation = Rotation(ROTATION.table.to(device), True)
            flat = (TOKENS, HEADS * DIM)
            rope_kv_write(None, None, DIM, keys.view(flat), values.view(flat), cache, slots, positions, rotation)
        else:
            kv_write(keys, values, slots, cache)
        stored = [part[slots[0] : slots[-1] + 1].float() for part in (cache.keys, cache.values)]
        out = torch.zeros((TOKENS, HEADS, DIM), device=device)
        attention(
            keys / 8, cache, *(torch.tensor(n, dtype=torch.int32, device=device) for n in ([0, TOKENS], [TOKENS])),
            torch.tensor([[block]], dtype=torch.int32, device=device), AttentionPlan(1, TOKENS, TOKENS, 1),
            AttentionWorkspace.empty(1, HEADS, DIM, BLOCK, device), block_size=BLOCK, scale=0.1, out=out,
        )  # fmt: skip
        found.append([*stored, out])
    for close, distant in zip(*found, strict=True):
        assert torch.equal(close, distant)
    assert torch.equal(found[1][1], values) and (rotated or torch.equal(found[1][0], keys))
    assert found[1][2].abs().max() > 0
