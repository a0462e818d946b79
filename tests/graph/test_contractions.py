"""The batched-matmul form of einsum equations, and how much each contraction computes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from harmoq_ao.graph.contractions import contraction_macs, contraction_op, einsum_form, einsum_letters

_LABELS = "abcdefghij"


@st.composite
def _equations(draw: st.DrawFn) -> tuple[str, dict[str, int], set[str]]:
    """A random two-operand equation, the size of each label, and labels of which the right operand has only one."""
    counts = [draw(st.integers(low, high)) for low, high in ((0, 2), (0, 2), (0, 2), (1, 2))]
    labels = iter(_LABELS)
    batch, rows, columns, contracted = ("".join(next(labels) for _ in range(n)) for n in counts)
    left, right, output = (
        "".join(draw(st.permutations(list(group)))) if group else ""
        for group in (batch + rows + contracted, batch + contracted + columns, batch + rows + columns)
    )
    sizes = {c: draw(st.integers(1, 4)) for c in batch + rows + columns + contracted}
    broadcast = {c for c in batch + contracted if draw(st.integers(0, 5)) == 0}
    return f"{left},{right}->{output}", sizes, broadcast


def _operand(labels: str, sizes: dict[str, int], ones: set[str]) -> torch.Tensor:
    return torch.randn([1 if c in ones else sizes[c] for c in labels], dtype=torch.float64)


@given(_equations())
def test_einsum_form_computes_the_einsum(case: tuple[str, dict[str, int], set[str]]) -> None:
    equation, sizes, ones = case
    form = einsum_form(equation)
    assert form is not None
    a, b = _operand(form.left, sizes, set()), _operand(form.right, sizes, ones)
    left, right = form.operands(a, b)
    assert left.dim() == right.dim() == 3
    assert left.shape[0] == right.shape[0]
    assert left.shape[2] == right.shape[1]
    torch.testing.assert_close(form.result(left @ right, a, b), torch.einsum(equation, a, b), rtol=1e-12, atol=1e-12)


@given(_equations())
def test_macs_of_an_einsum_are_those_of_its_matmul(case: tuple[str, dict[str, int], set[str]]) -> None:
    equation, sizes, _ = case
    form = einsum_form(equation)
    assert form is not None
    a, b = _operand(form.left, sizes, set()), _operand(form.right, sizes, set())
    left, right = form.operands(a, b)
    assert contraction_macs("einsum", (equation, a, b), torch.einsum(equation, a, b)) == left.numel() * right.shape[-1]
    assert contraction_macs("einsum", (equation, a, b), torch.einsum(equation, a, b)) == math.prod(sizes.values())


@pytest.mark.parametrize(
    "equation",
    [
        "...ij,...jk->...ik",  # ellipsis
        "iij,jk->ik",  # diagonal of the left operand
        "ij,jkk->ik",  # ... of the right
        "ijl,jk->ik",  # l summed over in the left operand alone
        "ij,jkl->ik",  # ... in the right
        "ij,ij->ij",  # nothing contracted
        "i,j->ij",
        "ij,jk",  # implicit output
        "ij->ji",
        "ij,jk,kl->il",
    ],
)
def test_equations_without_a_form(equation: str) -> None:
    assert einsum_form(equation) is None


def test_spaces_do_not_matter() -> None:
    assert einsum_form(" b i j , b j k -> b i k ") == einsum_form("bij,bjk->bik")


def test_macs_count_every_multiplication() -> None:
    a, b = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 7, 4)
    assert contraction_macs("matmul", (a, b), a @ b) == 2 * 3 * 5 * 7 * 4
    x, w = torch.randn(2, 6, 8), torch.randn(5, 8)
    assert contraction_macs("linear", (x, w), F.linear(x, w)) == 2 * 6 * 8 * 5
    q, k, v = torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.randn(2, 7, 3)
    assert contraction_macs("sdpa", (q, k, v), F.scaled_dot_product_attention(q, k, v)) == 2 * 5 * 7 * (8 + 3)
    bias, p, q2 = torch.randn(2, 3, 5), torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    assert contraction_macs("baddbmm", (bias, p, q2), torch.baddbmm(bias, p, q2)) == 2 * 3 * 4 * 5
    image, kernel = torch.randn(1, 4, 9, 9), torch.randn(6, 2, 3, 3)
    output = F.conv2d(image, kernel, groups=2)
    assert contraction_macs("conv2d", (image, kernel), output) == 6 * 7 * 7 * 2 * 9


def test_contractions_are_recognised_however_they_are_called() -> None:
    assert contraction_op("call_method", "matmul") == "matmul"
    assert contraction_op("call_function", torch.Tensor.__matmul__) == "matmul"
    assert contraction_op("call_function", F.scaled_dot_product_attention) == "sdpa"
    assert contraction_op("call_method", "softmax") is None
    assert contraction_op("call_module", "matmul") is None
    assert contraction_op("call_function", []) is None  # unhashable


@pytest.mark.parametrize(
    ("pattern", "equation"),
    [
        ("b heads i d, b heads j d -> b heads i j", "abcd,abed->abce"),
        ("batch ... k, k n -> batch ... n", "a...b,bc->a...c"),
    ],
)
def test_words_of_einops_become_letters(pattern: str, equation: str) -> None:
    assert einsum_letters(pattern) == equation
