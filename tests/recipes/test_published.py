"""Layouts of published networks: those of the architectures with their authors' settings, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from spandrel.architectures.CRAFT import CRAFT
from torch import nn

from benchmarks.peers import hat_s, swinir_light
from harmoq_ao.recipes import options
from harmoq_ao.recipes.published import PUBLISHED, describe, layout
from tests.recipes.studies import write_checkpoint

BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    "SwinIR-light": swinir_light,
    "HAT-S": hat_s,
    "CRAFT": lambda scale: CRAFT(upscale=scale),
}


@pytest.mark.parametrize("name", [entry.name for entry in PUBLISHED])
def test_a_layout_is_that_of_the_network(name: str) -> None:
    (entry,) = (e for e in PUBLISHED if e.name == name)
    family, _, scale = name.partition(" x")
    assert layout(BUILDERS[family](int(scale)).named_parameters()) == entry.layout


def test_layouts_ignore_values_and_order_and_see_names_and_shapes() -> None:
    parameters = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    same = {"b": torch.ones(4), "a": torch.ones(2, 3)}
    assert layout(parameters.items()) == layout(same.items())
    others = ({"a": torch.zeros(3, 2), "b": torch.zeros(4)}, {"a": torch.zeros(2, 3), "c": torch.zeros(4)})
    assert len({layout(p.items()) for p in (parameters, *others)}) == 3


def test_a_table_says_what_it_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = options.loader([write_checkpoint(tmp_path / "mine.pth")])(2)
    expected = f"SwinIR x2, layout {layout(loaded.model.named_parameters())}"
    assert capsys.readouterr().err.strip() == f"mine.pth: {expected}"
    assert describe(loaded) == expected, "a toy is none of those published"
    published = replace(loaded, model=swinir_light(2))
    assert describe(published).endswith("that of SwinIR-light x2 as published")
