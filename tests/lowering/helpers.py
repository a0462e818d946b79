"""What tests of fused kernels share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import harmoq_ao as h


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


class Network(nn.Module):
    """An attention of windows of 16 tokens with 8 channels between two convolutions."""

    def __init__(self, attention: nn.Module, masked: bool = False) -> None:
        super().__init__()
        self.head, self.attention, self.tail = nn.Conv2d(3, 8, 1), attention, nn.Conv2d(8, 3, 1)
        self.masked = masked

    def mask(self, windows: int) -> Tensor:
        """`[windows, 16, 16]`, of no regions."""
        return torch.where(torch.arange(windows * 256).reshape(-1, 16, 16) % 7 < 2, -100.0, 0.0)

    def forward(self, image: Tensor) -> Tensor:
        b, _, height, width = image.shape
        rows, columns = height // 4, width // 4
        tokens = self.head(image).reshape(b, 8, rows, 4, columns, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 8)
        mask = None
        if self.masked:
            mask = self.mask(rows * columns)
        y = self.attention(tokens, mask=mask).reshape(b, rows, columns, 4, 4, 8).permute(0, 5, 1, 3, 2, 4)
        return self.tail(y.reshape(b, 8, height, width))
