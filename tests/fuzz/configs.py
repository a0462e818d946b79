"""Mutations of configurations, as mappings and as rules of the command line."""

from __future__ import annotations

from random import Random
from typing import Any

from harmoq_ao.config import HarmoqConfig
from tests.fuzz.registry import Registry, odd_value

CONFIGS: Registry[Any] = Registry()
RULES: Registry[str] = Registry()


def _base() -> dict[str, Any]:
    rules = [{"sites": "*.qkv", "weight_bits": 8, "act_bits": 8}, {"kind": "matmul", "dynamic": True}]
    return HarmoqConfig(4, 4, "paper", rules=rules).to_dict()  # type: ignore[arg-type]


@CONFIGS.add
def intact(rng: Random) -> Any:
    return _base()


@CONFIGS.add
def one_odd_value(rng: Random) -> Any:
    config = _base()
    config[rng.choice(sorted(config))] = odd_value(rng)
    return config


@CONFIGS.add
def many_odd_values(rng: Random) -> Any:
    config = _base()
    return {name: odd_value(rng) if rng.random() < 0.4 else value for name, value in config.items()}


@CONFIGS.add
def odd_value_in_a_rule(rng: Random) -> Any:
    config = _base()
    rule = rng.choice(config["rules"])
    rule[rng.choice(("sites", "kind", "weight_bits", "act_bits", "dynamic", "joint_scale"))] = odd_value(rng)
    return config


@CONFIGS.add
def odd_rules(rng: Random) -> Any:
    return {**_base(), "rules": [odd_value(rng) for _ in range(rng.randint(1, 4))]}


@CONFIGS.add
def unknown_settings(rng: Random) -> Any:
    return {
        **_base(),
        rng.choice(("wieght_bits", "", "__class__", "settings", "self", "x" * 5000, 7, None)): odd_value(rng),
    }


@CONFIGS.add
def unknown_settings_in_a_rule(rng: Random) -> Any:
    return {**_base(), "rules": [{rng.choice(("bits", "", "matches", "self", 7)): odd_value(rng)}]}


@CONFIGS.add
def no_mapping(rng: Random) -> Any:
    return odd_value(rng)


@CONFIGS.add
def any_number_of_bits(rng: Random) -> Any:
    return {**_base(), rng.choice(("weight_bits", "act_bits", "conv_bits", "matmul_bits")): rng.randint(-40, 40)}


@RULES.add
def any_bits(rng: Random) -> str:
    return f"*.qkv:W{rng.randint(0, 40)}A{rng.randint(0, 40)}"


@RULES.add
def more_digits_than_a_number_has(rng: Random) -> str:
    return f"matmul:W{'9' * rng.choice((20, 400, 5000))}A8"


@RULES.add
def other_digits(rng: Random) -> str:
    return f"*:W{rng.choice('٣३８²')}A{rng.choice('٤४4')}"


@RULES.add
def other_forms(rng: Random) -> str:
    return rng.choice(
        ("", ":", ":W8A8", "*", "*:W8", "*:A8W8", "*:W8A8 ", "*:W-8A8", "*:W8.0A8", "a:b:W4A4", "\n:W8A8")
    )


@RULES.add
def noise(rng: Random) -> str:
    return "".join(rng.choice("*?[]:WA0128 .\0\n\ud800é") for _ in range(rng.randint(0, 30)))


@RULES.add
def odd_globs(rng: Random) -> str:
    return f"{rng.choice(('[', '[!', '[z-a]', '**', '(', '(?P<x>', '*' * 300))}:W4A4"
