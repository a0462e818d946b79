"""The order in which layers lose bits, against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from harmoq_ao.baselines.bit_allocation import SiteBits, bits_after, cheapest_steps

WIDTHS = (8, 4, 3, 2)


@st.composite
def sites(draw: st.DrawFn, most: int = 4) -> list[SiteBits]:
    found = []
    for index in range(draw(st.integers(1, most))):
        losses = draw(st.lists(st.floats(0, 1, width=32), min_size=len(WIDTHS), max_size=len(WIDTHS)))
        found.append(SiteBits(f"s{index}", draw(st.integers(1, 50)), dict(zip(WIDTHS, sorted(losses), strict=True))))
    return found


def totals(chosen: Sequence[SiteBits], bits: Sequence[int]) -> tuple[int, float]:
    size = sum(site.weights * b for site, b in zip(chosen, bits, strict=True))
    return size, sum(site.sensitivity_db[b] for site, b in zip(chosen, bits, strict=True))


@given(sites())
def test_no_choice_beats_a_prefix_in_both_size_and_loss(given_sites: list[SiteBits]) -> None:
    steps = cheapest_steps(given_sites, WIDTHS)
    every = [totals(given_sites, bits) for bits in itertools.product(WIDTHS, repeat=len(given_sites))]
    for taken in range(len(steps) + 1):
        lowered = bits_after(given_sites, steps[:taken])
        size, loss = totals(given_sites, [lowered.get(s.name, 8) for s in given_sites])
        assert not any(other <= size and error < loss - 1e-9 for other, error in every)


@given(sites())
def test_steps_of_a_site_go_down_in_order_to_the_fewest_bits(given_sites: list[SiteBits]) -> None:
    steps = cheapest_steps(given_sites, WIDTHS)
    for index, site in enumerate(given_sites):
        own = [step.bits for step in steps if step.site == index]
        assert own == sorted(own, reverse=True)
        assert own[-1] == min(WIDTHS)
        assert sum(s.saved for s in steps if s.site == index) == 6 * site.weights
