"""The C++ depthwise convolution against torch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from harmoq_ao.common.elementwise import Unary
from harmoq_ao.cpu_kernels import depthwise, library
from tests.strategies import SEEDS

TYPES = st.sampled_from((torch.float32, torch.bfloat16))


@given(
    SEEDS,
    st.sampled_from((1, 3, 5, 7, 9)),
    st.integers(1, 70),
    st.integers(0, 5),
    st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)),
    st.none() | st.sampled_from(Unary),
    st.booleans(),
    TYPES,
    TYPES,
)
@settings(max_examples=80, deadline=None)
def test_any_window_image_and_type(
    seed: int,
    side: int,
    channels: int,
    col: int,
    size: tuple[int, int, int],
    activation: Unary | None,
    biased: bool,
    dtype: torch.dtype,
    out: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images, height, width = size
    # columns beside those that are convolved hold NaN
    x = torch.full((images * height * width, channels + 7), float("nan"))
    x[:, col : col + channels] = torch.randn(len(x), channels, generator=generator)
    weight = torch.randn(side * side, channels, generator=generator) / side
    bias = torch.randn(channels, generator=generator) if biased else None
    arguments = (x.to(dtype)[:, :-1], col, channels, *size, weight, bias, activation, out)
    got, want = depthwise.depthwise(*arguments), depthwise.depthwise_reference(*arguments)
    assert got.dtype == out
    tolerance = 1e-5 if out == torch.float32 else 2**-7
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_a_convolution_of_torch_with_its_weight() -> None:
    module = torch.nn.Conv2d(20, 20, 5, padding=2, groups=20)
    image = torch.randn(2, 20, 9, 11)
    tokens = image.permute(0, 2, 3, 1).reshape(-1, 20)
    weight = depthwise.depthwise_weight(module.weight)
    got = depthwise.depthwise(tokens, 0, 20, 2, 9, 11, weight, module.bias.detach())
    want = module(image).permute(0, 2, 3, 1).reshape(-1, 20)
    torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-5)


def test_the_shape_is_known_without_running() -> None:
    depthwise.register_fakes(library.kernels().name)
    with FakeTensorMode():
        got = depthwise.depthwise(torch.empty(6, 8), 1, 5, 1, 2, 3, torch.empty(9, 5), out=torch.bfloat16)
    assert (tuple(got.shape), got.dtype) == ((6, 5), torch.bfloat16)


X, W = torch.ones(6, 8), torch.ones(9, 5)


@pytest.mark.parametrize(
    "arguments",
    [
        (X.double(), 0, 5, 1, 2, 3, W),
        (X[0], 0, 5, 1, 2, 3, W),
        (X, 0, 5, 1, 2, 4, W),
        (X, 0, 5, 1, 0, 3, W),
        (X, 4, 5, 1, 2, 3, W),
        (X, -1, 5, 1, 2, 3, W),
        (X, 0, 4, 1, 2, 3, W),
        (X, 0, 5, 1, 2, 3, torch.ones(4, 5)),
        (X, 0, 5, 1, 2, 3, torch.ones(8, 5)),
        (X, 0, 5, 1, 2, 3, W, torch.ones(4)),
        (X, 0, 5, 1, 2, 3, W, None, 7),
        (X, 0, 5, 1, 2, 3, W, None, None, torch.float64),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[Tensor, ...]) -> None:
    with pytest.raises(RuntimeError, match="depthwise"):
        depthwise.depthwise(*arguments)
