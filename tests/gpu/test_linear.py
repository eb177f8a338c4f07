"""Products with weights of every form, against NumPy: over shapes that fill no tile, with one row and with several."""

import numpy as np
import pytest
import torch
from linears import FORMS, largest_error, make

from kvarn.backends.cuda.kernels.fp8 import quantize_rows
from kvarn.backends.cuda.kernels.linear import dense_gemv, linear, linear_tiles, workspace_bytes
from kvarn.backends.cuda.kernels.tiles import largest_workspace, product_workspace
from kvarn.backends.cuda.packing import Fp8

ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-17}
"""Of a result, and of a weight that tensor cores take."""


def poisoned(rows, columns, dtype, device, room=3):
    """(out, whole): a view of some columns of a larger tensor; all of it NaN."""
    whole = torch.full((rows, columns + room), float("nan"), dtype=dtype, device=device)
    return whole[:, 1 : 1 + columns], whole


def shapes(form, tokens, seed):
    random = np.random.default_rng([seed, tokens, FORMS.index(form)])
    step = int(form.split("-")[1]) if form.startswith("int8-") else 1
    return int(random.integers(1, 90)), step * int(random.integers(2, max(3, 420 // step)))


@pytest.mark.parametrize("tokens", [1, 2, 17, 33, 70])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_against_numpy(form, tokens, device):
    rows, width = shapes(form, tokens, seed=1)
    torch.manual_seed(rows * width)
    dtype, out_dtype = [
        (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)
    ][(rows + width) % 3]  # fmt: skip
    weight = make(form, rows, width, device)
    x = torch.randn((tokens, width + 5), device=device).to(dtype)[:, :width]
    bias = torch.randn(rows, device=device).to(dtype) if width % 2 else None
    out, whole = poisoned(tokens, rows, out_dtype, device)
    assert linear(x, weight, bias, out) is out
    if isinstance(weight, Fp8) and tokens > 16:
        x = rounded_to_fp8(x)
    weight_rounding = ROUNDING[dtype] if tokens > 1 else 0
    assert largest_error(out, x, weight, bias) < weight_rounding + ROUNDING[out_dtype]
    assert whole[:, 0].isnan().all() and whole[:, 1 + rows :].isnan().all(), "wrote past the output"


def rounded_to_fp8(x):
    """Rows as FP8 with one scale each hold them, by torch's own conversion."""
    scales = x.float().abs().amax(1, keepdim=True) / 448
    return (x.float() / scales).to(torch.float8_e4m3fn).float() * scales


@pytest.mark.parametrize("form", ["int4-32", "int4-128-symmetric", "int8", "int8-32-offsets", "fp8"])
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_shares_of_k(form, tokens, device):
    """Long rows are cut into shares; the workspace may hold anything, and the result is the same each time."""
    torch.manual_seed(tokens)
    weight = make(form, 21, 4160, device)
    tiles = linear_tiles(weight, tokens)
    assert tiles.shares > 1
    x = torch.randn((tokens, weight.width), device=device).half()
    bias = torch.randn(weight.rows, device=device).half()
    needed = workspace_bytes(weight, tokens)
    workspace = torch.full((needed + 100,), 255, dtype=torch.uint8, device=device)
    out, _ = poisoned(tokens, weight.rows, torch.float32, device)
    linear(x, weight, bias, out, workspace)
    assert (workspace[needed:] == 255).all(), "wrote past the workspace"
    seen = rounded_to_fp8(x) if isinstance(weight, Fp8) and tokens > 16 else x
    assert largest_error(out, seen, weight, bias) < ROUNDING[torch.float16]
    again = torch.empty_like(out)
    linear(x, weight, bias, again)
    assert torch.equal(out, again)


def test_a_dense_weight_and_one_row(device):
    torch.manual_seed(3)
    for rows, width, dtype in ((37, 200, torch.bfloat16), (5, 2312, torch.float16)):
        weight = make("dense", rows, width, device, dtype)
        x, bias = torch.randn((1, width), device=device).to(dtype), torch.randn(rows, device=device).to(dtype)
        for multiply in (lambda x, w, b, out: dense_gemv(x, w.weight, b, out), linear):
            out, whole = poisoned(1, rows, dtype, device)
            multiply(x, weight, bias, out)
            assert largest_error(out, x, weight, bias) < ROUNDING[dtype]
            assert whole[:, 0].isnan().all() and whole[:, 1 + rows :].isnan().all()
    wide = torch.empty((1, rows), dtype=torch.float32, device=device)
    assert largest_error(linear(x, weight, None, wide), x, weight, None) < ROUNDING[torch.float32]


def test_activations_become_the_nearest_fp8(device):
    torch.manual_seed(4)
    x = torch.randn((5, 300), device=device) * torch.logspace(-6, 3, 300, device=device)
    x[2] = 0
    x[3] = -x[3].abs()
    x[4] = torch.linspace(-448, 448, 300, device=device)
    x[4, 17:20] = torch.tensor([2**-10, 12.5, 13.5], device=device)  # ties: below normal numbers, and two among them
    codes = torch.full((5, 304), 255, dtype=torch.uint8, device=device)
    scales = torch.empty(5, device=device)
    quantize_rows(x, codes, scales)
    torch.testing.assert_close(scales, x.abs().amax(1) / 448)
    expected = (x / torch.where(scales > 0, scales, 1)[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(codes[:, :300].view(torch.float8_e4m3fn).float(), expected.float())
    assert not codes[:, 300:].any()


def test_every_code_of_fp8_by_its_bits(device, monkeypatch):
    """Cards that do not know e4m3 convert it by its bits."""
    import kvarn.backends.cuda.kernels.linear as module

    codes = torch.arange(256, dtype=torch.uint8, device=device).view(2, 128)
    codes[codes & 0x7F == 0x7F] = 0  # NaN
    weight = Fp8(codes, torch.ones((2, 1), device=device), 128)
    x = torch.eye(128, device=device).half()
    wanted = codes.view(torch.float8_e4m3fn).float().t()
    for knows in (True, False):
        monkeypatch.setattr(module, "_converts_e4m3", lambda device, knows=knows: knows)
        for tokens in (1, 16):
            out = torch.empty((tokens, 2), device=device)
            linear(x[100 : 100 + tokens], weight, None, out)
            assert torch.equal(out, wanted[100 : 100 + tokens])
    out = torch.empty((128, 2), device=device)
    assert torch.equal(linear(x, weight, None, out), wanted), "many rows stay 16-bit where the card has no FP8"


def test_no_rows(device):
    weight = make("int4-32", 8, 64, device)
    out = torch.empty((0, 8), device=device)
    assert linear(torch.empty((0, 64), device=device), weight, None, out) is out


@pytest.mark.parametrize("kind", ["dense", "int4", "int8", "fp8"])
def test_the_largest_workspace_is_the_largest(kind):
    for rows, width in ((64, 4096), (6144, 4096), (300, 12000)):
        for most in (1, 5, 16, 40, 64, 90):
            sizes = [product_workspace(kind, rows, width, tokens, fp8_products=True) for tokens in range(1, most + 1)]
            assert largest_workspace(kind, rows, width, most) == max(sizes)


def test_what_does_not_fit_is_refused(device):
    weight = make("int4-32", 8, 4160, device)
    x, out = torch.zeros((1, 4160), device=device).half(), torch.zeros((1, 8), device=device).half()
    with pytest.raises(ValueError, match=r"8 rows of 4160 maps \(1, 4160\) to \(1, 8\), not \(1, 64\)"):
        linear(x[:, :64], weight, None, out)
    with pytest.raises(ValueError, match="next to one another"):
        linear(x, weight, None, torch.zeros((8, 2), device=device).half().t()[:1])
    with pytest.raises(ValueError, match="the workspace has 8 bytes, this product needs"):
        linear(x, weight, None, out, torch.zeros(8, dtype=torch.uint8, device=device))
