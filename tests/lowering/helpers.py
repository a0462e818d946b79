"""What tests of fused kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import harmoq_ao as h
from harmoq_ao.triton_kernels import attention, lowbit_linear, mlp, window_attention
from tests.triton_kernels.interpreter import interpreted


@contextmanager
def kernel_references() -> Iterator[dict[str, mock.Mock]]:
    """Every Triton kernel is replaced by its reference in plain torch; calls are counted."""
    with (
        mock.patch.object(lowbit_linear, "launch_lowbit_linear", wraps=lowbit_linear.reference) as linear,
        mock.patch.object(mlp, "launch_mlp", wraps=mlp.reference) as perceptron,
        mock.patch.object(window_attention, "launch_window_attention", wraps=window_attention.reference) as window,
        mock.patch.object(attention, "launch_attention", wraps=attention.reference) as core,
    ):
        yield {"linear": linear, "mlp": perceptron, "attention": window, "core": core}


def assert_same_image(found: Tensor, expected: Tensor, share: float = 0.999) -> None:
    """Within one 8-bit level everywhere, and the same level for that share of values."""
    levels = [(image.clamp(0, 1) * 255).round() for image in (found, expected)]
    difference = (levels[0] - levels[1]).abs()
    assert difference.max() <= 1
    assert (difference == 0).float().mean() >= share


def quantize(model: nn.Module, config: h.HarmoqConfig, example: Tensor | None = None) -> h.QuantizedModel:
    """A model converted after calibration on its one example."""
    example = torch.rand(2, 3, 8, 12) if example is None else example
    prepared = h.prepare_harmoq(model.eval(), config, [example], strict=True)
    return h.convert_harmoq(h.calibrate(prepared, [example], show_progress=False))


def both_ways(model: h.QuantizedModel, image: Tensor, kernel: str, on: Any = "reference") -> tuple[Tensor, Tensor, int]:
    """The image by the author's graph on a backend without Triton, by the lowered one, and how often its kernel ran."""
    model.use_backend(on)
    expected = model(image)
    model.use_backend("triton")
    with kernel_references() as kernels:
        return expected, model(image), kernels[kernel].call_count


def check_interpreted(quantized: h.QuantizedModel, image: Tensor) -> None:
    """The interpreted kernels and plain integers give the same small image, but for a few of its values."""
    quantized.use_backend("reference")
    expected = quantized(image)
    quantized.use_backend("triton")
    with interpreted():
        assert_same_image(quantized(image), expected, 0.97)  # 192 values, and 16-bit floats


class Network(nn.Module):
    """An attention of windows of 16 tokens with 8 channels between two convolutions."""

    def __init__(self, attention: nn.Module, masked: bool = False) -> None:
        super().__init__()
        self.head, self.attention, self.tail = nn.Conv2d(3, 8, 1), attention, nn.Conv2d(8, 3, 1)
        self.masked = masked

    def forward(self, image: Tensor) -> Tensor:
        b, _, height, width = image.shape
        rows, columns = height // 4, width // 4
        tokens = self.head(image).reshape(b, 8, rows, 4, columns, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 8)
        mask = None
        if self.masked:
            places = torch.arange(rows * columns * 256, dtype=image.dtype).reshape(-1, 16, 16)
            mask = torch.where(places % 7 < 2, -100.0, 0.0)
        y = self.attention(tokens, mask=mask).reshape(b, rows, columns, 4, 4, 8).permute(0, 5, 1, 3, 2, 4)
        return self.tail(y.reshape(b, 8, height, width))
