"""The convolution kernel against its reference and torch, in the interpreter, and compiled for GPUs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harmoq_ao.common import elementwise
from harmoq_ao.common.elementwise import Unary
from harmoq_ao.common.errors import KernelError
from harmoq_ao.triton_kernels import convolution
from harmoq_ao.triton_kernels.device import GELU_ERROR
from tests.triton_kernels.interpreter import interpreted

PLAIN = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "outputs"), [(3, 8), (20, 70)])
def test_kernel_and_reference_are_a_convolution(
    kernel: tuple[int, int], dtype: torch.dtype, channels: int, outputs: int
) -> None:
    images, height, width = size = (2, 5, 7)
    x = torch.randn(images, channels, height, width).to(dtype)
    weight = (torch.randn(outputs, channels, *kernel) / (9 * channels) ** 0.5).to(dtype)
    bias, residual = torch.randn(outputs), torch.randn(images * height * width, outputs)
    y = F.conv2d(x.double(), weight.double(), bias.double(), padding=(kernel[0] // 2, kernel[1] // 2))
    expected = (y.permute(0, 2, 3, 1).reshape(-1, outputs) + residual).float()
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels).contiguous()
    arguments = (rows, convolution.pack(weight), bias, size, kernel, residual, torch.float32)
    torch.testing.assert_close(convolution.reference(*arguments), expected, rtol=1e-4, atol=1e-4)
    with interpreted():
        found = convolution.launch_convolution(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", list(Unary))
def test_a_function_comes_before_the_residual_and_operands_may_be_columns(kind: Unary) -> None:
    wide, weight, bias = torch.randn(35, 12), torch.randn(9, 5, 6) / 5, torch.randn(6)
    residual = torch.randn(35, 6)
    arguments = (wide[:, 4:9], weight, bias, (1, 5, 7), (3, 3), residual, torch.float32, int(kind), 0.2)
    plain = convolution.reference(wide[:, 4:9].contiguous(), *arguments[1:5], None, torch.float32)
    expected = elementwise.unary(kind, plain, 0.2) + residual
    torch.testing.assert_close(convolution.reference(*arguments), expected)
    with interpreted():
        found = convolution.launch_convolution(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=GELU_ERROR + 1e-4)


def test_bias_and_residual_may_be_missing() -> None:
    x, weight = torch.randn(12, 4), torch.randn(1, 4, 6)
    with interpreted():
        found = convolution.launch_convolution(x, weight, None, (1, 3, 4), (1, 1), None, torch.bfloat16)
    torch.testing.assert_close(found, (x @ weight[0]).bfloat16())


@pytest.mark.parametrize(
    ("change", "fits"),
    [({}, True), ({0: [2, 2]}, False), ({1: [0, 0]}, False), ({2: [2, 2]}, False), ({3: True}, False), ({5: 2}, False)],
)
def test_what_the_kernel_takes(change: dict[int, object], fits: bool) -> None:
    geometry = [change.get(place, value) for place, value in enumerate(PLAIN)]
    assert convolution.takes(torch.zeros(4, 4, 3, 3), geometry) is fits
    assert not convolution.takes(torch.zeros(4, 4, 2, 2), PLAIN)


@pytest.mark.parametrize("x", [torch.zeros(11, 4), torch.zeros(12, 4).bfloat16(), torch.zeros(4, 12).t()])
def test_other_images_are_refused(x: Tensor) -> None:
    with pytest.raises(KernelError, match="fit"):
        convolution.launch_convolution(x, torch.zeros(1, 4, 6), None, (1, 3, 4), (1, 1), None, torch.float32)
