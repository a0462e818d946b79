"""Graphs for any number of images, from those for two and for three."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from harmoq_ao.export.batch import PAIR, BatchError, free_batch


class Windows(nn.Module):
    """Splits into windows and joins them as authors do: the number of images is that of windows by that of each."""

    def forward(self, image: Tensor) -> Tensor:
        b, c, h, w = image.shape
        windows = image.view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
        mean = windows.mean(1, keepdim=True).view(b, -1, 1, c)
        windows = windows.view(b, -1, 16, c) + mean + torch.arange(c).expand(b, 1, 16, c)
        count = int(windows.flatten(0, 1).shape[0] / (h * w / 16))
        return windows.reshape(count, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(count, c, h, w)


class Position(nn.Module):
    """Depends on the number of images other than by repetition."""

    def forward(self, image: Tensor) -> Tensor:
        return image * (image.shape[0] + 1)


def flat(module: nn.Module, batch: int) -> fx.GraphModule:
    program = torch.export.export(module, (torch.rand(batch, 3, 8, 12),)).run_decompositions({})
    return program.module(check_guards=False)


def test_one_graph_for_every_number_of_images() -> None:
    two, three = (flat(Windows(), batch) for batch in PAIR)
    free_batch(two, three)
    free = torch.export.export(two, (torch.rand(2, 3, 8, 12),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    for batch in (1, 2, 5):
        image = torch.rand(batch, 3, 8, 12)
        assert torch.equal(free.module(check_guards=False)(image), Windows()(image))


def test_what_depends_on_the_number_otherwise_is_refused() -> None:
    with pytest.raises(BatchError, match="for two images"):
        free_batch(*(flat(Position(), batch) for batch in PAIR))
