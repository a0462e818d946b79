"""Every way to write a product of two activations has one canonical form that gives the same result."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.sites.forms import MatmulForm


def _through(form: MatmulForm, *operands: Tensor, **options: float) -> Tensor:
    left, right = form.canonical(*operands)
    return form.finish(left @ right, *operands, **options)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
def test_plain_products_are_their_own_canonical_form(batch: int, m: int, k: int, n: int) -> None:
    a, b = torch.randn(batch, m, k), torch.randn(batch, k, n)
    for op in ("matmul", "bmm"):
        form = MatmulForm(op)
        assert torch.equal(_through(form, a, b), form.original(a, b))
    assert torch.equal(_through(MatmulForm("mm"), a[0], b[0]), a[0] @ b[0])


@given(st.floats(-2, 2), st.floats(-2, 2))
def test_baddbmm_adds_its_first_operand(beta: float, alpha: float) -> None:
    base, a, b = torch.randn(1, 3, 5), torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    form = MatmulForm("baddbmm")
    expected = form.original(base, a, b, beta=beta, alpha=alpha)
    torch.testing.assert_close(_through(form, base, a, b, beta=beta, alpha=alpha), expected)


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("bmk,bkn->bmn", (2, 3, 4), (2, 4, 5)),
        ("bmk,bnk->bmn", (2, 3, 4), (2, 5, 4)),
        ("bkm,bkn->bnm", (2, 4, 3), (2, 4, 5)),
        ("bhid,bhjd->bhij", (2, 3, 4, 5), (2, 3, 6, 5)),
        ("b i h d, b j h d -> b h i j", (2, 4, 3, 5), (2, 6, 3, 5)),
    ],
)
def test_einsums_equal_their_canonical_product(equation: str, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    form = MatmulForm("einsum", equation)
    a, b = torch.randn(left), torch.randn(right)
    torch.testing.assert_close(_through(form, a, b), form.original(a, b))
