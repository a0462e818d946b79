"""Window attention against float64: any shape, images by index in bfloat16, and the authors' own module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spandrel.architectures.SwinIR.__arch.SwinIR import WindowAttention
from torch import Tensor

from harmoq_ao.common.errors import KernelError
from harmoq_ao.quant.integer_reference import LinearOperands
from harmoq_ao.quant.packing import pack
from harmoq_ao.quant.quantizer import quantize, step_size
from harmoq_ao.triton_kernels import window_attention
from harmoq_ao.triton_kernels.attention_operands import pack_attention, regions_of, with_norm
from harmoq_ao.triton_kernels.operands import Norm
from tests.strategies import SEEDS
from tests.triton_kernels import float64
from tests.triton_kernels.helpers import affine, random_attention, regions, seeded, shifted_windows

few = settings(max_examples=8)
BITS = st.sampled_from([2, 3, 4, 8])


@few
@given(
    seed=SEEDS, tokens=st.integers(1, 80), heads=st.integers(1, 3), head_dim=st.integers(1, 32), bits=BITS,
    cosine=st.booleans(), scale_after=st.booleans(), apart=st.booleans(), norm=st.booleans(), behind=st.booleans(),
    residual=st.booleans(), mode=st.sampled_from(["deploy", "paper", "relative"]),
)  # fmt: skip
def test_windows_of_any_shape(
    seed: int,
    tokens: int,
    heads: int,
    head_dim: int,
    bits: int,
    cosine: bool,
    scale_after: bool,
    apart: bool,
    norm: bool,
    behind: bool,
    residual: bool,
    mode: str,
) -> None:
    generator = seeded(seed)
    twist = {"cosine": cosine, "scale_after": scale_after, "relative": mode == "relative", "paper": mode != "deploy"}
    channels = heads * head_dim
    operands = random_attention(generator, tokens, channels, heads, bits, **twist)
    x = torch.randn(2, tokens, channels, generator=generator)
    after = Norm(torch.rand(channels, generator=generator), torch.randn(channels, generator=generator), 1e-5)
    options: dict[str, Any] = {
        "regions": regions(generator, 2, tokens) if apart else None, "eps": 1e-5 if norm else None,
        "after": after if behind and channels > 8 else None, "residual": x if residual else None,
    }  # fmt: skip
    y = window_attention.launch_window_attention(x, operands, compute=torch.float32, **options)
    with float64.margins() as margins:
        error = (y - float64.window_attention(x, operands, **options)).abs()
    # Codes at a tie take a neighbour: one of an input, of q or of a probability moves a row, one of k or v a window.
    assert error.max() <= 0.3 * (3 if behind else 1)
    wrong = (error > 1e-4).float().mean((1, 2))
    assert wrong.min() <= 0.05
    assert wrong.max() <= 0.05 or min(margins) <= 1e-4


CASES = [
    (mode, size, channels, shift)
    for mode in ("deploy", "paper")
    for size, channels in [(8, 60), (16, 20), (8, 180), (8, 80), (8, 144)]
    for shift in (0, 4)
]
FAST = {
    *[("paper", 8, 60, 0), ("paper", 8, 60, 4), ("paper", 16, 20, 4), ("paper", 8, 180, 4)],
    *[("deploy", 8, 60, 4), ("deploy", 8, 80, 0)],
}
"""Run with the fast tests; the others take seconds each in the interpreter as well."""


@pytest.mark.parametrize(
    ("mode", "size", "channels", "shift"),
    [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in CASES],
)
def test_bfloat16_images_by_index(mode: str, size: int, channels: int, shift: int) -> None:
    """Partition, shift, LayerNorm, regions, their reverses and the residual, as a block of Swin does them."""
    generator = seeded(shift)
    height, width = (16, 16) if size == 8 else (16, 32)
    index, ids = shifted_windows(height, width, size, shift)
    heads = 2 if channels in (20, 80) else 6
    operands = random_attention(generator, size * size, channels, heads, 4, paper=mode == "paper")
    operands = with_norm(operands, torch.rand(channels, generator=generator) + 0.5, torch.zeros(channels))
    x = torch.randn(8 // size + 1, height * width, channels, generator=generator).bfloat16()
    options: dict[str, Any] = {"index": index, "regions": ids if shift else None, "eps": 1e-5, "residual": x}
    y = window_attention.launch_window_attention(x, operands, **options)
    assert y.dtype == torch.bfloat16
    error = (y.double() - float64.window_attention(x, operands, **options)).abs()
    # Some codes of the projection move by one: bfloat16 holds 8 bits of what they round.
    assert operands.proj is not None
    step = (operands.proj.effective_codes().abs().float() * operands.proj.scale[:, None]).amax()
    assert error.mean() <= 0.02 + step
    assert error.max() <= 0.05 + 12 * step
    exact = window_attention.launch_window_attention(x.float(), operands, compute=torch.float32, **options)
    assert ((exact - float64.window_attention(x.float(), operands, **options)).abs() > 1e-4).float().mean() <= 0.03


def test_windows_of_an_image_are_those_partitioned_by_hand() -> None:
    generator = seeded(3)
    index, ids = shifted_windows(16, 24, 8, 4)
    operands = random_attention(generator, 64, 20, 2, 4)
    x = torch.randn(2, 384, 20, generator=generator)
    y = window_attention.launch_window_attention(x, operands, index=index, regions=ids, residual=x)
    windows = x[:, index.long()].flatten(0, 1)
    parted = window_attention.launch_window_attention(windows, operands, regions=ids, residual=windows.contiguous())
    assert torch.equal(y[:, index.long()].flatten(0, 1), parted)
    assert torch.equal(
        window_attention.reference(x, operands, index=index, regions=ids)[:, index.long()].flatten(0, 1),
        window_attention.reference(windows, operands, regions=ids),
    )


def test_regions_of_masks() -> None:
    _, ids = shifted_windows(16, 16, 8, 4)
    mask = torch.where(ids[:, :, None] == ids[:, None], 0.0, -100.0)
    found = regions_of(mask)
    assert found is not None
    assert torch.equal(found[:, :, None] == found[:, None], mask == 0)
    assert regions_of(torch.zeros_like(mask)) is None
    for wrong in (mask / 10, torch.where(torch.ones(64, 64).tril().bool(), 0.0, -100.0)[None]):
        with pytest.raises(KernelError, match="regions"):
            regions_of(wrong)


def test_equals_the_module_of_swinir() -> None:
    generator = seeded(5)
    module = WindowAttention(60, (8, 8), 6).eval()
    x, ids = torch.randn(4, 64, 60, generator=generator), regions(generator, 2, 64)
    qkv, proj = (_at_eight_bits(linear, bound) for linear, bound in ((module.qkv, 4.0), (module.proj, 1.0)))
    index = module.relative_position_index.view(-1)
    bias = module.relative_position_bias_table[index].view(64, 64, 6).permute(2, 0, 1).detach()
    operands = pack_attention(qkv, proj, 6, 10, torch.full((6,), module.scale), bias=bias)
    with torch.no_grad():
        expected = module(x, torch.where(ids[:, :, None] == ids[:, None], 0.0, -100.0))
    y = window_attention.launch_window_attention(x, operands, regions=ids)
    assert (y - expected).abs().max() <= 0.03
    assert (y - expected).abs().mean() <= 0.05 * expected.abs().mean()


def _at_eight_bits(linear: torch.nn.Linear, bound: float) -> tuple[LinearOperands, Tensor, int]:
    weight = linear.weight.detach()
    lower = -weight.abs().amax(1, keepdim=True)
    scale = step_size(lower, -lower, 8) * 128 / 127
    codes = quantize(weight, -128 * scale, 127 * scale, 8)
    shift = torch.zeros(len(weight))
    signed = (codes.to(torch.int16) - 128).to(torch.int8)
    bias = None if linear.bias is None else linear.bias.detach()
    operands = LinearOperands(signed, scale[:, 0].contiguous(), shift, bias, 8, affine(-bound, bound))
    return operands, pack(codes, 8), 8


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 16, 20), {"regions": torch.zeros(3, 16, dtype=torch.uint8)}, "regions do not fit"),
        ((4, 16, 20), {"regions": torch.zeros(4, 15, dtype=torch.uint8)}, "regions does not fit"),
        ((4, 16, 20), {"index": torch.zeros(2, 16, dtype=torch.int32)}, "do not cover the image"),
        ((4, 16, 20), {"index": torch.zeros(1, 16)}, "index does not fit"),
        ((4, 9, 20), {}, "position bias"),
        ((4, 16, 21), {}, "activation does not fit"),
        ((4, 16, 20), {"residual": torch.zeros(4, 16, 21)}, "residual does not fit"),
    ],
)
def test_what_the_kernel_does_not_take(shape: tuple[int, ...], options: dict[str, Tensor], message: str) -> None:
    operands = random_attention(seeded(0), 16, 20, 2, 4)
    with pytest.raises(KernelError, match=message):
        window_attention.launch_window_attention(torch.zeros(shape), operands, **options)


def test_windows_have_a_largest_size() -> None:
    wide = random_attention(seeded(0), 300, 20, 2, 4, bias=False)
    with pytest.raises(KernelError, match="too many tokens"):
        window_attention.launch_window_attention(torch.zeros(1, 300, 20), wide)
