"""The kernels with weights and activations in bfloat16: the contender that shows what integers alone give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from harmoq_ao.triton_kernels import attention_operands, lowbit_linear, mlp, window_attention
from harmoq_ao.triton_kernels.attention_operands import pack_attention
from harmoq_ao.triton_kernels.operands import from_floats, with_norm
from tests.triton_kernels.helpers import seeded, shifted_windows, site


@pytest.mark.parametrize("mid_rise", [True, False])
def test_a_linear_of_the_values_of_its_codes(mid_rise: bool) -> None:
    generator = seeded(1)
    operands, codes, bits = site(generator, 70, 60, 8, mid_rise=mid_rise)
    operands = replace(operands, joint_shift=torch.randn(60, generator=generator))
    packed = from_floats(operands, codes, bits)
    x = torch.randn(33, 60, generator=generator)
    assert operands.joint_scale is not None
    weight = (operands.weight + operands.weight_shift[:, None]) * operands.weight_scale[:, None]
    expected = F.linear((x - operands.joint_shift) / operands.joint_scale, weight, operands.bias)
    for y in (lowbit_linear.launch_lowbit_linear(x, packed), lowbit_linear.reference(x, packed)):
        assert (y - expected).abs().max() <= 0.02 * expected.abs().max()


def test_an_mlp_behind_a_norm() -> None:
    generator = seeded(2)
    fc1 = with_norm(
        from_floats(*site(generator, 120, 60, 8)), torch.rand(60, generator=generator) + 0.5, torch.zeros(60)
    )
    fc2 = from_floats(*site(generator, 60, 120, 8))
    x = torch.randn(65, 60, generator=generator).bfloat16()
    y, expected = (run(x, fc1, fc2, eps=1e-5, residual=x).float() for run in (mlp.launch_mlp, mlp.reference))
    assert (y - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize(("size", "head_dim"), [(8, 10), (8, 32), (16, 10), (8, 40)])
def test_windows_in_one_kernel_and_in_three(size: int, head_dim: int) -> None:
    generator, channels = seeded(size), 2 * head_dim
    index, ids = shifted_windows(16, 16, size, size // 2)
    operands = pack_attention(
        site(generator, 3 * channels, channels, 8), site(generator, channels, channels, 8), 2, head_dim,
        torch.full((2,), head_dim**-0.5), bias=torch.randn(2, size**2, size**2, generator=generator), floats=True,
    )  # fmt: skip
    operands = attention_operands.with_norm(operands, torch.rand(channels, generator=generator) + 0.5, None)
    x = torch.randn(1, 256, channels, generator=generator).bfloat16()
    options = {"index": index, "regions": ids, "eps": 1e-5, "residual": x}
    y = window_attention.launch_window_attention(x, operands, **options).float()
    expected = window_attention.reference(x, operands, **options).float()
    assert (y - expected).abs().mean() <= 0.01 * expected.abs().mean()
    assert (y - expected).abs().max() <= 0.05 * expected.abs().max()
