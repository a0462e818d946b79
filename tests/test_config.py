"""Configurations: refused when written down if they are wrong, and resolved rule by rule."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmoq_ao.common.errors import ConfigError, HarmoqError
from harmoq_ao.config import HarmoqConfig, SiteRule
from harmoq_ao.quant.quantizer import OFF_BITS, QUANTIZED_BITS, Granularity, Scheme

BITS = QUANTIZED_BITS + OFF_BITS
SITES = [("layers.0.attn.qkv", "linear"), ("layers.0.attn::matmul_0", "matmul"), ("layers.1.mlp.fc1", "linear")]

junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.builds(object),
    st.just({2}),
)
rules = st.builds(
    SiteRule,
    sites=st.text(min_size=1, max_size=12),
    kind=st.sampled_from(["linear", "matmul", "conv2d", None]),
    weight_bits=st.sampled_from((*BITS, None)),
    act_bits=st.sampled_from((*BITS, None)),
    dynamic=st.sampled_from([True, False, None]),
    joint_scale=st.sampled_from(["hso", "none", None]),
)
configs = st.builds(
    HarmoqConfig,
    weight_bits=st.sampled_from(BITS),
    act_bits=st.sampled_from(BITS),
    profile=st.sampled_from(["deploy", "paper"]),
    rules=st.lists(rules, max_size=3),
    observer=st.sampled_from(["minmax", "percentile", "mse", "histogram"]),
    joint_scale=st.sampled_from(["hso", "none"]),
    matmul_bits=st.sampled_from((*BITS, None)),
    conv_bits=st.sampled_from(BITS),
    storage_dtype=st.sampled_from(["auto", "float16", "bfloat16", "float32"]),
    seed=st.integers(0, 2**63 - 1),
)


def test_configurations_with_a_searched_joint_scale_are_read_as_its_successor() -> None:
    written = HarmoqConfig(rules=(SiteRule("a", joint_scale="none"),)).to_dict()
    written["joint_scale"] = "search"
    written["rules"].append({"sites": "b", "joint_scale": "search"})
    config = HarmoqConfig.from_dict(written)
    assert [config.settings(name, "linear").joint_scale for name in "abc"] == ["none", "hso", "hso"]


@pytest.mark.parametrize("field", [f.name for f in fields(HarmoqConfig)])
@given(value=junk)
def test_junk_in_a_setting_is_refused_by_name_or_accepted(field: str, value: Any) -> None:
    try:
        config = HarmoqConfig(**{field: value})
    except ConfigError:
        return
    assert HarmoqConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("field", [f.name for f in fields(SiteRule)])
@given(value=junk)
def test_junk_in_a_rule_is_refused_by_name_or_accepted(field: str, value: Any) -> None:
    try:
        rule = SiteRule(**{field: value})
    except ConfigError:
        return
    assert rule.matches("a.b", "linear") in (True, False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight_bits", 1),
        ("weight_bits", 9),
        ("weight_bits", 4.0),
        ("weight_bits", True),
        ("act_bits", 0),
        ("act_bits", "8"),
        ("act_bits", None),
        ("conv_bits", 64),
        ("matmul_bits", 12),
        ("profile", "fast"),
        ("profile", None),
        ("observer", "max"),
        ("joint_scale", None),
        ("storage_dtype", "float64"),
        ("seed", -1),
        ("seed", True),
        ("seed", 2**63),
        ("seed", 0.0),
        ("rules", "*"),
        ("rules", None),
        ("rules", ["*"]),
        ("rules", SiteRule()),
        ("rules", [{"sites": "*", "bits": 4}]),
        ("rules", [{"sites": 3}]),
    ],
)
def test_settings_outside_their_set_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError):
        HarmoqConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sites", ""),
        ("sites", None),
        ("kind", "lstm"),
        ("weight_bits", 1),
        ("act_bits", 33),
        ("dynamic", 1),
        ("dynamic", "yes"),
        ("joint_scale", "max"),
    ],
)
def test_rules_outside_their_set_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError):
        SiteRule(**{field: value})


def test_a_misspelt_choice_is_corrected() -> None:
    with pytest.raises(ConfigError, match="did you mean 'paper'"):
        HarmoqConfig(profile="papr")  # type: ignore[arg-type]


def test_errors_are_value_errors_of_the_project() -> None:
    with pytest.raises(ValueError, match="Unsupported bit width") as caught:
        HarmoqConfig(weight_bits=1)
    assert isinstance(caught.value, HarmoqError)
    assert caught.value.remedy


@given(configs)
def test_a_configuration_survives_json(config: HarmoqConfig) -> None:
    assert HarmoqConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("data", [None, 3, "w8a8", [], [("weight_bits", 8)]])
def test_a_configuration_that_is_no_mapping_is_refused(data: Any) -> None:
    with pytest.raises(ConfigError, match="mapping"):
        HarmoqConfig.from_dict(data)


def test_an_unknown_setting_is_refused_with_the_close_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        HarmoqConfig.from_dict({"weigth_bits": 8})
    assert caught.value.found == "weigth_bits"
    assert "weight_bits" in str(caught.value.expected)


@given(st.dictionaries(st.one_of(st.text(max_size=6), st.integers(), st.none()), junk, max_size=3))
def test_any_mapping_gives_a_configuration_or_a_config_error(data: dict[Any, Any]) -> None:
    try:
        older = HarmoqConfig(relative_maps=False, rms_ranges=False)  # files that do not say have neither
        assert HarmoqConfig.from_dict(data) == older
    except ConfigError:
        assert data


# --- rules ------------------------------------------------------------------------------------------------------------


def _bits(config: HarmoqConfig, name: str, kind: str = "linear") -> tuple[int, int]:
    settings = config.settings(name, kind)
    return settings.weight.bits, settings.act.bits


def test_the_last_matching_rule_wins() -> None:
    config = HarmoqConfig(
        rules=[SiteRule("*", weight_bits=4), SiteRule("*.qkv", weight_bits=6), SiteRule("layers.1.*", weight_bits=2)]
    )
    assert _bits(config, "head") == (4, 8)
    assert _bits(config, "layers.0.qkv") == (6, 8)
    assert _bits(config, "layers.1.qkv") == (2, 8)


def test_a_rule_leaves_what_it_does_not_name() -> None:
    rules = [SiteRule("a", weight_bits=3), SiteRule("a", act_bits=5), SiteRule("a", dynamic=True)]
    config = HarmoqConfig(4, 4, rules=rules)
    settings = config.settings("a", "linear")
    assert (settings.weight.bits, settings.act.bits, settings.act.dynamic) == (3, 5, True)
    assert not config.settings("b", "linear").act.dynamic


def test_rules_select_by_kind() -> None:
    rules = [SiteRule(kind="matmul", weight_bits=8, act_bits=8), SiteRule(kind="linear", act_bits=4)]
    config = HarmoqConfig(rules=rules)
    assert _bits(config, "x", "matmul") == (8, 8)
    assert _bits(config, "x", "linear") == (8, 4)
    assert _bits(config, "x", "conv2d") == (32, 32)


@pytest.mark.parametrize(("alias", "kind"), [("Linear", "linear"), ("Conv2d", "conv2d")])
def test_kinds_may_be_written_as_the_class(alias: Any, kind: str) -> None:
    assert SiteRule(kind=alias) == SiteRule(kind=kind)  # type: ignore[arg-type]


def test_globs_match_case_sensitively_and_as_a_whole() -> None:
    rule = SiteRule("layers.?.attn*")
    assert rule.matches("layers.0.attn.qkv", "linear")
    assert not rule.matches("layers.0.Attn", "linear")
    assert not rule.matches("body.layers.0.attn", "linear")


def test_a_rule_is_described_as_it_was_written() -> None:
    rule = SiteRule("*.qkv", kind="linear", act_bits=4)
    assert rule.describe() == "SiteRule(sites='*.qkv', kind='linear', act_bits=4)"


def test_a_site_switched_off_by_a_rule_says_so() -> None:
    config = HarmoqConfig(rules=[SiteRule("a", weight_bits=32, act_bits=32)])
    assert "SiteRule(sites='a'" in str(config.settings("a", "linear").reason)
    assert config.settings("b", "linear").reason is None


def test_an_unmatched_rule_lists_near_misses() -> None:
    with pytest.raises(ConfigError) as caught:
        HarmoqConfig(rules=[SiteRule("*.qkvv")]).check_rules(SITES)
    assert "layers.0.attn.qkv" in str(caught.value.expected)
    assert "3 sites" in str(caught.value.found)
    assert "SiteRule(sites='*.qkvv')" in caught.value.what


def test_near_misses_are_of_the_kind_of_the_rule() -> None:
    with pytest.raises(ConfigError) as caught:
        HarmoqConfig(rules=[SiteRule("layers.0.attn.qkv", kind="matmul")]).check_rules(SITES)
    assert "layers.0.attn::matmul_0" in str(caught.value.expected)
    assert "qkv" not in str(caught.value.expected)


def test_every_rule_must_match_even_if_overruled() -> None:
    HarmoqConfig(rules=[SiteRule("*.qkv", act_bits=4), SiteRule("*", act_bits=8)]).check_rules(SITES)
    with pytest.raises(ConfigError):
        HarmoqConfig(rules=[SiteRule("nowhere"), SiteRule("*")]).check_rules(SITES)
    with pytest.raises(ConfigError):
        HarmoqConfig(rules=[SiteRule()]).check_rules([])


# --- profiles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", QUANTIZED_BITS)
def test_bounds_are_static_unless_a_rule_says_per_token(bits: int) -> None:
    act = HarmoqConfig(8, bits).settings("a", "linear").act
    assert not act.dynamic
    assert act.granularity is Granularity.PER_TENSOR
    act = HarmoqConfig(8, bits, rules=(SiteRule("a", dynamic=True),)).settings("a", "linear").act
    assert act.dynamic
    assert act.granularity is Granularity.PER_TOKEN


def test_paper_is_static_per_tensor_everywhere() -> None:
    config = HarmoqConfig(4, 3, "paper")
    for kind, bits in (("linear", (4, 3)), ("matmul", (3, 3))):
        settings = config.settings("a", kind)
        assert (settings.weight.bits, settings.act.bits) == bits
        assert not settings.act.dynamic
        assert settings.act.granularity is Granularity.PER_TENSOR


def test_attention_products_follow_matmul_bits_if_given() -> None:
    assert HarmoqConfig(4, 4).settings("a", "matmul").reason is not None
    assert HarmoqConfig(4, 4, matmul_bits=6).settings("a", "matmul").weight.bits == 6
    assert HarmoqConfig(4, 4, "paper", matmul_bits=16).settings("a", "matmul").reason == "matmul_bits=16"


def test_convolutions_are_float_unless_asked_for_and_keep_a_code_for_zero() -> None:
    assert "conv_bits" in str(HarmoqConfig().settings("a", "conv2d").reason)
    settings = HarmoqConfig(conv_bits=4).settings("a", "conv2d")
    assert settings.act.scheme is Scheme.INTEGER_ZERO_POINT
    assert not settings.act.dynamic


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(4, 32), (32, 4), (16, 8)])
def test_one_operand_may_stay_in_float(weight_bits: int, act_bits: int) -> None:
    settings = HarmoqConfig(weight_bits, act_bits).settings("a", "linear")
    assert (settings.weight.enabled, settings.act.enabled) == (weight_bits < 16, act_bits < 16)
    assert settings.reason is None
    assert HarmoqConfig(32, 16).settings("a", "linear").reason is not None
