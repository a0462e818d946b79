"""2DQuant: only bounds change, and the network comes closer to the float one."""

from __future__ import annotations

import pytest
import torch

from harmoq_ao.baselines import learning
from harmoq_ao.config import HarmoqConfig
from tests.baselines.helpers import applied, changed, learned_tensors
from tests.models import PER_TOKEN, build

BOUNDS = (".lower", ".upper")


@pytest.mark.parametrize("name", ["forms", "SwinIR/light"])
def test_the_distillation_loss_falls_and_only_bounds_change(name: str) -> None:
    names, learned = learned_tensors("2dquant", name, HarmoqConfig(2, 2, "paper"))
    assert all(name.endswith(BOUNDS) for name in names)
    assert any(".act_quantizer." in name for name in names)
    weights = [name for name in names if ".weight_quantizer." in name and learned.state_dict()[name].numel() > 1]
    assert weights, "bounds of weights are distilled too"


def test_the_first_stage_is_dobi() -> None:
    config = HarmoqConfig(3, 3, "paper")
    assert not changed(applied("dobi", "forms", config), applied("2dquant", "forms", config, steps=0))


def test_dynamic_activations_leave_the_bounds_of_weights_to_learn() -> None:
    config = HarmoqConfig(4, 4, "deploy", rules=PER_TOKEN)
    names = changed(*(applied("2dquant", "linears", config, steps=steps) for steps in (0, 3)))
    assert names
    assert all(".weight_quantizer." in name for name in names)


def test_nothing_to_learn_takes_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamic activations, and weights of 8 bits, whose codes are fixed around zero."""
    monkeypatch.setattr(learning, "refine", lambda *_, **__: pytest.fail("there is nothing to learn"))
    prepared = applied("2dquant", "linears", HarmoqConfig(8, 4, "deploy", rules=PER_TOKEN), steps=3)
    assert torch.equal(prepared.model.one.weight, build("linears").one.weight)
