"""Which modules are found to contract what."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmoq_ao.graph import Discovery, discovering


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v


class _Large(nn.Module):
    """Contracts only on long inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bnc,bmc->bnm", x, x)[:, :, :8] if x.shape[1] > 6 else x


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 1)
        self.image = nn.Conv2d(1, 1, 3, padding=1)
        self.attention = _Attention()
        self.twice = nn.Linear(8, 8)
        self.large = _Large()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.image(x[:, None])[:, 0]
        x = self.attention(x)
        return F.linear(self.large(self.twice(self.twice(x))), self.weight)


def discover(model: nn.Module, *images: Tensor) -> Discovery:
    total = Discovery()
    for image in images:
        with discovering(model) as found:
            model(image)
        total.add(found)
    return total


def test_islands_calls_and_macs() -> None:
    model = _Model().eval()
    found = discover(model, torch.rand(2, 5, 8))
    assert found.islands == ["attention", ""]
    assert found.calls == {"image": 1, "attention.qkv": 1, "twice": 2}
    assert found.macs["attention.qkv"] == 2 * 5 * 8 * 24
    assert found.macs["attention"] == 2 * (2 * 5 * 5 * 8)
    assert found.macs["twice"] == 2 * (2 * 5 * 8 * 8)
    assert found.macs["image"] == 2 * 5 * 8 * 9


def test_further_examples_add_islands() -> None:
    found = discover(_Model().eval(), torch.rand(2, 5, 8), torch.rand(1, 9, 8))
    assert found.islands == ["attention", "", "large"]
    assert found.macs["attention.qkv"] == 2 * 5 * 8 * 24  # of the first example


def test_shared_modules_are_one() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(model[0])
    assert discover(model, torch.rand(3, 4)).calls == {"0": 2}


def test_hooks_are_gone_afterwards_even_after_an_error() -> None:
    model = _Model().eval()
    with pytest.raises(RuntimeError):
        discover(model, torch.rand(2, 5, 7))
    discover(model, torch.rand(2, 5, 8))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_multihead_attention_is_an_island() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return result

    assert discover(Model().eval(), torch.rand(2, 5, 8)).islands == ["attention"]
