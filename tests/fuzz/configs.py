"""Configurations that nobody should write, as mappings and as rules of the command line."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

from harmoq_ao.config import HarmoqConfig
from tests.fuzz.damage import ODD, any_of

_RULES: Any = [{"sites": "*.qkv", "weight_bits": 8, "act_bits": 8}, {"kind": "matmul", "dynamic": True}]
_BASE = HarmoqConfig(4, 4, "paper", rules=_RULES).to_dict()
_NAMES = sorted(_BASE)


def _with(names: st.SearchStrategy[Any], values: st.SearchStrategy[Any] = ODD) -> st.SearchStrategy[Any]:
    """The configuration with one setting more, or another."""
    return st.builds(lambda name, value: {**copy.deepcopy(_BASE), name: value}, names, values)


def _odd_rule(index: int, name: str, value: Any) -> Any:
    config = copy.deepcopy(_BASE)
    config["rules"][index][name] = value
    return config


CONFIGS: st.SearchStrategy[Any] = st.one_of(
    st.builds(lambda: copy.deepcopy(_BASE)),
    _with(st.sampled_from(_NAMES)),  # one odd value
    st.fixed_dictionaries({name: st.just(value) | ODD for name, value in _BASE.items()}),  # many
    st.builds(
        _odd_rule,
        st.integers(0, 1),
        any_of("sites", "kind", "weight_bits", "act_bits", "dynamic", "joint_scale"),
        ODD,
    ),
    _with(st.just("rules"), st.lists(ODD, min_size=1, max_size=4)),
    _with(any_of("wieght_bits", "", "__class__", "settings", "self", "x" * 5000, 7, None)),
    _with(st.just("rules"), st.builds(lambda n, v: [{n: v}], any_of("bits", "", "matches", "self", 7), ODD)),
    ODD,
    _with(any_of("weight_bits", "act_bits", "conv_bits", "matmul_bits"), st.integers(-40, 40)),
)

RULES: st.SearchStrategy[str] = st.one_of(
    st.builds("*.qkv:W{}A{}".format, st.integers(0, 40), st.integers(0, 40)),
    st.builds(lambda digits: f"matmul:W{'9' * digits}A8", any_of(20, 400, 5000)),
    st.builds("*:W{}A{}".format, any_of(*"٣३８²"), any_of(*"٤४4")),
    any_of("", ":", ":W8A8", "*", "*:W8", "*:A8W8", "*:W8A8 ", "*:W-8A8", "*:W8.0A8", "a:b:W4A4", "\n:W8A8"),
    st.text("*?[]:WA0128 .\0\n\ud800é", max_size=30),
    st.builds("{}:W4A4".format, any_of("[", "[!", "[z-a]", "**", "(", "(?P<x>", "*" * 300)),
)
