"""Constant folding never changes an output, and what it folds is not computed again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harmoq_ao.graph import IslandState, finish_graphs, island_state, make_island
from harmoq_ao.graph.folding import fold_variant
from tests.graph.test_tracer import follow


def _island(module: nn.Module) -> nn.Module:
    twin = copy.deepcopy(module).eval()
    make_island(twin, IslandState("island", lambda root, contraction: None, strict=True))
    return twin


def _folded(module: nn.Module, *args: Any) -> nn.Module:
    """An island folded after one call."""
    twin = _island(module)
    twin(*args)
    finish_graphs(twin, (fold_variant,))
    return twin


class _Bias(nn.Module):
    """Attention with a bias made by a small network on fixed coordinates, as Swin V2."""

    def __init__(self, prepare: Callable[[Tensor, Tensor], Tensor] = lambda bias, x: bias) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 8), nn.ReLU(inplace=True), nn.Linear(8, 1))
        self.register_buffer("coordinates", torch.rand(5, 5, 2))
        self.prepare = prepare

    def forward(self, x: Tensor) -> Tensor:
        bias = 16 * torch.sigmoid(self.network(self.coordinates).squeeze(-1))
        bias = self.prepare(bias, x)
        return (x @ x.transpose(-2, -1) + bias).softmax(-1) @ x


def count_calls(module: nn.Module) -> list[int]:
    """A list that grows by one with every call of a module."""
    calls: list[int] = []
    module.register_forward_hook(lambda m, i, o: calls.append(1))
    return calls


def test_position_networks_are_not_computed_again() -> None:
    module = _Bias().eval()
    x = torch.randn(2, 5, 3)
    twin = _folded(module, x)
    calls = count_calls(twin.network)
    for batch in (1, 2, 4):
        x = torch.randn(batch, 5, 3)
        assert torch.equal(twin(x), module(x))
    assert calls == []


def test_graphs_traced_after_folding_are_folded() -> None:
    module = _Bias().eval()
    twin = _folded(module, torch.randn(2, 5, 3))
    x = torch.randn(1, 2, 5, 3)  # another calling pattern
    assert torch.equal(twin(x), module(x))
    calls = count_calls(twin.network)
    assert torch.equal(twin(x * 2), module(x * 2))
    assert calls == []


def test_equal_tables_are_kept_once() -> None:
    twin = _folded(_Bias(), torch.randn(2, 5, 3))
    twin(torch.randn(1, 2, 5, 3))
    assert len([n for n in twin._buffers if n.startswith("harmoq_folded_")]) == 1
    assert "harmoq_folded_0" not in twin.state_dict()


def _directly(bias: Tensor, x: Tensor) -> Tensor:
    bias += x.mean()
    return bias


def _through_view(bias: Tensor, x: Tensor) -> Tensor:
    bias[:, : x.shape[1] // 2].view(-1, x.shape[1] // 2).add_(x.mean())
    return bias


def _item(bias: Tensor, x: Tensor) -> Tensor:
    part = bias[: x.shape[1] - 1]
    part[0] = x[0, 0, 0]
    return bias


def _function(bias: Tensor, x: Tensor) -> Tensor:
    torch.relu_(bias.sub_(8))
    return bias * x.mean()


def _inplace_option(bias: Tensor, x: Tensor) -> Tensor:
    torch.nn.functional.leaky_relu(bias - 8, 0.1, inplace=True)
    shifted = bias - 8
    torch.nn.functional.leaky_relu(shifted[: x.shape[1]], 0.1, inplace=True)
    return shifted


def _constant(bias: Tensor, x: Tensor) -> Tensor:
    mask = torch.zeros(5, 5)
    mask[0] = 1
    mask[1:, 0] -= 3
    return bias + mask


def _copied(bias: Tensor, x: Tensor) -> Tensor:
    plus = bias + 1
    plus.copy_(plus * x.mean())
    return plus + bias


@pytest.mark.parametrize(
    "prepare",
    [
        *(_directly, _through_view, _item, _function, _inplace_option, _constant, _copied),
        lambda bias, x: bias + torch.randn(5, 5),
        lambda bias, x: bias + torch.normal(torch.zeros(5), torch.ones(5)),
        lambda bias, x: bias + torch.dropout(torch.ones(5), 0.5, True),
        lambda bias, x: bias + torch.zeros(5).exponential_(),
        lambda bias, x: bias + torch.randperm(5),
    ],
)
def test_what_is_written_to_or_drawn_is_not_folded(prepare: Callable[[Tensor, Tensor], Tensor]) -> None:
    module = _Bias(prepare).eval()
    twin = _folded(module, torch.randn(2, 5, 3))
    for seed in range(4):
        follow(module, twin, torch.randn(2, 5, 3), seed=seed)


class _Returns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ x.transpose(-2, -1), self.table * 2


def test_a_constant_result_may_be_written_to_by_the_caller() -> None:
    module = _Returns().eval()
    x = torch.randn(1, 3, 2)
    twin = _folded(module, x)
    with torch.no_grad():
        twin(x)[1].zero_()
    assert torch.equal(twin(x)[1], module(x)[1])


def test_folding_leaves_the_given_graph_alone() -> None:
    module = _Bias().eval()
    twin = _island(module)
    x = torch.randn(2, 5, 3)
    twin(x)
    variant = island_state(twin).all_variants()[0]
    before = str(variant.graph)
    folded = fold_variant(twin, variant)
    assert str(variant.graph) == before
    assert folded.graph is not variant.graph
    assert (folded.contractions, folded.reads) == (variant.contractions, variant.reads)
    assert torch.equal(folded.run(twin, x), module(x))
