"""Modules that keep their last result: computed again whenever the input, the type or the result itself changed."""

from __future__ import annotations

import copy

import torch
from torch import nn

from harmoq_ao.graph.last_result import remember
from tests.graph.test_folding import count_calls


def test_remembered_modules_compute_when_their_input_changes() -> None:
    module = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    twin = copy.deepcopy(module)
    remember(twin)
    calls = count_calls(twin[0])
    a, b = torch.rand(5, 2), torch.rand(5, 2)
    with torch.no_grad():
        for x, expected in ((a, 1), (a, 1), (a.clone(), 1), (b, 2), (b[:3], 3), (b, 4)):
            assert torch.equal(twin(x), module(x))
            assert len(calls) == expected
        b += 1  # the same tensor with other values
        assert torch.equal(twin(b), module(b))
    assert list(twin.state_dict()) == list(module.state_dict())


def test_remembered_results_survive_a_caller_that_writes_into_them() -> None:
    module = nn.Linear(2, 4)
    twin = copy.deepcopy(module)
    remember(twin)
    x = torch.rand(5, 2)
    with torch.no_grad():
        twin(x).mul_(2)
        assert torch.equal(twin(x), module(x))


def test_another_float_type_is_computed_again() -> None:
    module = nn.Linear(2, 4)
    remember(module)
    x = torch.rand(5, 2)
    first = module(x)
    assert module(x) is first
    assert module.double()(x.double()).dtype == torch.float64
    assert module.float()(x) is not first
