"""Every way to write a product of two activations has one canonical form that gives the same result."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.sites.forms import MatmulForm, has_unit_length


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


@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 5))
def test_unit_vectors_are_brought_to_a_root_mean_square_of_one_and_back(m: int, k: int, n: int) -> None:
    a, b = F.normalize(torch.randn(2, m, k), dim=-1), F.normalize(torch.randn(2, n, k), dim=-1)
    for form, right in (
        (MatmulForm("matmul", to_rms=True), b.mT),
        (MatmulForm("baddbmm", to_rms=True), b.mT),
        (MatmulForm("einsum", "bmk,bnk->bnm", to_rms=True), b),
    ):
        operands = (torch.ones(2, m, n), a, right)[-3 if form.op == "baddbmm" else -2 :]
        left, canonical = form.canonical(*operands)
        torch.testing.assert_close(left.square().mean(-1), torch.ones(2, m))
        torch.testing.assert_close(canonical.square().mean(-2), torch.ones(2, n))
        torch.testing.assert_close(_through(form, *operands), form.original(*operands))


def test_unit_length_is_asked_of_every_vector() -> None:
    x = F.normalize(torch.randn(2, 3, 50), dim=-1)
    assert has_unit_length(x, -1)
    assert has_unit_length(x.mT, -2)
    assert not has_unit_length(x, -2)
    x[1, 2] *= 1.01
    assert not has_unit_length(x, -1)
    assert not has_unit_length(x.to("meta"), -1)
    assert not has_unit_length(x[:0], -1)
