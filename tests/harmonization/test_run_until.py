"""Forward passes that a hook ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harmoq_ao.harmonization.run_until import run_until_stopped, stop_forward


def test_nothing_behind_the_hook_runs() -> None:
    model = nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity())
    reached: list[int] = []
    for index, module in enumerate(model):
        module.register_forward_hook(lambda m, i, o, index=index: reached.append(index))
    handle = model[1].register_forward_hook(lambda m, i, o: stop_forward())
    assert run_until_stopped(model, torch.zeros(1))
    assert reached == [0, 1]
    handle.remove()
    assert not run_until_stopped(model, torch.zeros(1))
    assert reached == [0, 1, 0, 1, 2]


def test_errors_of_the_model_are_its_own() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run_until_stopped(nn.Linear(3, 2), torch.zeros(1, 5))
