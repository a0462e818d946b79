"""Granular-DQ: more bits for more entropy, on a budget, down to the integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import harmoq_ao as h
from harmoq_ao.baselines.granular_dq import allocate, code_entropy, set_activation_bits, site_entropy
from harmoq_ao.common.errors import ConfigError
from harmoq_ao.config import HarmoqConfig, SiteRule
from harmoq_ao.sites.prepared import PreparedLinear
from harmoq_ao.sites.quantized import QuantizedLinear, QuantizedMatmul
from tests.baselines.helpers import applied
from tests.models import calibrated, run
from tests.strategies import SEEDS, bit_widths

SITES = st.lists(st.tuples(st.floats(0, 8), st.integers(1, 100)), min_size=1, max_size=30)


@given(sites=SITES, bits=bit_widths())
def test_bits_follow_entropy_within_the_budget(sites: list[tuple[float, int]], bits: int) -> None:
    entropies, costs = [s[0] for s in sites], [s[1] for s in sites]
    changes = allocate(entropies, costs, [bits] * len(sites))
    assert set(changes) <= {-1, 0, 1}
    assert all(2 <= bits + change <= 8 for change in changes)
    assert sum(cost * change for cost, change in zip(costs, changes, strict=True)) <= 0
    for i, more in enumerate(entropies):
        assert all(changes[i] >= changes[j] for j, less in enumerate(entropies) if more > less)
    assert any(change > 0 for change in changes) or not any(changes), "bits are given up for others alone"


def test_equal_costs_trade_a_third_of_the_sites_against_another_third() -> None:
    assert allocate([5, 1, 4, 2, 6, 3], [1] * 6, [4] * 6) == [1, -1, 0, -1, 1, 0]
    assert allocate([5, 1, 4, 2, 6, 3], [1] * 6, [2] * 6) == [0] * 6
    assert allocate([5, 1, 4, 2, 6, 3], [1] * 6, [8] * 6) == [0] * 6


@given(seed=SEEDS, levels=st.integers(1, 256))
def test_entropy_is_that_of_equally_likely_levels(seed: int, levels: int) -> None:
    lo, hi = torch.tensor(-1.0), torch.tensor(3.0)
    values = lo + (hi - lo) * (torch.randperm(256, generator=torch.Generator().manual_seed(seed))[:levels] + 0.5) / 256
    entropy = code_entropy(values.repeat(7), lo, hi)
    assert entropy == pytest.approx(torch.tensor(float(levels)).log2().item(), abs=1e-5)
    assert code_entropy(values * 1000 + 5, lo * 1000 + 5, hi * 1000 + 5) == pytest.approx(entropy, abs=0.1)


@pytest.mark.parametrize("profile", ["paper", "deploy"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_average_of_activation_bits_is_at_most_b(profile: str, bits: int) -> None:
    prepared = applied("granular-dq", "SwinIR/light", HarmoqConfig(bits, bits, profile))
    rows = [row for row in prepared.report().rows if row.quantized]
    used = [row.act_bits for row in rows]
    assert set(used) == ({bits} if bits in (2, 8) else {3, 4, 5})
    assert sum(row.macs * row.act_bits for row in rows) <= bits * sum(row.macs for row in rows)
    entropies = {
        b: [site_entropy(s) for s in prepared.sites() if s.act_quantizer and s.act_quantizer.spec.bits == b]
        for b in set(used)
    }
    for fewer in set(used):
        assert all(max(entropies[fewer]) <= min(entropies[b]) + 1e-9 for b in set(used) if b > fewer)


def test_weights_keep_b_bits_and_the_bounds_are_static() -> None:
    prepared = applied("granular-dq", "SwinIR/light", HarmoqConfig(4, 4, "deploy"))
    for site in prepared.sites():
        if isinstance(site, PreparedLinear):
            assert (site.weight_quantizer.spec.bits, site.act_quantizer.spec.dynamic) == (4, False)
            assert torch.equal(site.weight_quantizer.bounds()[1], site.weight.abs().amax(1, keepdim=True))


def test_integers_have_the_bits_of_their_site() -> None:
    prepared = applied("granular-dq", "SwinIR/light", HarmoqConfig(4, 4, "paper"))
    chosen = {s.site.name: s.act_quantizer.spec.bits for s in prepared.sites()}
    converted = h.convert_harmoq(prepared)
    for name, site in converted.sites().items():
        assert site.settings.act.bits == chosen[name]
        if isinstance(site, QuantizedLinear):
            assert site.settings.weight.bits == 4
        if isinstance(site, QuantizedMatmul):
            assert site.settings.weight.bits == chosen[name]
    assert {row.act_bits for row in converted.report().quantized} == {3, 4, 5}


def test_rules_of_the_user_stay_in_force() -> None:
    config = HarmoqConfig(4, 4, "deploy", rules=(SiteRule("one", dynamic=True), SiteRule("two", weight_bits=8)))
    prepared = applied("granular-dq", "linears", config)
    assert prepared.model.one.act_quantizer.spec.dynamic
    assert not prepared.model.two.act_quantizer.spec.dynamic
    assert prepared.model.two.weight_quantizer.spec.bits == 8


def test_bits_can_be_set_by_hand_and_wrong_ones_are_refused() -> None:
    config = HarmoqConfig(4, 4, "paper", joint_scale="none")
    prepared = calibrated("forms", config)
    names = [site.site.name for site in prepared.sites()]
    set_activation_bits(prepared, {names[0]: 6, names[1]: 2})
    h.calibrate(prepared, [torch.rand(1, 3, 16, 16)])
    assert [s.act_quantizer.spec.bits for s in prepared.sites()][:3] == [6, 2, 4]
    assert bool(torch.isfinite(run(h.convert_harmoq(prepared))).all())
    with pytest.raises(ConfigError, match="9 bits"):
        set_activation_bits(prepared, {names[0]: 9})
    with pytest.raises(ConfigError, match="no such site"):
        set_activation_bits(prepared, {"nowhere": 4})
