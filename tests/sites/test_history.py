"""How a model was made, from harmonization into the saved folder and back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmoq_ao.baselines.methods import prepare_with
from harmoq_ao.common.errors import SavedModelError
from harmoq_ao.config import HarmoqConfig
from harmoq_ao.conversion.convert import convert_harmoq
from harmoq_ao.conversion.load import load_quantized
from harmoq_ao.conversion.save import save_quantized
from harmoq_ao.harmonization.harmonize import HarmonizeTrace, harmonize
from harmoq_ao.harmonization.paper.settings import AlgorithmSettings
from harmoq_ao.harmonization.presets import HarmonizeSettings
from harmoq_ao.harmonization.refine import RefineTrace
from harmoq_ao.harmonization.settings import RefineSettings
from harmoq_ao.sites.history import MAX_POINTS, History, SiteChange
from tests.models import build, calibrated, converted, images

W4 = HarmoqConfig(4, 4, "paper")
FULL = History(
    "harmoq",
    "fast",
    (SiteChange("a", 0.1, 0.05, 0.01, 0.02), SiteChange("b", 0.1, 0.1, None, None)),
    ((1, 0.5),),
    (),
    0,
    "4 at W8, 2 at W4",
    {"a": 0.01},
)


def test_harmonization_is_kept_through_conversion_and_saving(tmp_path: Path) -> None:
    prepared = calibrated("SwinIR/light", W4)
    crops = [image[0] for image in images(2)]
    settings = HarmonizeSettings(
        AlgorithmSettings(updates=5, rows=64), RefineSettings(steps=3, batch_size=1, crop_size=16, checks=1)
    )
    trace = harmonize(prepared, crops, settings, held_out=crops[:1], show_progress=False)
    assert trace.algorithm is not None
    assert trace.refine is not None
    kept = load_quantized(save_quantized(convert_harmoq(prepared), tmp_path / "m")).history
    assert kept is not None
    assert [s.name for s in kept.sites] == [s.name for s in trace.algorithm.sites]
    assert [s.end for s in kept.sites] == pytest.approx([s.end for s in trace.algorithm.sites], rel=1e-3)
    assert any(s.left is not None for s in kept.sites)
    assert [loss for _, loss in kept.losses] == pytest.approx(trace.refine.losses, rel=1e-3)
    assert [step for step, _ in kept.held_out] == [step for step, _ in trace.refine.held_out]
    assert (kept.method, kept.best_step) == ("harmoq", trace.refine.best_step)


@pytest.mark.parametrize("method", ["minmax", "harmoq"])
def test_method_and_preset_are_kept(method: str) -> None:
    crops = [image[0] for image in images(2)]
    prepared = prepare_with(method, build("SwinIR/light"), crops, W4, preset="none", show_progress=False)
    history = convert_harmoq(prepared).history
    assert history is not None
    assert (history.method, history.preset) == (method, "none")
    assert not history.sites


def test_a_model_without_a_history_is_saved_without_one(tmp_path: Path) -> None:
    folder = save_quantized(converted("SwinIR/light", W4), tmp_path / "m")
    assert "history" not in json.loads((folder / "config.json").read_text())
    assert load_quantized(folder).history is None


@given(st.lists(st.floats(allow_nan=True), max_size=400))
def test_curves_are_thinned_without_leaving_their_range(losses: list[float]) -> None:
    kept = HarmonizeTrace(refine=RefineTrace(losses=losses)).to_history().losses
    finite = [(i, v) for i, v in enumerate(losses, start=1) if math.isfinite(v)]
    assert len(kept) == min(MAX_POINTS, len(finite))
    if finite:
        low, high = min(v for _, v in finite), max(v for _, v in finite)
        margin = 1e-3 * max(abs(low), abs(high))
        assert all(low - margin <= v <= high + margin or not math.isfinite(v) for _, v in kept)
        assert kept[-1][0] == finite[-1][0]
    assert [s for s, _ in kept] == sorted({s for s, _ in kept})


def test_histories_survive_json() -> None:
    assert History.from_dict(json.loads(json.dumps(FULL.to_dict()))) == FULL
    assert History.from_dict(History().to_dict()) == History()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method", 3),
        ("method", "x" * 2000),
        ("sites", None),
        ("sites", [["a", 1.0, 1.0, None]]),
        ("sites", [[1, 1.0, 1.0, None, None]]),
        ("sites", [["a", float("nan"), 1.0, None, None]]),
        ("losses", [[1, 10**400]]),
        ("losses", [[1.5, 1.0]]),
        ("losses", [[1, True]]),
        ("losses", [[1, 1.0]] * 5000),
        ("held_out", [[-1, 1.0]]),
        ("best_step", "3"),
        ("other", 1),
    ],
)
def test_what_is_no_history_is_refused(key: str, value: Any) -> None:
    with pytest.raises(SavedModelError, match="history"):
        History.from_dict({**FULL.to_dict(), key: value})


@pytest.mark.parametrize("data", [None, [], {}, "text"])
def test_other_json_is_no_history(data: Any) -> None:
    with pytest.raises(SavedModelError, match="history"):
        History.from_dict(data)
