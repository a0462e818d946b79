"""Attention of given q, k and v: float rounding in mode "deploy", flipped codes alone in mode "paper"."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harmoq_ao.common.errors import KernelError
from harmoq_ao.triton_kernels import attention
from tests.strategies import SEEDS
from tests.triton_kernels import float64
from tests.triton_kernels.helpers import random_attention, regions, seeded, shifted_windows

few = settings(max_examples=8)


@few
@given(
    seed=SEEDS, tokens=st.integers(1, 140), keys=st.integers(1, 140), head_dim=st.integers(1, 32),
    cosine=st.booleans(), scale_after=st.booleans(), mode=st.sampled_from(["deploy", "paper", "relative"]),
    apart=st.sampled_from([0, -57, -100]),
)  # fmt: skip
def test_attention_of_given_q_k_v(
    seed: int, tokens: int, keys: int, head_dim: int, cosine: bool, scale_after: bool, mode: str, apart: int
) -> None:
    generator, paper = seeded(seed), mode != "deploy"
    twist = {"cosine": cosine, "scale_after": scale_after, "paper": paper, "relative": mode == "relative"}
    whole = random_attention(generator, tokens, 2 * head_dim, 2, 4, **twist)
    q = torch.randn(2, tokens, 2, head_dim, generator=generator)
    k, v = torch.randn(2, 2, keys, 2, head_dim, generator=generator).unbind(1)
    bias = torch.randn(2, tokens, keys, generator=generator)
    operands = replace(whole, qkv=None, qkv_heads=None, proj=None, proj_heads=None, bias=bias, apart=apart)
    ids = (regions(generator, 2, tokens), regions(generator, 2, keys)) if apart else (None, None)
    options = {"regions": ids[0], "key_regions": ids[1]}
    o = attention.launch_attention(q, k, v, operands, compute=torch.float32, **options)
    error = (o - float64.attention(q, k, v, operands, **options)).abs()
    assert error.mean() <= 1e-5
    assert error.max() <= (0.1 if paper else 1e-4)


@pytest.mark.parametrize("head_dim", [46, 53, 77, 122])
@pytest.mark.parametrize("mode", ["deploy", "paper", "relative"])
def test_heads_as_wide_as_drct_has_them(head_dim: int, mode: str) -> None:
    """In blocks of keys, and in windows that one block holds."""
    generator = seeded(head_dim)
    twist = {"paper": mode != "deploy", "relative": mode == "relative", "bias": False}
    whole = random_attention(generator, 16, 2 * head_dim, 2, 4, **twist)
    operands = replace(whole, qkv=None, qkv_heads=None, proj=None, proj_heads=None)
    for tokens in (64, 144):
        q, k, v = torch.randn(1, tokens, 3, 2, head_dim, generator=generator).unbind(2)
        o = attention.launch_attention(q, k, v, operands, compute=torch.float32)
        error = (o - float64.attention(q, k, v, operands)).abs()
        # Codes at a tie take a neighbour: one of a probability moves a row, one of a key all of a head by a little.
        assert error.median() <= 1e-6
        assert error.mean() <= 1e-4
        assert error.max() <= (0.1 if twist["paper"] else 1e-5)


@pytest.mark.parametrize("keys", [48, 100])
def test_relative_maps_give_every_row_its_own_range(keys: int) -> None:
    """Entries of a row that attends to all keys alike vanish in 2 bits; relative to their row none does."""
    generator = seeded(keys)
    whole = random_attention(generator, 16, 32, 2, 4, paper=True, relative=True, bias=False)
    assert whole.bounds is not None
    bounds = whole.bounds.clone()
    bounds[2] = torch.tensor([3.0, 0.0, 1 / 3, 0.0])  # reciprocal, offset, step and lower bound of 2 bits on 0..1
    operands = replace(whole, qkv=None, qkv_heads=None, proj=None, proj_heads=None, bounds=bounds, left_bits=2)
    q = torch.zeros(1, 16, 2, 16)
    k, v = torch.stack([torch.zeros(1, keys, 2, 16), torch.randn(1, keys, 2, 16, generator=generator)])
    o = attention.launch_attention(q, k, v, operands, compute=torch.float32).view(1, 16, 2, 16)
    expected = v.clamp(-3, 3).mean(1, keepdim=True).expand_as(o)
    torch.testing.assert_close(o, expected, atol=0.01, rtol=0)
    absolute = attention.launch_attention(q, k, v, replace(operands, relative=False), compute=torch.float32)
    assert float(absolute.abs().max()) < 1e-4


@pytest.mark.parametrize("mode", ["deploy", "paper"])
def test_overlapping_windows_by_index(mode: str) -> None:
    """Keys of 24 x 24 pixels around windows of 16 x 16, zeros beyond the image, in slices of one matrix: HAT's."""
    generator = seeded(9)
    whole = random_attention(generator, 256, 48, 2, 4, paper=mode == "paper", scale_after=True, bias=False)
    bias = torch.randn(2, 256, 576, generator=generator)
    operands = replace(whole, qkv=None, qkv_heads=None, proj=None, proj_heads=None, bias=bias)
    index, _ = shifted_windows(16, 32, 16, 0)
    rows = torch.full((24, 40), -1, dtype=torch.int32)
    rows[4:20, 4:36] = torch.arange(512, dtype=torch.int32).view(16, 32)
    keys = rows.unfold(0, 24, 16).unfold(1, 24, 16).reshape(2, 576).contiguous()
    q, k, v = torch.randn(1, 512, 3, 2, 24, generator=generator).unbind(2)
    o = attention.launch_attention(q, k, v, operands, index=index, key_index=keys, compute=torch.float32)
    expected = float64.attention(q, k, v, operands, index=index, key_index=keys)
    assert (o - expected).abs().mean() <= 1e-5
    narrow = attention.launch_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), operands, index=index, key_index=keys)
    assert narrow.dtype == torch.bfloat16
    assert (narrow - expected).abs().mean() <= 0.02
    torch.testing.assert_close(
        attention.reference(q, k, v, operands, index=index, key_index=keys).double(), expected, atol=1e-2, rtol=0
    )


def test_q_k_and_v_that_do_not_fit() -> None:
    q = torch.zeros(1, 16, 2, 10)
    with pytest.raises(KernelError, match="q, k and v"):
        attention.launch_attention(q, q, q.transpose(1, 2), random_attention(seeded(0), 16, 20, 2, 4))
    core = replace(random_attention(seeded(0), 16, 20, 2, 4), qkv=None, qkv_heads=None, proj=None, proj_heads=None)
    with pytest.raises(KernelError, match="too many keys"):
        attention.launch_attention(q, q.repeat(1, 80, 1, 1), q.repeat(1, 80, 1, 1), core)
    with pytest.raises(KernelError, match="keys have none"):
        attention.launch_attention(q, q, q, core, key_index=torch.zeros(1, 16, dtype=torch.int32))
