"""Every method through the one entry that the command line and the recipes use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import harmoq_ao as h
from harmoq_ao.baselines import BASELINES
from harmoq_ao.baselines.methods import prepare_with
from harmoq_ao.common.choices import METHODS
from harmoq_ao.common.errors import ConfigError
from harmoq_ao.harmonization.harmonize import harmonize
from harmoq_ao.harmonization.paper.settings import AlgorithmSettings
from harmoq_ao.harmonization.presets import PRESETS, HarmonizeSettings, preset
from harmoq_ao.harmonization.settings import RefineSettings
from harmoq_ao.images import luma, split_photographs
from tests.harmonization.helpers import crops
from tests.models import build, calibrated, images

SHORT = HarmonizeSettings(
    AlgorithmSettings(images=2, updates=2), RefineSettings(steps=2, batch_size=2, crop_size=16, checks=1)
)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_in_an_integer_model(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "fast", SHORT)
    config = h.HarmoqConfig(3, 3, profile="paper", storage_dtype="float32")
    file = tmp_path / "progress.safetensors"
    prepared = prepare_with(method, build("SwinIR/light"), crops(3), config, held_out=crops(1, 9), checkpoint=file)
    assert file.exists() == (method == "harmoq" or BASELINES[method].learns)
    image = images(1, (24, 16))[0]
    with torch.no_grad():
        simulated, integer = prepared(image), h.convert_harmoq(prepared)(image)
        exact = build("SwinIR/light")(image)
    assert (simulated - integer).square().mean() < 0.05 * (simulated - exact).square().mean()
    assert not torch.equal(simulated, exact)


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ConfigError, match="Unknown method"):
        prepare_with("magic", build("SwinIR/light"), crops(1), h.HarmoqConfig(4, 4))
    with pytest.raises(ConfigError, match="Unknown preset"):
        preset("slow")


def test_harmonize_runs_both_parts_and_says_how() -> None:
    prepared = calibrated("SwinIR/light", h.HarmoqConfig(3, 3, profile="paper"))
    trace = harmonize(prepared, crops(3), SHORT, held_out=crops(1, 9))
    assert trace.algorithm is not None
    assert trace.refine is not None
    assert trace.to_dict() == {"algorithm": trace.algorithm.to_dict(), "refine": trace.refine.to_dict()}
    nothing = harmonize(prepared, crops(3), HarmonizeSettings(None, None))
    assert nothing.to_dict() == {"algorithm": None, "refine": None}


def test_photographs_are_split_once_and_for_all() -> None:
    files = [Path(f"{index:03}.png") for index in range(40)]
    learned, kept = split_photographs(files, seed=3)
    assert len(kept) == 4
    assert sorted(learned + kept) == files
    assert split_photographs(files, seed=3) == (learned, kept)
    assert split_photographs(files[:1]) == (files[:1], [])


def test_luma_of_gray_is_gray() -> None:
    gray = torch.rand(1, 5, 4)
    torch.testing.assert_close(luma(gray.expand(3, -1, -1)), gray)
