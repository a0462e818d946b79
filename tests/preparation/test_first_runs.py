"""What preparation learns from running the float model, and how often it runs it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from harmoq_ao import prepare_harmoq
from harmoq_ao.common.errors import InputError
from harmoq_ao.preparation.first_runs import first_runs


class _Attention(nn.Module):
    """Attention within rows of tokens, with a bias that a linear layer computes from places."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.places = nn.Linear(2, 1)

    def forward(self, rows: Tensor) -> Tensor:
        q, k, v = self.qkv(rows).chunk(3, -1)
        length = rows.shape[-2]
        bias = self.places(torch.arange(2.0 * length).reshape(length, 2)).transpose(0, 1)
        return (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v


class _Windows(nn.Module):
    """Takes widths that are multiples of a window; notes the size of every image."""

    def __init__(self, window: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.attention = _Attention()
        self.window = window
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(tuple(x.shape[2:]))
        assert x.shape[-1] % self.window == 0, "the width must be a multiple of the window"
        return self.attention(self.conv(x).permute(0, 2, 3, 1).unflatten(2, (-1, self.window)))


CALLS = {"conv": 1, "attention.qkv": 1, "attention.places": 1}


def test_layers_whose_input_no_image_changes() -> None:
    first = first_runs(_Windows().eval(), None)
    assert first.fixed == {"attention.places"}
    assert first.found.calls == CALLS
    assert first.found.islands == ["attention"]


@torch.no_grad()
def test_outputs_are_those_of_the_model() -> None:
    model = _Windows().eval()
    for example, output in first_runs(model, [torch.rand(1, 3, 8, 16), torch.rand(2, 3, 4, 8)]).runs:
        assert torch.equal(output, model(example))


def test_a_second_size_that_the_model_refuses_is_left_out() -> None:
    assert [run.example.shape[2:] for run in first_runs(_Windows().eval(), None).runs] == [(64, 64), (48, 72)]
    model = _Windows(window=16).eval()
    first = first_runs(model, None)
    assert [run.example.shape[2:] for run in first.runs] == [(64, 64)]
    assert first.found.calls == CALLS
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_first_size_or_a_given_one_that_the_model_refuses_is_an_error() -> None:
    with pytest.raises(InputError, match="does not run on the example"):
        first_runs(_Windows(window=48).eval(), None)
    with pytest.raises(InputError, match="does not run on the example"):
        first_runs(_Windows().eval(), [torch.rand(1, 3, 16, 16), torch.rand(1, 1, 16, 16)])


def test_how_often_preparation_runs_the_model() -> None:
    model = _Windows()
    prepared = prepare_harmoq(model)
    assert not model.sizes  # a copy is prepared
    one, two = (64, 64), (48, 72)
    first, traced, measured = [one, two, one], [one, two], [one, two]  # the third is another image of the first size
    assert prepared.model.sizes == first + traced + measured
