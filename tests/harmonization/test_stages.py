"""Stages are the repeated blocks of a network."""

from __future__ import annotations

import pytest

import harmoq_ao as h
from harmoq_ao.harmonization.stages import find_stages
from tests.models import calibrated

W3A3 = h.HarmoqConfig(3, 3, profile="paper")


@pytest.mark.parametrize("name", ["DAT/light", "SwinIR/light", "HAT"])
def test_stages_are_the_transformer_blocks(name: str) -> None:
    prepared = calibrated(name, W3A3)
    stages = find_stages(prepared)
    assert len(stages) >= 2
    assert len({type(s.module).__name__ for s in stages}) == 1
    seen = [id(site) for stage in stages for site in stage.sites]
    assert len(seen) == len(set(seen))
    assert all(len({site.site.kind for site in stage.sites}) == 2 for stage in stages)
