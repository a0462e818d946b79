"""The fused MLP against float64, and against its parts in plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from harmoq_ao.common.errors import KernelError
from harmoq_ao.quant import integer_reference as integers
from harmoq_ao.triton_kernels import mlp
from harmoq_ao.triton_kernels.operands import Norm, with_norm
from tests.strategies import SEEDS, bit_widths
from tests.triton_kernels import float64
from tests.triton_kernels.helpers import random_linear, seeded

few = settings(max_examples=12)


@few
@given(
    seed=SEEDS, m=st.integers(1, 70), c=st.integers(1, 80), hidden=st.integers(1, 140), out=st.integers(1, 80),
    bits=st.sampled_from([2, 3, 4, 8]), mid_rise=st.booleans(), gelu=st.sampled_from(["none", "erf", "tanh"]),
    norm=st.booleans(), residual=st.booleans(),
)  # fmt: skip
def test_equals_the_reference_up_to_flipped_codes(
    seed: int, m: int, c: int, hidden: int, out: int, bits: int, mid_rise: bool, gelu: str, norm: bool, residual: bool
) -> None:
    generator = seeded(seed)
    _, fc1 = random_linear(generator, hidden, c, bits, 8, mid_rise=mid_rise)
    _, fc2 = random_linear(generator, out, hidden, bits, 8, mid_rise=mid_rise)
    x = torch.randn(m, c, generator=generator)
    extra = torch.randn(m, out, generator=generator) if residual else None
    eps = 1e-5 if norm else None
    y = mlp.launch_mlp(x, fc1, fc2, gelu=gelu, eps=eps, residual=extra)
    error = (y - float64.mlp(x, fc1, fc2, gelu=gelu, eps=eps, residual=extra)).abs()
    # A hidden value at a tie may round to the neighbouring code, and GELU's error moves some: a step of a channel.
    flip = (fc2.scale[:, None] * fc2.effective_codes().abs()).max()
    assert error.max() <= 1e-4 + 6 * flip
    assert error.mean() <= 1e-4 + 0.5 * flip


@few
@given(seed=SEEDS, weight_bits=bit_widths(), act_bits=bit_widths())
def test_codes_of_any_width_in_whole_numbers(seed: int, weight_bits: int, act_bits: int) -> None:
    generator = seeded(seed)
    _, fc1 = random_linear(generator, 33, 20, weight_bits, act_bits)
    _, fc2 = random_linear(generator, 20, 33, weight_bits, act_bits)
    x = torch.randn(5, 20, generator=generator)
    # Without GELU and LayerNorm every operation is rounded alike: nothing may differ.
    y = mlp.launch_mlp(x, fc1, fc2, gelu="none")
    assert torch.equal(y, mlp.reference(x, fc1, fc2, gelu="none"))


@pytest.mark.parametrize("channels", [60, 144, 180])
@pytest.mark.parametrize("behind", [False, True])
def test_bfloat16_rows_of_models(channels: int, behind: bool) -> None:
    generator = seeded(channels)
    _, fc1 = random_linear(generator, 2 * channels, channels, 8, 8)
    _, fc2 = random_linear(generator, channels, 2 * channels, 8, 8)
    x = torch.randn(65, channels, generator=generator).bfloat16()
    after = Norm(torch.rand(channels, generator=generator), torch.randn(channels, generator=generator), 1e-5)
    options = {"eps": None if behind else 1e-5, "after": after if behind else None, "residual": x}
    y = mlp.launch_mlp(x, fc1, fc2, **options)
    assert y.dtype == torch.bfloat16
    error = (y.double() - float64.mlp(x, fc1, fc2, **options)).abs()
    assert error.mean() <= 0.01
    assert error.max() <= 0.06


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_equals_the_modules_of_a_block(dtype: torch.dtype) -> None:
    generator = seeded(4)
    first, fc1 = random_linear(generator, 120, 60, 8, 8)
    second, fc2 = random_linear(generator, 60, 120, 8, 8)
    norm = nn.LayerNorm(60)
    nn.init.normal_(norm.weight, 1.0, 0.1)
    nn.init.normal_(norm.bias, 0.0, 0.1)
    x = torch.randn(40, 60, generator=generator).to(dtype)
    y = mlp.launch_mlp(x, with_norm(fc1, norm.weight, norm.bias), fc2, eps=norm.eps, residual=x)
    hidden = torch.nn.functional.gelu(integers.linear(norm(x.float()), first))
    expected = x.float() + integers.linear(hidden, second)
    assert y.dtype == dtype
    assert (y.float() - expected).abs().max() <= 0.05
    assert (y.float() - expected).abs().mean() <= 0.01


def test_what_the_kernel_does_not_take() -> None:
    generator = seeded(0)
    _, fc1 = random_linear(generator, 8, 16, 4, 8)
    _, fc2 = random_linear(generator, 16, 8, 4, 8)
    _, token = random_linear(generator, 8, 16, 4, 8, static=False)
    _, other = random_linear(generator, 16, 9, 4, 8)
    _, wide = random_linear(generator, 300, 8, 4, 8)
    x = torch.zeros(3, 16)
    with pytest.raises(KernelError, match="do not meet"):
        mlp.launch_mlp(x, fc1, other)
    with pytest.raises(KernelError, match="static bounds"):
        mlp.launch_mlp(x, token, fc2)
    with pytest.raises(KernelError, match="Too wide"):
        mlp.launch_mlp(x, fc1, wide)
    with pytest.raises(KernelError, match="static bounds only"):
        with_norm(token, None, None)
    with pytest.raises(KernelError, match="LayerNorm behind"):
        mlp.launch_mlp(x, fc1, fc2, after=Norm(torch.zeros(16), torch.zeros(15), 1e-5))
    assert mlp.launch_mlp(torch.zeros(0, 16), fc1, fc2).shape == (0, 16)
