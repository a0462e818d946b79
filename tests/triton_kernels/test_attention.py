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
from tests.triton_kernels.helpers import random_attention, seeded

few = settings(max_examples=8)


@few
@given(
    seed=SEEDS, tokens=st.integers(1, 140), keys=st.integers(1, 140), head_dim=st.integers(1, 32),
    cosine=st.booleans(), scale_after=st.booleans(), mode=st.sampled_from(["deploy", "paper", "relative"]),
    masked=st.booleans(),
)  # fmt: skip
def test_attention_of_given_q_k_v(
    seed: int, tokens: int, keys: int, head_dim: int, cosine: bool, scale_after: bool, mode: str, masked: bool
) -> None:
    generator, paper = seeded(seed), mode != "deploy"
    twist = {"cosine": cosine, "scale_after": scale_after, "paper": paper, "relative": mode == "relative"}
    whole = random_attention(generator, tokens, 2 * head_dim, 2, 4, **twist)
    q = torch.randn(2, tokens, 2, head_dim, generator=generator)
    k, v = torch.randn(2, 2, keys, 2, head_dim, generator=generator).unbind(1)
    bias = torch.randn(2, tokens, keys, generator=generator)
    operands = replace(whole, qkv=None, proj=None, proj_heads=None, bias=bias)
    mask = torch.where(torch.rand(2, tokens, keys, generator=generator) < 0.3, -100.0, 0.0) if masked else None
    o = attention.launch_attention(q, k, v, operands, mask=mask, compute=torch.float32)
    error = (o - attention.reference(q, k, v, operands, mask=mask)).abs()
    assert error.mean() <= 1e-5
    assert error.max() <= (0.1 if paper else 1e-4)


@pytest.mark.parametrize("keys", [48, 100])
def test_relative_maps_give_every_row_its_own_range(keys: int) -> None:
    """Entries of a row that attends to all keys alike vanish in 2 bits; relative to their row none does."""
    generator = seeded(keys)
    whole = random_attention(generator, 16, 32, 2, 4, paper=True, relative=True, bias=False)
    assert whole.bounds is not None
    bounds = whole.bounds.clone()
    bounds[2] = torch.tensor([3.0, 0.0, 1 / 3, 0.0])  # reciprocal, offset, step and lower bound of 2 bits on 0..1
    operands = replace(whole, qkv=None, proj=None, proj_heads=None, bounds=bounds, left_bits=2)
    q = torch.zeros(1, 16, 2, 16)
    k, v = torch.stack([torch.zeros(1, keys, 2, 16), torch.randn(1, keys, 2, 16, generator=generator)])
    o = attention.launch_attention(q, k, v, operands, compute=torch.float32).view(1, 16, 2, 16)
    expected = v.clamp(-3, 3).mean(1, keepdim=True).expand_as(o)
    torch.testing.assert_close(o, expected, atol=0.01, rtol=0)
    absolute = attention.launch_attention(q, k, v, replace(operands, relative=False), compute=torch.float32)
    assert float(absolute.abs().max()) < 1e-4


def test_q_k_and_v_that_do_not_fit() -> None:
    q = torch.zeros(1, 16, 2, 10)
    with pytest.raises(KernelError, match="q, k and v"):
        attention.launch_attention(q, q, q.transpose(1, 2), random_attention(seeded(0), 16, 20, 2, 4))
