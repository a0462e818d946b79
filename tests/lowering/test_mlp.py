"""MLPs are recognised, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from harmoq_ao.config import HarmoqConfig
from harmoq_ao.graph.exchange import replacement_of
from harmoq_ao.lowering.fusing import Misfit
from harmoq_ao.lowering.mlp import FusedMlp, find_mlp
from tests.lowering.helpers import quantize


class Perceptron(nn.Module):
    def __init__(self, act: nn.Module, extra: str = "") -> None:
        super().__init__()
        self.fc1, self.act, self.fc2, self.extra = nn.Linear(8, 16), act, nn.Linear(16, 8), extra
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.act(self.fc1(x)))
        if self.extra == "branch" and x.shape[0] > 3:
            y = y * 2
        if self.extra == "scaled":
            y = y * 0.999
        y = self.drop(self.fc2(y))
        return y + x if self.extra == "residual" else y


@pytest.mark.parametrize(
    ("act", "extra", "expected"),
    [
        (nn.GELU(), "", "erf"),
        (nn.GELU(approximate="tanh"), "", "tanh"),
        (nn.ReLU(), "", None),
        (nn.GELU(), "branch", None),
        (nn.GELU(), "scaled", None),
        (nn.GELU(), "residual", None),
    ],
    ids=["erf", "tanh", "relu", "branch", "scaled", "residual"],
)
def test_perceptrons(act: nn.Module, extra: str, expected: str | None) -> None:
    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.mlp, self.tail = nn.Linear(3, 8), Perceptron(act, extra), nn.Linear(8, 3)

        def forward(self, image: Tensor) -> Tensor:
            return self.tail(self.mlp(self.head(image.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)

    torch.manual_seed(0)
    example = torch.rand(1, 3, 8, 8)
    quantized = quantize(Pixels(), HarmoqConfig(8, 8), example)
    module = quantized.model.mlp
    found = replacement_of(module, FusedMlp)
    assert (None if found is None else found.gelu) == expected
    if expected is None:
        with pytest.raises(Misfit):
            find_mlp(module)
    chained = quantized(example)
    quantized.use_reference()
    torch.testing.assert_close(chained, quantized(example), atol=1e-4, rtol=1e-4)
    assert {name.partition(".")[0] for name in module.state_dict()} == {"fc1", "fc2"}


def test_a_sequence_is_a_perceptron_and_its_slices_are_none() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))
    model = nn.Sequential(nn.Conv2d(3, 8, 8), nn.Flatten(), layers, nn.Unflatten(1, (2, 2, 2)))
    example = torch.rand(4, 3, 8, 8)
    quantized = quantize(model, HarmoqConfig(8, 8), example)
    lowered, ones = quantized.model[2], torch.ones(1, 8)
    assert torch.equal(lowered[:2](ones), lowered[1](lowered[0](ones)))
    found = quantized(example)
    quantized.use_reference()
    torch.testing.assert_close(found, quantized(example), atol=1e-5, rtol=1e-5)
