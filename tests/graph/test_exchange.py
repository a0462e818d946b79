"""Another forward for a module that stays the same object."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from harmoq_ao.graph.exchange import Replacement, exchange, original_class, replacement_of


class Doubled(Replacement):
    """Twice what the author's forward returns; counts how often it was told to forget."""

    def __init__(self) -> None:
        self.forgotten = 0

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return 2 * original_class(module).forward(module, *args, **kwargs)

    def forget(self, module: nn.Module) -> None:
        self.forgotten += 1


def test_the_object_its_parameters_and_its_type_stay() -> None:
    module, x = nn.Linear(3, 2), torch.randn(4, 3)
    expected, names, weight = 2 * module(x), list(module.state_dict()), module.weight
    exchange(module, Doubled())
    assert torch.equal(module(x), expected)
    assert list(module.state_dict()) == names
    assert module.weight is weight
    assert isinstance(module, nn.Linear)
    assert original_class(module) is nn.Linear
    assert type(nn.Linear(3, 2)) is nn.Linear, "other modules of the class are left alone"


def test_a_copy_keeps_a_state_of_its_own() -> None:
    module = nn.Linear(3, 2)
    exchange(module, Doubled())
    twin = copy.deepcopy(module)
    twin.to(torch.bfloat16)
    assert replacement_of(twin, Doubled).forgotten == 1
    assert replacement_of(module, Doubled).forgotten == 0


def test_only_another_type_makes_it_forget() -> None:
    module = nn.Linear(3, 2)
    exchange(module, Doubled())
    module.to(torch.float32)
    assert replacement_of(module, Doubled).forgotten == 0
    module.double()
    assert replacement_of(module, Doubled).forgotten == 1


def test_a_slice_of_a_sequence_has_no_replacement() -> None:
    module, x = nn.Sequential(nn.Identity(), nn.Identity()), torch.randn(2)
    exchange(module, Doubled())
    assert torch.equal(module(x), 2 * x)
    part = module[:1]
    assert replacement_of(part, Replacement) is None
    assert torch.equal(part(x), x)
