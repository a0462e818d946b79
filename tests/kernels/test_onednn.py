"""The oneDNN path against the reference: codes and accumulators bit for bit, outputs within float32 rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.common.errors import InputError, KernelError
from harmoq_ao.kernels import onednn
from harmoq_ao.kernels.linear import LinearContraction
from harmoq_ao.kernels.select import select_kernel
from harmoq_ao.quant import integer_reference
from harmoq_ao.quant.integer_reference import Affine, LinearOperands

SEEDS = st.integers(0, 2**31)
BITS = st.integers(2, 8)
SIZES = st.integers(1, 70)
SHIFTS = st.sampled_from([0.0, 0.5, -3.0, 0.3, "mixed"])


def codes_of(generator: torch.Generator, bits: int, *shape: int) -> Tensor:
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)


def signed_codes_of(generator: torch.Generator, bits: int, *shape: int) -> Tensor:
    half = 1 << (bits - 1)
    return torch.randint(-half, half, shape, dtype=torch.int8, generator=generator)


def make_operands(
    seed: int,
    k: int,
    n: int,
    *,
    bits: int = 8,
    act_bits: int = 8,
    shift: float | str = 0.5,
    dynamic: bool = False,
    joint: bool = False,
    bias: bool = True,
) -> LinearOperands:
    generator = torch.Generator().manual_seed(seed)
    shifts = torch.tensor([0.0, 0.5, 0.3, -2.0]).repeat(n)[:n] if shift == "mixed" else torch.full((n,), float(shift))
    return LinearOperands(
        weight=signed_codes_of(generator, bits, n, k),
        weight_scale=torch.rand(n, generator=generator) * 0.1 + 0.001,
        weight_shift=shifts,
        bias=torch.randn(n, generator=generator) if bias else None,
        act_bits=act_bits,
        act=None if dynamic else Affine(torch.tensor(6.1 / (2**act_bits - 1)), torch.tensor(-2.7), act_bits),
        joint_scale=torch.rand(k, generator=generator) * 3 + 0.1 if joint else None,
    )


def reference_codes(x: Tensor, operands: LinearOperands) -> tuple[Tensor, Affine]:
    if operands.act is None:
        return integer_reference.quantize_dynamic(x, -1, operands.act_bits, operands.joint_scale)
    qparams = integer_reference.static_qparams(operands.act, operands.joint_scale)
    return integer_reference.quantize_codes(x, *qparams, operands.act_bits), operands.act


def float64_linear(x: Tensor, operands: LinearOperands) -> tuple[Tensor, Tensor]:
    """The exact output for the codes of ``x``, and the size of its terms, which rounding errors are relative to."""
    codes, act = reference_codes(x, operands)
    step, lower, scale = act.step.double(), act.lower.double(), operands.weight_scale.double()[:, None]
    shift = operands.weight_shift.double()[:, None]
    values, weight = codes.double() * step + lower, scale * (operands.weight.double() + shift)
    sizes = codes.double() * step + lower.abs(), scale * (operands.weight.double().abs() + shift.abs())
    bias = torch.zeros(len(weight)).double() if operands.bias is None else operands.bias.double()
    return values @ weight.t() + bias, sizes[0] @ sizes[1].t() + bias.abs()


def assert_linear_is_right(x: Tensor, operands: LinearOperands, tolerance: float = 1e-6) -> None:
    found = onednn.linear(x, onednn.pack_linear(operands))
    expected, size = float64_linear(x, operands)
    assert found.dtype == x.dtype
    assert found.shape == expected.shape
    assert found.is_contiguous()
    assert ((found.double() - expected).abs() <= tolerance * size).all()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, the last one short, for tensors of a test's size."""
    monkeypatch.setattr(onednn, "_MIN_ROWS", 1)
    monkeypatch.setattr(onednn, "_BLOCK_BYTES", 4000)


# --- accumulators -----------------------------------------------------------------------------------------------------


def contract_exactly(qx: Tensor, qw: Tensor, shift: float) -> tuple[Tensor, bool]:
    """Sums of the packed kernel over ready codes, unit steps adding no rounding; whether the codes absorb the shift."""
    unit = Affine(torch.tensor(1.0), torch.tensor(0.0), 8)
    operands = LinearOperands(qw, torch.ones(len(qw)), torch.full((len(qw),), shift), None, 8, unit)
    packed = onednn.pack_linear(operands)
    return packed.contract(qx, torch.float32), packed.outer is None


@given(seed=SEEDS, m=st.integers(1, 70), k=SIZES, n=SIZES, bits=BITS, shift=st.sampled_from([0.0, 0.5, -3.0]))
def test_sums_of_codes_equal_the_reference(seed: int, m: int, k: int, n: int, bits: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    qx, qw = codes_of(generator, 8, m, k), signed_codes_of(generator, bits, n, k)
    found, absorbed = contract_exactly(qx, qw, shift)
    expected = integer_reference.linear_accumulate(qx, qw).float()
    if absorbed:
        expected += shift * qx.sum(1, keepdim=True)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("weight", [127, -127, -128])
@pytest.mark.parametrize("k", [1, 3, 60, 120, 513, 515, 1500, 65793, 66000])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("available", [True, False])
def test_worst_case_sums_are_exact(
    weight: int, k: int, dynamic: bool, available: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the kernel that a call runs: with unit steps and scales its outputs are the sums, rounded to float32 once."""
    if not available:
        monkeypatch.setattr(onednn, "is_available", lambda: False)
    qx, qw = torch.full((5, k), 255, dtype=torch.uint8), torch.full((3, k), weight, dtype=torch.int8)
    if dynamic:
        qx[:, 0] = 0  # the range of each token is 0 to 255, its step one
    act = None if dynamic else Affine(torch.tensor(1.0), torch.tensor(0.0), 8)
    operands = LinearOperands(qw, torch.ones(3), torch.zeros(3), None, 8, act)
    run = select_kernel(LinearContraction(operands, torch.empty(0), 8), torch.device("cpu"), "auto").run
    expected = integer_reference.linear_accumulate(qx, qw).float()
    assert (expected == torch.tensor(255 * weight * (k - dynamic)).float()).all()
    assert torch.equal(run(qx.float()), expected)


# --- codes ------------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, m=st.integers(1, 80), k=SIZES, bits=BITS, dynamic=st.booleans(), joint=st.booleans())
def test_codes_equal_the_reference(seed: int, m: int, k: int, bits: int, dynamic: bool, joint: bool) -> None:
    operands = make_operands(seed, k, 3, act_bits=bits, dynamic=dynamic, joint=joint)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) * 3
    packed = onednn.pack_linear(operands)
    for values in (x, x.bfloat16(), x.half(), x.double()):
        assert torch.equal(onednn.quantize(values, packed), reference_codes(values, operands)[0])


@given(seed=SEEDS, bits=BITS, joint=st.booleans())
def test_codes_of_ties_equal_the_reference(seed: int, bits: int, joint: bool) -> None:
    """Inputs on the boundaries between codes, and one float above and below them."""
    operands = make_operands(seed, 4, 3, act_bits=bits, joint=joint)
    assert operands.act is not None
    boundaries = (torch.arange(-1, 2**bits) + 0.5)[:, None] * operands.act.step + operands.act.lower
    ties = boundaries.expand(-1, 4) * (1.0 if operands.joint_scale is None else operands.joint_scale)
    infinity = torch.tensor(float("inf"))
    x = torch.cat([ties, torch.nextafter(ties, infinity), torch.nextafter(ties, -infinity)])
    assert torch.equal(onednn.quantize(x, onednn.pack_linear(operands)), reference_codes(x, operands)[0])


def test_exact_ties_go_to_even() -> None:
    act = Affine(torch.tensor(0.5), torch.tensor(-4.0), 4)
    operands = LinearOperands(torch.ones(1, 5, dtype=torch.int8), torch.ones(1), torch.zeros(1), None, 4, act)
    x = torch.tensor([[-3.75, -3.25, -2.75, 3.25, 9.0]])
    assert onednn.quantize(x, onednn.pack_linear(operands)).tolist() == [[0, 2, 2, 14, 15]]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dynamic", [False, True])
def test_codes_do_not_depend_on_blocks_or_strides(dynamic: bool) -> None:
    operands = make_operands(1, 60, 3, dynamic=dynamic, joint=True)
    x = torch.randn(60, 301, generator=torch.Generator().manual_seed(1)).t()
    assert onednn.block_rows(301, 60) < 100
    assert torch.equal(onednn.quantize(x, onednn.pack_linear(operands)), reference_codes(x, operands)[0])


# --- effective codes --------------------------------------------------------------------------------------------------


@given(seed=SEEDS, bits=BITS, shift=SHIFTS)
def test_effective_codes_absorb_the_shift(seed: int, bits: int, shift: float | str) -> None:
    operands = make_operands(seed, 30, 8, bits=bits, shift=shift)
    codes, factor = onednn.effective_codes(operands.weight, operands.weight_shift)
    assert codes.dtype == torch.int8
    if factor:
        shifted = operands.weight.double() + operands.weight_shift.double()[:, None]
        assert torch.equal(codes.double(), factor * shifted)
    else:
        assert torch.equal(codes, operands.weight)


@pytest.mark.parametrize(("bits", "shift", "factor"), [(7, 0.5, 2), (8, 0.5, 0), (8, 0.0, 1), (4, 0.3, 0), (4, -5, 1)])
def test_which_shifts_are_absorbed(bits: int, shift: float, factor: int) -> None:
    levels = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1)).to(torch.int8)[None]
    assert onednn.effective_codes(levels, torch.tensor([float(shift)]))[1] == factor


# --- linear -----------------------------------------------------------------------------------------------------------


@given(
    seed=SEEDS,
    m=st.integers(1, 70),
    k=SIZES,
    n=SIZES,
    bits=st.tuples(BITS, BITS),
    shift=SHIFTS,
    dynamic=st.booleans(),
    joint=st.booleans(),
    bias=st.booleans(),
)
def test_linear_equals_float64(
    seed: int,
    m: int,
    k: int,
    n: int,
    bits: tuple[int, int],
    shift: float | str,
    dynamic: bool,
    joint: bool,
    bias: bool,
) -> None:
    operands = make_operands(
        seed, k, n, bits=bits[0], act_bits=bits[1], shift=shift, dynamic=dynamic, joint=joint, bias=bias
    )
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    assert_linear_is_right(x, operands)
    assert_linear_is_right(x.bfloat16(), operands, tolerance=2.0**-8)
    expected, size = float64_linear(x, operands)
    assert ((integer_reference.linear(x, operands).double() - expected).abs() <= 1e-6 * size).all()


KINDS = [
    {"dynamic": dynamic, "joint": joint, "shift": shift}
    for dynamic in (False, True)
    for joint in (False, True)
    for shift in (0.0, 0.5)
]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_in_blocks(kind: dict[str, float | bool], dtype: torch.dtype) -> None:
    operands = make_operands(5, 60, 33, **kind)  # type: ignore[arg-type]
    x = torch.randn(501, 60, generator=torch.Generator().manual_seed(5)).to(dtype)
    assert_linear_is_right(x, operands, 1e-6 if dtype == torch.float32 else 2.0**-8)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (2, 3, 4, 7), (0, 7), (2, 0, 7), (1, 7)])
def test_linear_of_any_shape(kind: dict[str, float | bool], shape: tuple[int, ...]) -> None:
    operands = make_operands(6, 7, 4, **kind)  # type: ignore[arg-type]
    assert_linear_is_right(torch.randn(shape, generator=torch.Generator().manual_seed(6)), operands)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_linear_of_strided_input(kind: dict[str, float | bool]) -> None:
    operands = make_operands(7, 6, 4, **kind)  # type: ignore[arg-type]
    x = torch.randn(6, 10, 8, generator=torch.Generator().manual_seed(7))
    assert_linear_is_right(x.permute(1, 2, 0), operands)
    assert_linear_is_right(x[:, ::2, :6], operands)
    assert_linear_is_right(x[0, 0, :6].expand(3, 2, 6), operands)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_linear_without_integer_kernels(kind: dict[str, float | bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "is_available", lambda: False)
    operands = make_operands(8, 60, 20, **kind)  # type: ignore[arg-type]
    assert_linear_is_right(torch.randn(90, 60, generator=torch.Generator().manual_seed(8)), operands)
    qx = codes_of(torch.Generator().manual_seed(8), 8, 4, 60)
    expected = integer_reference.linear_accumulate(qx, operands.weight).float()
    assert torch.equal(contract_exactly(qx, operands.weight, 0.0)[0], expected)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_linear_leaves_its_input_alone_and_takes_one_that_wants_gradients(kind: dict[str, float | bool]) -> None:
    packed = onednn.pack_linear(make_operands(9, 7, 4, **kind))  # type: ignore[arg-type]
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(9), requires_grad=True)
    before = x.detach().clone()
    y = onednn.linear(x, packed)
    assert torch.equal(x.detach(), before)
    assert not y.requires_grad


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_nan_is_refused_wherever_it_is(kind: dict[str, float | bool]) -> None:
    packed = onednn.pack_linear(make_operands(10, 7, 4, **kind))  # type: ignore[arg-type]
    for row in (0, 2000):
        x = torch.zeros(2001, 7)
        x[row, 3] = float("nan")
        with pytest.raises(InputError, match="not a number"):
            onednn.linear(x, packed)


def test_infinity_saturates_static_bounds_and_is_refused_per_token() -> None:
    x = torch.zeros(3, 7)
    x[1, 2], x[2, 5] = float("inf"), float("-inf")
    static, dynamic = make_operands(11, 7, 4), make_operands(11, 7, 4, dynamic=True)
    assert_linear_is_right(x, static)
    assert onednn.linear(x[:1], onednn.pack_linear(dynamic)).isfinite().all()
    with pytest.raises(InputError, match="not a number"):
        onednn.linear(x, onednn.pack_linear(dynamic))
    with pytest.raises(InputError, match="not a number"):
        integer_reference.linear(x, dynamic)


def test_bounds_that_one_kernel_call_cannot_hold_are_refused() -> None:
    operands = make_operands(12, 7, 4)
    per_row = Affine(torch.ones(5, 1), torch.zeros(5, 1), 8)
    with pytest.raises(KernelError, match="one pair for the whole tensor"):
        onednn.pack_linear(LinearOperands(operands.weight, operands.weight_scale, torch.zeros(4), None, 8, per_row))
    with pytest.raises(KernelError, match="for CPUs"):
        onednn.pack_linear(
            LinearOperands(operands.weight.to("meta"), operands.weight_scale, operands.weight_shift, None, 8)
        )
    with pytest.raises(KernelError, match="input does not fit"):
        onednn.linear(torch.zeros(3, 8), onednn.pack_linear(operands))


def test_what_is_available_does_not_depend_on_autocast() -> None:
    found = onednn.is_available()
    onednn.is_available.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert onednn.is_available() is found


@pytest.mark.parametrize("available", [True, False])
def test_autocast_leaves_the_integers_exact(monkeypatch: pytest.MonkeyPatch, available: bool) -> None:
    if not available:  # what CPUs without integer instructions get
        monkeypatch.setattr(onednn, "is_available", lambda: False)
    packed = onednn.pack_linear(make_operands(3, 300, 9))
    x = torch.randn(50, 300)
    expected = onednn.linear(x, packed)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(onednn.linear(x, packed), expected)
