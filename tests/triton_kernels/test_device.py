"""Device functions whose numbers everything else stands on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from harmoq_ao.triton_kernels.device import GELU_ERROR, float_codes, gelu


@triton.jit
def gelu_kernel(x_ptr: tl.tensor, out_ptr: tl.tensor, KIND: tl.constexpr, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, gelu(tl.load(x_ptr + at), KIND))


@triton.jit
def product_kernel(left_ptr: tl.tensor, right_ptr: tl.tensor, out_ptr: tl.tensor, K: tl.constexpr) -> None:
    rows, columns, terms = tl.arange(0, 16), tl.arange(0, 16), tl.arange(0, K)
    left = float_codes(tl.load(left_ptr + rows[:, None] * K + terms[None, :]).to(tl.float32), 8)
    right = float_codes(tl.load(right_ptr + terms[:, None] * 16 + columns[None, :]).to(tl.float32), 8)
    element = out_ptr.dtype.element_ty
    acc = tl.dot(left.to(tl.bfloat16), right.to(tl.bfloat16))
    tl.store(out_ptr + rows[:, None] * 16 + columns[None, :], acc.to(element))


@pytest.mark.parametrize("kind", ["erf", "tanh"])
def test_gelu_is_as_close_as_stated(kind: str) -> None:
    far = torch.tensor([1e4, -1e4, 3e38, -3e38, float("inf"), 0.0, -0.0, 1e-40])
    x = torch.cat([torch.linspace(-8, 8, 2**16 - len(far)), far])
    y = torch.empty_like(x)
    gelu_kernel[(16,)](x, y, KIND=kind, BLOCK=2**12)
    expected = F.gelu(x.double(), approximate="tanh" if kind == "tanh" else "none")
    error = (y.double() - expected)[expected.isfinite()].abs() - x[expected.isfinite()].abs() * 2.0**-24
    assert error.max() <= GELU_ERROR
    assert error.max() >= GELU_ERROR / 2  # a bound that says something
    assert y[-4] == float("inf")


@pytest.mark.parametrize("terms", [16, 256])
def test_sums_of_products_of_codes_are_exact_in_sixteen_bit_floats(terms: int) -> None:
    generator = torch.Generator().manual_seed(terms)
    left = torch.randint(0, 256, (16, terms), generator=generator, dtype=torch.uint8)
    right = torch.randint(0, 256, (terms, 16), generator=generator, dtype=torch.uint8)
    left[0], right[:, 0] = 255, 255  # the largest sum there is: 256 * 255 * 255 < 2**24
    out = torch.empty(16, 16)
    product_kernel[(1,)](left, right, out, K=terms)
    assert torch.equal(out.long(), left.long() @ right.long())
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(torch.arange(256).to(dtype).long(), torch.arange(256))
