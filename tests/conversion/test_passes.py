"""Passes over converted models: outputs stay the same, and constants are not computed again."""

from __future__ import annotations

import copy

import pytest
import torch

from harmoq_ao.config import HarmoqConfig
from harmoq_ao.graph import is_island, island_state
from harmoq_ao.graph.exchange import Replacement, original_class, replacement_of
from harmoq_ao.graph.last_result import LastResult
from harmoq_ao.recipes.architectures import forward
from tests.graph.test_folding import count_calls
from tests.models import converted, entry

CONFIG = HarmoqConfig(8, 8, "paper")  # no float attention that is fused by graph


@pytest.mark.parametrize("name", ["DAT", "SwinIR/light", "GRL", "Swin2SR", "HAT"])
def test_folding_does_not_change_a_converted_model(name: str) -> None:
    architecture, quantized = entry(name), converted(name, CONFIG)
    plain = copy.deepcopy(quantized)
    for module in plain.modules():
        if is_island(module):
            state = island_state(module)
            state.passes = ()
            state.forget(module)
        elif replacement_of(module, Replacement) is not None:
            module.__class__ = original_class(module)
    for size in architecture.sizes:
        for batch in architecture.batches:
            image = architecture.example(size, batch, seed=batch)
            assert torch.equal(forward(quantized, image), forward(plain, image))


@pytest.mark.parametrize(("name", "network"), [("DAT", "pos_proj"), ("Swin2SR", "cpb_mlp.0")])
def test_position_networks_of_architectures_are_folded(name: str, network: str) -> None:
    architecture, quantized = entry(name), converted(name, CONFIG)
    forward(quantized, architecture.example())
    calls = [count_calls(m) for n, m in quantized.named_modules() if n.endswith(network)]
    assert calls
    forward(quantized, architecture.example(seed=8))
    assert not any(calls)


def test_position_networks_outside_of_islands_are_remembered() -> None:
    architecture, quantized = entry("GRL"), converted("GRL", CONFIG)
    forward(quantized, architecture.example())
    memories = [replacement_of(m, LastResult) for n, m in quantized.named_modules() if n.endswith("cpb_mlp.2")]
    kept = [memory.last[1] for memory in memories if memory is not None and memory.last is not None]
    assert len(kept) == len(memories) == 12
    forward(quantized, architecture.example(seed=8))
    again = [memory.last[1] for memory in memories if memory is not None and memory.last is not None]
    assert all(a is b for a, b in zip(kept, again, strict=True))
