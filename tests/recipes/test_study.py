"""The engine: what is measured, what is kept, and that nothing is done twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import harmoq_ao as h
from harmoq_ao.common.choices import METHODS
from harmoq_ao.common.errors import CalibrationError, CheckpointError, ConfigError, DatasetError, SavedModelError
from harmoq_ao.config import SiteRule
from harmoq_ao.harmonization.presets import PRESETS
from harmoq_ao.images.metrics import bicubic_upscale, score_all
from harmoq_ao.recipes import study
from harmoq_ao.recipes.cells import Cell, bicubic_cell, float_cell, with_changes
from harmoq_ao.recipes.making import Made, Photographs
from harmoq_ao.recipes.store import restore_state, state_of
from harmoq_ao.recipes.study import Study
from harmoq_ao.runtime.evaluation import evaluate
from tests.recipes.studies import (
    load_linears,
    load_transformer,
    quick_cell,
    tiny_study,
    write_benchmark,
    write_photographs,
)

REFERENCES = [bicubic_cell(2), float_cell(2)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Cells that were really quantized, each replaced by the float model with its fake-quantization off."""
    made: list[Cell] = []

    def fake(cell: Cell, loaded: Any, *rest: Any) -> Made:
        made.append(cell)
        return Made(h.prepare_harmoq(loaded, cell.config(0)))

    monkeypatch.setattr(study, "quantize", fake)
    return made


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- real cells -------------------------------------------------------------------------------------------------------


def test_real_cells_are_measured_kept_and_restored(tmp_path: Path) -> None:
    """HarmoQ with all its stages and a baseline: scores are those of the restored model, simulated and on integers."""
    cells = [*REFERENCES, quick_cell("dobi"), quick_cell("harmoq")]
    first = tiny_study(tmp_path, load_transformer)
    outcome = first.run(cells, ["Mini"])
    assert outcome.failures == {}
    before = files(tmp_path / "out")
    again = tiny_study(tmp_path, load_transformer)
    assert again.run(cells, ["Mini"]).results == outcome.results
    assert files(tmp_path / "out") == before
    for cell in cells:
        found = outcome.results[cell, "Mini"]
        table = evaluate(again.upscaler(cell), again.pairs(2, "Mini"), 2)
        for name, score in table.scores.items():
            assert (score.psnr, score.ssim) == tuple(found.images[name][k] for k in ("psnr_y", "ssim_y"))
        assert {"torch", "numpy", "harmoq_ao", "cpu"} <= set(found.environment)
    quantized = [outcome.results[cell, "Mini"].psnr_y for cell in cells[2:]]
    assert all(psnr != outcome.results[float_cell(2), "Mini"].psnr_y for psnr in quantized)
    trace = again.trace(cells[3])
    assert len(trace["refine"]["losses"]) == 2
    assert len(trace["algorithm"]["sites"]) == 15  # products with relative maps keep their bounds
    converted = tiny_study(tmp_path, load_transformer, converted=True)
    integers = converted.run(cells, ["Mini"])
    for cell in cells:
        assert integers.results[cell, "Mini"].psnr_y == pytest.approx(outcome.results[cell, "Mini"].psnr_y, abs=0.05)
    assert {r.measured for (c, _), r in integers.results.items() if not c.is_reference} == {"integer model"}
    assert set(before) <= set(files(tmp_path / "out"))


def test_references_are_the_metrics_of_the_library(tmp_path: Path) -> None:
    engine = tiny_study(tmp_path)
    outcome = engine.run(REFERENCES, ["Mini"])
    pairs = [(pair.name, *pair.load()) for pair in engine.pairs(2, "Mini")]
    table = score_all(((n, bicubic_upscale(low.to_uint8(), 2), high.to_uint8()) for n, low, high in pairs), 2)
    assert outcome.results[REFERENCES[0], "Mini"].psnr_y == pytest.approx(table.mean.psnr, abs=1e-9)
    model = load_linears().model
    table = score_all(((n, model(low.pixels[None]).detach(), high.to_uint8()) for n, low, high in pairs), 2)
    assert outcome.results[REFERENCES[1], "Mini"].ssim_y == pytest.approx(table.mean.ssim, abs=1e-9)


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_nothing_is_done_twice(tmp_path: Path, calls: list[Cell]) -> None:
    cells = [quick_cell("dobi", bits) for bits in (2, 4)]
    tiny_study(tmp_path).run([*cells, cells[0]], ["Mini"])
    assert calls == cells
    tiny_study(tmp_path).run(cells, ["Mini"])
    assert calls == cells


def test_another_set_does_not_quantize_again(tmp_path: Path, calls: list[Cell]) -> None:
    cell = quick_cell("dobi")
    tiny_study(tmp_path).run([cell], ["Mini"])
    write_benchmark(tmp_path / "sets", "Other", ("camera",))
    outcome = tiny_study(tmp_path).run([cell], ["Mini", "Other"])
    assert list(outcome.results[cell, "Other"].images) == ["camera"]
    tiny_study(tmp_path).picture(cell, "Other", "camera")
    assert calls == [cell]


@pytest.mark.parametrize("change", ["photographs", "images", "seed", "preset", "weights"])
def test_what_changed_is_done_again(
    tmp_path: Path, calls: list[Cell], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    cell, settings = quick_cell("harmoq"), dict[str, Any]()
    first = tiny_study(tmp_path).run([cell], ["Mini"]).results[cell, "Mini"]
    if change == "photographs":
        (tmp_path / "photographs" / "coffee.png").unlink()
    elif change == "images":
        write_benchmark(tmp_path / "new", "Mini", ("camera",))
        (tmp_path / "sets").rename(tmp_path / "old")
        (tmp_path / "new").rename(tmp_path / "sets")
    elif change == "seed":
        settings = {"seed": 1}
    elif change == "preset":
        monkeypatch.setitem(PRESETS, "fast", with_changes(PRESETS["fast"], {"refine.feature_weight": 0.125}))
    else:
        settings = {"load": _other_weights}
    second = tiny_study(tmp_path, **settings).run([cell], ["Mini"]).results[cell, "Mini"]
    assert len(calls) == (1 if change == "images" else 2)
    assert (first.psnr_y != second.psnr_y) == (change in ("images", "weights"))


def _other_weights(scale: int = 2) -> Any:
    loaded = load_linears()
    with torch.no_grad():
        next(loaded.model.parameters()).mul_(1.5)
    return loaded


def test_a_killed_run_continues(tmp_path: Path, calls: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after quantizing the second cell: its state is there, and whole."""
    cells = [quick_cell("dobi", bits) for bits in (2, 3, 4)]
    with monkeypatch.context() as patch:
        measure = Study._measure

        def killed(self: Study, *rest: Any) -> Any:
            if len(calls) == 2:
                raise KeyboardInterrupt
            return measure(self, *rest)

        patch.setattr(Study, "_measure", killed)
        with pytest.raises(KeyboardInterrupt):
            tiny_study(tmp_path).run(cells, ["Mini"])
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 1
    outcome = tiny_study(tmp_path).run(cells, ["Mini"])
    assert set(outcome.results) == {(cell, "Mini") for cell in cells}
    assert calls == cells


@pytest.mark.parametrize("written", ["safetensors", "json"])
def test_a_state_cut_short_is_made_again(
    tmp_path: Path, calls: list[Cell], monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    """Killed while the state is being written: before or after its first file."""
    cell, engine = quick_cell("dobi"), tiny_study(tmp_path)
    name = "store.to_safetensors" if written == "safetensors" else "study.write_json"
    with monkeypatch.context() as patch:
        patch.setattr(f"harmoq_ao.recipes.{name}", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.run([cell], ["Mini"])
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert tiny_study(tmp_path).run([cell], ["Mini"]).failures == {}
    assert calls == [cell, cell]


def test_a_failing_cell_is_reported_and_the_others_run(
    tmp_path: Path, calls: list[Cell], capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, right = quick_cell("dobi", **{"config.observer": "guess"}), quick_cell("dobi")
    outcome = tiny_study(tmp_path).run([wrong, right], ["Mini"])
    assert set(outcome.results) == {(right, "Mini")}
    assert "guess" in outcome.failures[wrong]
    assert "guess" in capsys.readouterr().err
    assert calls == [wrong, right] or calls == [right]


def test_an_unexpected_error_is_shown_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cell, engine = quick_cell("dobi"), tiny_study(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(study, "quantize", lambda *_: 1 / 0)
        assert "ZeroDivisionError" in engine.run([cell], ["Mini"]).failures[cell]
    assert "Traceback" in capsys.readouterr().err
    assert engine.run([cell], ["Mini"]).failures == {}


def test_what_is_wrong_for_all_cells_ends_the_run(tmp_path: Path, calls: list[Cell]) -> None:
    with pytest.raises(DatasetError, match="Nowhere"):
        tiny_study(tmp_path).run([quick_cell("dobi")], ["Nowhere"])
    engine = Study(tiny_study(tmp_path).settings, Mock(side_effect=CheckpointError("none")))
    with pytest.raises(CheckpointError):
        engine.run([quick_cell("dobi")], ["Mini"])
    assert calls == []


def test_a_damaged_file_is_named(tmp_path: Path, calls: list[Cell]) -> None:
    cell, engine = quick_cell("dobi"), tiny_study(tmp_path)
    engine.run([cell], ["Mini"])
    path = next((tmp_path / "out" / "states").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SavedModelError, match=path.name):
        engine.prepared(cell)


# --- states -----------------------------------------------------------------------------------------------------------


def test_a_state_brings_joint_scales_that_a_fresh_model_lacks(tmp_path: Path) -> None:
    config, loaded = h.HarmoqConfig(3, 3, "paper"), load_transformer()
    crops = [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))]
    calibrated = h.calibrate(h.prepare_harmoq(loaded, config), crops)
    with_scale = [m for m in calibrated.sites() if m.joint_scale is not None]
    with_scale[0].set_joint_scale(None)  # one of them has none
    fresh = h.prepare_harmoq(loaded, config)
    restore_state(fresh, state_of(calibrated))
    image = torch.rand(1, 3, 24, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(calibrated(image), fresh(image))
    assert [m.joint_scale is None for m in fresh.sites()] == [m.joint_scale is None for m in calibrated.sites()]
    other = h.prepare_harmoq(loaded, h.HarmoqConfig(3, 32, "paper"))
    with pytest.raises(SavedModelError, match="in one only"):
        restore_state(other, state_of(calibrated))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_restored_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    cell = quick_cell("harmoq", 3)
    monkeypatch.setitem(PRESETS, "fast", cell.settings())  # the budget of the baselines that learn
    cell = Cell(method, 3, 3, preset="fast")
    made = tiny_study(tmp_path, load_transformer).prepared(cell)
    study = tiny_study(tmp_path, load_transformer)
    restored = study.prepared(cell)
    exact = study.fresh(cell.scale, restored.config)
    image = torch.rand(1, 3, 24, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(made(image), restored(image))
        assert torch.equal(exact(image), load_transformer().model(image))
        assert not torch.equal(restored(image), exact(image))


# --- cells and settings -----------------------------------------------------------------------------------------------


def test_identity_depends_on_everything_but_the_label() -> None:
    base = Cell("harmoq", 4, 4)
    variants = [
        base,
        Cell("dobi", 4, 4),
        Cell("harmoq", 4, 8),
        Cell("harmoq", 4, 4, 4),
        Cell("harmoq", 4, 4, profile="deploy"),
        Cell("harmoq", 4, 4, preset="fast"),
        Cell("harmoq", 4, 4, rules=(SiteRule("*.fc1", weight_bits=8),)),
        base.with_options({"refine.steps": 1}),
    ]
    identities = {cell.identity({"seed": 0}) for cell in variants} | {base.identity({"seed": 1})}
    assert len(identities) == len(variants) + 1
    assert Cell("harmoq", 4, 4, label="ours").identity({"seed": 0}) == base.identity({"seed": 0})
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in identities)


def test_options_reach_the_settings_by_dotted_name() -> None:
    cell = quick_cell("harmoq", **{"refine.rates.bounds": 0.25, "algorithm.projection": "dct", "crops": 7})
    settings = cell.settings()
    assert (settings.refine.rates.bounds, settings.algorithm.projection, settings.crops) == (0.25, "dct", 7)
    without = cell.with_options({"refine": None}).settings()
    assert without.refine is None
    with pytest.raises(ConfigError, match=r"no such setting.*speed"):
        cell.with_options({"refine.speed": 1}).settings()
    with pytest.raises(ConfigError, match="Unknown option"):
        cell.with_options({"learning.rate": 1})
    with pytest.raises(ConfigError, match="dobi has no such option"):
        quick_cell("dobi", **{"refine.steps": 1}).settings()


# --- photographs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("photographs") / "all")


def test_held_out_photographs_are_not_calibrated_on(photographs: Path) -> None:
    for seed in range(200):
        found = Photographs(photographs, seed)
        assert not set(found.held_out) & set(found.calibration)
        assert (len(found.calibration), len(found.held_out)) == (2, 1)


def test_crops_are_seeded_and_differ_from_the_held_out_ones(photographs: Path) -> None:
    first, second = Photographs(photographs, 0), Photographs(photographs, 0)
    crops, held_out = (first.crops(load_linears(), 4, 16, held_out) for held_out in (False, True))
    again = second.crops(load_linears(), 4, 16)
    assert all(torch.equal(a, b) for a, b in zip(crops, again, strict=True))
    assert not any(torch.equal(a, b) for a in crops for b in held_out)
    assert {tuple(c.shape) for c in crops} == {(3, 16, 16)}


def test_one_photograph_is_not_enough(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "photographs")
    for file in sorted(folder.iterdir())[1:]:
        file.unlink()
    with pytest.raises(CalibrationError, match="One photograph"):
        Photographs(folder, 0)
