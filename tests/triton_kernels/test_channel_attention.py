"""Attention among channels: sums over whole images, exact of codes, and what is made of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harmoq_ao.common.errors import KernelError
from harmoq_ao.quant.integer_reference import quantize_codes
from harmoq_ao.triton_kernels import channel_attention as channels
from harmoq_ao.triton_kernels.channel_attention import PackedChannels, pack_channels
from tests.strategies import SEEDS
from tests.triton_kernels import float64
from tests.triton_kernels.helpers import affine, seeded

EPS = (1e-12, 1e-12)


def operands_of(
    heads: int, width: int, paper: bool, bits: int = 8, spread: float = 0.3, relative: bool = False
) -> PackedChannels:
    """With scores that tell channels apart."""
    ranges = (affine(-spread, spread, bits), affine(-spread, spread * 1.1, bits))
    quantizers = (*ranges, affine(0.01, 1.0, bits), affine(-3.0, 2.9, bits))
    factor = torch.linspace(4.0, 9.0, heads)
    return pack_channels(heads, width, factor, EPS, quantizers if paper else None, relative)


def slices(generator: torch.Generator, rows: int, columns: int) -> tuple[Tensor, ...]:
    """q, k and v as slices of one matrix, whose channels depend on each other."""
    whole = torch.randn(rows, 3 * columns, generator=generator)
    return tuple((whole + whole.roll(1, 1) + 0.5 * whole[:, :1]).split(columns, 1))


@settings(max_examples=8)
@given(
    seed=SEEDS, images=st.integers(1, 2), tokens=st.integers(1, 300), heads=st.integers(1, 3), width=st.integers(1, 40),
    paper=st.booleans(), bits=st.sampled_from([2, 4, 8]), relative=st.booleans(),
)  # fmt: skip
def test_images_of_any_size(
    seed: int, images: int, tokens: int, heads: int, width: int, paper: bool, bits: int, relative: bool
) -> None:
    operands = operands_of(heads, width, paper, bits, relative=paper and relative)
    q, k, v = slices(seeded(seed), images * tokens, heads * width)
    y = channels.launch_channel_attention(q, k, v, operands, images)
    with float64.margins() as margins:
        expected = float64.channel_attention(q, k, v, operands, images)
    for found in (y, channels.reference(q, k, v, operands, images)):
        error = (found - expected).abs()
        # A code at a tie takes its neighbour: of the map it moves a channel, of a query or key a little of many.
        assert error.max() <= (1e-4 if not paper or min(margins) > 1e-4 else 6 / (1 << bits))
        assert error.median() <= (0.05 if paper else 1e-5)


@pytest.mark.parametrize("paper", [False, True])
def test_images_in_parts_and_in_bfloat16(paper: bool) -> None:
    """Two images of two parts, the last one short, at the width of DAT-light."""
    q, k, v = (x.bfloat16() for x in slices(seeded(1), 2 * 1100, 20))
    operands = operands_of(2, 10, paper, spread=0.1)
    y = channels.launch_channel_attention(q, k, v, operands, 2)
    assert y.dtype == torch.bfloat16
    error = (y - float64.channel_attention(q, k, v, operands, 2)).abs()
    assert error.mean() <= 0.01
    assert error.max() <= 0.1
    again = channels.launch_channel_attention(q, k, v, operands, 2)
    assert torch.equal(y, again)


@pytest.mark.parametrize("width", [10, 48])
def test_sums_of_codes_are_exact(width: int) -> None:
    """Parts of an image, added up, are the products of the codes that integers make of the same lengths."""
    operands, images = operands_of(2, width, True, spread=0.05), 2
    q, k, _ = slices(seeded(width), images * 1500, 2 * width)
    bounds, bits = operands.bounds, list(operands.bits)
    assert bounds is not None
    squares = channels.launch_sums(q, k, None, bounds, 2, images, EPS, bits)
    found = channels.launch_sums(q, k, squares, bounds, 2, images, EPS, bits).long().sum(2)
    codes = []
    for row, x in enumerate((q, k)):
        side = x.view(images, -1, 2, width).transpose(1, 2)
        norms = squares[..., row, :width].sum(2).double().sqrt().float()  # float32 roots are inexact on some CPUs
        codes.append(quantize_codes(side, (bounds[row, 0] / norms)[:, :, None], bounds[row, 1], bits[row]).long())
        assert torch.equal(found[..., row, :width], codes[row].sum(2))
    assert torch.equal(found[..., 2 : 2 + width, :width], codes[0].mT @ codes[1])
    assert not found[..., 2 + width :, :].any()


def test_the_largest_sums_that_there_are() -> None:
    """All codes at 255 over as many tokens as a part can have."""
    length = 32768 * 129
    parts, part = channels.split(length)
    assert part * parts >= length
    assert part * 255 * 255 < 2**31
    assert channels.split(256 * 256) == (64, 1024)
    assert channels.split(100) == (1, 1024)
    maps = channels.launch_maps(
        torch.full((1, 1, 130, 18, 16), 2**31 - 1, dtype=torch.int32), torch.ones(1),
        torch.tensor([[0, 0, 1e-12, 0], [0, 0, 1, 0], [255, 0, 1 / 255, 0], [0, 0, 1, 0]]),
        16, length, EPS, [8, 8, 8, 8], False, torch.float16,
    )  # fmt: skip
    assert torch.equal(maps, torch.full((1, 1, 16, 16), 16.0, dtype=torch.float16))  # 255 / 16, rounded


def test_channels_of_zeros_attend_evenly() -> None:
    q, k, v = torch.zeros(40, 20), torch.zeros(40, 20), torch.randn(40, 20, generator=seeded(0))
    y = channels.launch_channel_attention(q, k, v, operands_of(2, 10, False), 1)
    expected = v.view(40, 2, 1, 10).mean(3, keepdim=True).expand(-1, -1, -1, 10).reshape(40, 20)
    torch.testing.assert_close(y, expected)


def test_what_the_kernels_do_not_take() -> None:
    with pytest.raises(KernelError, match="this head"):
        operands_of(1, 129, False)
    wide = affine(0.0, 1.0)
    rows = type(wide)(torch.ones(3), torch.zeros(3), 8)
    with pytest.raises(KernelError, match="one pair"):
        pack_channels(2, 10, torch.ones(2), EPS, (rows, wide, wide, wide))
    q = torch.zeros(40, 20)
    for other in (torch.zeros(39, 20), torch.zeros(40, 20).double(), torch.zeros(20, 40).t()):
        with pytest.raises(KernelError, match="do not fit"):
            channels.launch_channel_attention(q, other, q, operands_of(2, 10, False), 1)
