"""Configurations, and calibrated models compared."""

from __future__ import annotations

import torch
from torch import Tensor

import harmoq_ao as h
from harmoq_ao.config import HarmoqConfig

PAPER = HarmoqConfig(4, 4, "paper")
DEPLOY = HarmoqConfig(8, 8)
NAMES = ("forms", "SwinIR/light", "DAT")


def _facts(prepared: h.PreparedModel) -> dict[str, Tensor]:
    """Joint scales and bounds by site, and the reported ratio."""
    facts: dict[str, Tensor] = {}
    for module in prepared.sites():
        facts |= {f"{module.site.name} {name}": p for name, p in module.named_parameters() if "er" in name}
        if module.joint_scale is not None:
            facts[f"{module.site.name} s"] = module.joint_scale
        if module.site.sqnr_db is not None:
            facts[f"{module.site.name} dB"] = torch.tensor(module.site.sqnr_db)
    return facts


def assert_same(first: h.PreparedModel, second: h.PreparedModel) -> None:
    one, two = _facts(first), _facts(second)
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
