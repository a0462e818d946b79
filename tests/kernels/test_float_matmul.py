"""Float kernels on codes against the integer reference: codes and accumulators bit for bit, outputs up to rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.common.errors import InputError, KernelError
from harmoq_ao.kernels import float_matmul
from harmoq_ao.kernels.select import select_kernel
from harmoq_ao.quant import integer_reference
from harmoq_ao.quant.integer_reference import Affine, MatmulOperand

SEEDS = st.integers(0, 2**31)
BITS = st.integers(2, 8)
BATCHES = st.sampled_from(
    [((), ()), ((3,), ()), ((), (2,)), ((2, 1), (3,)), ((2, 3), (2, 3)), ((0,), (1,)), ((5,), (5,))]
)


def codes_of(generator: torch.Generator, bits: int, *shape: int) -> Tensor:
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)


def unit(bits: int) -> MatmulOperand:
    """A quantizer whose codes are the values, and which adds no rounding to the sums of products."""
    return MatmulOperand(bits, Affine(torch.tensor(1.0), torch.tensor(0.0), bits))


@given(
    seed=SEEDS,
    batches=BATCHES,
    m=st.integers(1, 9),
    k=st.integers(1, 600),
    n=st.integers(1, 9),
    bits=st.tuples(BITS, BITS),
)
def test_sums_of_codes_equal_the_reference(
    seed: int, batches: tuple[tuple[int, ...], tuple[int, ...]], m: int, k: int, n: int, bits: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    qa, qb = codes_of(generator, bits[0], *batches[0], m, k), codes_of(generator, bits[1], *batches[1], k, n)
    expected = integer_reference.matmul_accumulate(qa, qb).float()
    for widths in (bits, (8, 8)):
        found = float_matmul.quantized_matmul(qa.float(), qb.float(), *map(unit, widths))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("k", [258, 259, 515, 1500, 5000, 66000, 300000])
def test_long_matmuls_are_exact(bits: int, k: int) -> None:
    top = 2**bits - 1
    generator = torch.Generator().manual_seed(k)
    qa = codes_of(generator, bits, 3, k)
    qa[0], qa[1] = top, 0
    qb = qa.flip(0).t()
    contraction = float_matmul.MatmulContraction(unit(bits), unit(bits))
    run = select_kernel(contraction, torch.device("cpu"), "auto").run
    sums = run(qa.float(), qb.float())
    assert torch.equal(sums, integer_reference.matmul_accumulate(qa, qb).float())
    assert sums[0, 2] == torch.tensor(top * top * k).float()
    assert torch.equal(run(qa.float().expand(2, -1, -1), qb.float().expand(2, -1, -1)), sums.expand(2, -1, -1))


@pytest.mark.parametrize(
    ("k", "bits", "dtype"), [(258, 8, torch.float32), (259, 8, torch.float64), (74565, 4, torch.float32)]
)
def test_float32_is_used_as_long_as_it_is_exact(k: int, bits: int, dtype: torch.dtype) -> None:
    assert float_matmul.exact_dtype(k, bits, bits) == dtype


def make_operand(generator: torch.Generator, scale_shape: tuple[int, ...], bits: int, kind: str) -> MatmulOperand:
    act = Affine(torch.tensor(4.3 / (2**bits - 1)), torch.tensor(-1.9), bits) if "static" in kind else None
    scale = torch.rand(scale_shape, generator=generator) + 0.3 if "scaled" in kind else None
    return MatmulOperand(bits, act, scale)


def assert_product_is_right(
    left: Tensor, right: Tensor, a: MatmulOperand, b: MatmulOperand, tolerance: float = 1e-6
) -> None:
    """Against float64 on the reference's codes; errors are relative to the sum of the sizes of the terms."""
    found = float_matmul.quantized_matmul(left, right, a, b)
    (qa, act_a), (qb, act_b) = (
        integer_reference.quantize_operand(left, a, -1),
        integer_reference.quantize_operand(right, b, -2),
    )
    expected = (qa.double() * act_a.step + act_a.lower) @ (qb.double() * act_b.step + act_b.lower)
    size = (qa.double() * act_a.step + act_a.lower.abs()) @ (qb.double() * act_b.step + act_b.lower.abs())
    assert found.dtype == left.dtype
    assert found.shape == expected.shape
    assert ((found.double() - expected).abs() <= tolerance * size).all()
    slow = integer_reference.quantized_matmul(left, right, a, b)
    assert slow.dtype == left.dtype
    assert ((slow.double() - expected).abs() <= tolerance * size).all()


KINDS = st.sampled_from(["static", "static scaled", "per token", "per token scaled"])


@given(
    seed=SEEDS,
    batches=BATCHES,
    m=st.integers(1, 20),
    k=st.integers(1, 300),
    n=st.integers(1, 20),
    bits=BITS,
    kinds=st.tuples(KINDS, KINDS),
)
def test_quantized_matmul_equals_float64(
    seed: int,
    batches: tuple[tuple[int, ...], tuple[int, ...]],
    m: int,
    k: int,
    n: int,
    bits: int,
    kinds: tuple[str, str],
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(*batches[0], m, k, generator=generator)
    right = torch.randn(*batches[1], k, n, generator=generator)
    a, b = make_operand(generator, (k,), bits, kinds[0]), make_operand(generator, (k, 1), bits, kinds[1])
    assert_product_is_right(left, right, a, b)
    assert_product_is_right(left.bfloat16(), right.bfloat16(), a, b, 2.0**-8)


@given(seed=SEEDS, bits=BITS, kind=KINDS, right=st.booleans())
def test_codes_equal_the_reference(seed: int, bits: int, kind: str, right: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 5, 9, generator=generator) * 2
    operand, axis = make_operand(generator, (5, 1) if right else (9,), bits, kind), -2 if right else -1
    for values in (x, x.bfloat16(), x.double()):
        found, expected = (
            f(values, operand, axis)[0] for f in (float_matmul.codes_as_floats, integer_reference.quantize_operand)
        )
        assert torch.equal(found, expected.float())


PAIRS = [(a, b) for a in ("static", "per token scaled") for b in ("static scaled", "per token")]


@pytest.mark.parametrize("kinds", PAIRS, ids=str)
@pytest.mark.parametrize("k", [12, 700])  # float32 and float64 sums
def test_blocks_and_strides_change_nothing(kinds: tuple[str, str], k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float_matmul, "_BLOCK_BYTES", 30000)
    generator = torch.Generator().manual_seed(k)
    left = torch.randn(7, 6, 2, k, generator=generator).transpose(1, 2)
    right = torch.randn(7, 2, 5, k, generator=generator).transpose(-1, -2)
    before = left.clone(), right.clone()
    a, b = make_operand(generator, (k,), 8, kinds[0]), make_operand(generator, (k, 1), 8, kinds[1])
    assert_product_is_right(left, right, a, b)
    assert torch.equal(left, before[0])
    assert torch.equal(right, before[1])


@pytest.mark.parametrize("kind", ["static", "per token"])
@pytest.mark.parametrize("where", [0, 1])
def test_nan_is_refused(kind: str, where: int) -> None:
    operands = [torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)]
    operands[where][2, 1, 1] = float("nan")
    quantizer = make_operand(torch.Generator(), (), 8, kind)
    with pytest.raises(InputError, match="not a number"):
        float_matmul.quantized_matmul(operands[0], operands[1], quantizer, quantizer)


def test_inputs_that_do_not_fit_are_refused() -> None:
    quantizer = MatmulOperand(8)
    x = torch.zeros(2, 3, 4)
    for left, right in (
        (x, x),
        (x, x.long().mT),
        (x[0, 0], x.mT),
        (x[..., :0], x[..., :0].mT),
        (x, torch.zeros(3, 4, 2)),
    ):
        for call in (float_matmul.quantized_matmul, integer_reference.quantized_matmul):
            with pytest.raises(KernelError, match="inputs of a quantized matmul"):
                call(left, right, quantizer, quantizer)


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_autocast_leaves_the_integers_exact(batch: tuple[int, ...]) -> None:
    operand = MatmulOperand(8, Affine(torch.tensor(0.02), torch.tensor(-2.5), 8))
    left, right = torch.randn(*batch, 7, 90), torch.randn(*batch, 90, 5)
    expected = float_matmul.quantized_matmul(left, right, operand, operand)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(float_matmul.quantized_matmul(left, right, operand, operand), expected)
