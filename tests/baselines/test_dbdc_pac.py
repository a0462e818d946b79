"""DBDC+Pac: which bins go, how many, and in which order bounds are learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harmoq_ao.baselines import Budget, dbdc_pac
from harmoq_ao.baselines.dbdc_pac import clipped_share, dual_clip
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.harmonization.teacher import Teacher
from tests.baselines.helpers import applied, float_operands, learned_tensors
from tests.models import images

COUNTS = st.lists(st.integers(0, 50), min_size=2, max_size=40).filter(any)


@given(counts=COUNTS, share=st.floats(0.0, 0.9))
def test_no_more_than_the_share_is_clipped_and_the_next_bin_would_be_too_much(counts: list[int], share: float) -> None:
    edges = torch.arange(len(counts) + 1, dtype=torch.float64)
    lo, hi = (int(bound) for bound in dual_clip(edges, torch.tensor(counts, dtype=torch.float64), share))
    assert 0 <= lo < hi <= len(counts)
    clipped = sum(counts[:lo]) + sum(counts[hi:])
    assert clipped <= share * sum(counts) + 1e-9
    if hi - lo > 1:
        assert clipped + min(counts[lo], counts[hi - 1]) > share * sum(counts) - 1e-9


@given(counts=COUNTS, share=st.floats(0.0, 0.9))
def test_both_sides_are_treated_alike(counts: list[int], share: float) -> None:
    """Mirroring the histogram mirrors the bounds, where no two ends are equally dense."""
    distinct = [count + index / 1000 for index, count in enumerate(counts)]
    edges = torch.arange(len(counts) + 1, dtype=torch.float64)
    forwards, backwards = torch.tensor(distinct, dtype=torch.float64), torch.tensor(distinct[::-1], dtype=torch.float64)
    lo, hi = dual_clip(edges, forwards, share)
    mirrored = dual_clip(edges, backwards, share)
    assert (float(lo), float(hi)) == (len(counts) - float(mirrored[1]), len(counts) - float(mirrored[0]))


def test_a_tail_on_one_side_is_clipped_on_that_side() -> None:
    """Where a percentile would clip the dense side as well."""
    counts = torch.tensor([900.0, 800, 700, 400, 100, 5, 1, 0, 1, 1])
    lo, hi = dual_clip(torch.linspace(0, 10, 11), counts, 0.01)
    assert (float(lo), float(hi)) == (0.0, 5.0)


@pytest.mark.parametrize("name", ["forms", "SwinIR/light"])
def test_activations_start_with_their_outliers_clipped(name: str) -> None:
    prepared = applied("dbdc-pac", name, HarmoqConfig(4, 4, "paper"))
    clipped = []
    for quantizer, values in float_operands(prepared, images(6)).values():
        lo, hi = quantizer.bounds()
        slack = 1e-5 * (hi - lo)
        share = float(((values < lo - slack) | (values > hi + slack)).float().mean())
        assert share <= clipped_share(4) + 1e-9
        clipped.append(share)
    assert any(clipped)
    assert clipped_share(8) < clipped_share(4)


@pytest.mark.parametrize("name", ["forms", "SwinIR/light"])
def test_calibration_learns_bounds_alone_and_the_loss_falls(name: str) -> None:
    names, _ = learned_tensors("dbdc-pac", name, HarmoqConfig(3, 3, "paper"))
    assert all(name.endswith((".lower", ".upper")) for name in names)


@pytest.mark.parametrize(("widths", "activations", "weights"), [((3, 3), 3, 4), ((8, 3), 7, 0), ((3, 32), 0, 7)])
def test_activations_are_learned_before_weights_on_one_budget(
    widths: tuple[int, int], activations: int, weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []

    def record(prepared: Any, crops: Any, budget: Budget, **kinds: Any) -> None:
        assert kinds.pop("rate") > 0
        assert isinstance(kinds.pop("teacher"), Teacher)
        assert kinds.pop("method") == "dbdc-pac"
        assert list(kinds.values()) == [False]
        seen.append(("activations" if "weights" in kinds else "weights", budget.steps))

    monkeypatch.setattr(dbdc_pac, "distil_bounds", record)
    applied("dbdc-pac", "linears", HarmoqConfig(*widths, "paper"), steps=7)
    assert seen == [("activations", activations), ("weights", weights)]
