"""Convolutions exchanged for sites, or left float with a reason."""

from __future__ import annotations

import torch
from torch import nn

from harmoq_ao import HarmoqConfig, prepare_harmoq
from harmoq_ao.recipes.architectures import forward
from harmoq_ao.sites import PreparedConv2d
from tests.preparation.helpers import SWINIR, prepare


def test_convolutions_on_request() -> None:
    assert not [m for m in prepare().sites() if isinstance(m, PreparedConv2d)]
    prepared = prepare(HarmoqConfig(conv_bits=8))
    convolutions = [m for m in SWINIR.build().modules() if type(m) is nn.Conv2d]
    sites = [m for m in prepared.sites() if isinstance(m, PreparedConv2d)]
    assert len(sites) == len(convolutions)
    assert not [f for f in prepared.floats if f.kind == "conv2d"]
    image = SWINIR.example((16, 24), 2, seed=4)
    assert torch.equal(forward(SWINIR.build(), image), forward(prepared, image))


def test_a_convolution_without_integer_form_says_why() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), nn.Conv2d(3, 3, 3))
    prepared = prepare_harmoq(model, HarmoqConfig(conv_bits=8), torch.rand(1, 3, 8, 8))
    assert [f.name for f in prepared.floats] == ["0"]
    assert "reflect" in prepared.floats[0].reason.text
