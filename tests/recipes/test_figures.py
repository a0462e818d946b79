"""Figures on a tiny transformer: the numbers are those of the cells, the pictures are drawn."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import harmoq_ao as h
from harmoq_ao.calibration.solve import disable_fake_quant
from harmoq_ao.common.errors import ConfigError
from harmoq_ao.harmonization.teacher import Teacher
from harmoq_ao.recipes import curves, figures, inspection, options
from harmoq_ao.recipes.curves import convergence_curves
from tests.models import entry
from tests.recipes.studies import load_transformer, quick_cell, read_csv, run_command, tiny_study
from tests.recipes.test_tables import check_picture


def run(figure: str, folder: Path, *more: str, expected: int = 0) -> list[dict[str, str]]:
    """Rows of the CSV."""
    run_command(figures.main, folder, figure, *more, expected=expected)
    return read_csv(folder / "out" / f"{figure}.csv")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(options, "loader", lambda checkpoints: load_transformer)
    monkeypatch.chdir(tmp_path)


def cells_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in (folder / "out" / "cells").iterdir()]


# --- whole figures ----------------------------------------------------------------------------------------------------


def test_figure_one_quantizes_one_operand_at_a_time(tmp_path: Path) -> None:
    rows = run("figure1", tmp_path, "--bits", "2", "4", "--method", "minmax")
    assert [(row["quantized"], row["bits"]) for row in rows] == [
        (kind, bits) for kind in ("weights", "activations") for bits in ("2", "4")
    ]
    psnr = {(c["cell"].get("weight_bits"), c["cell"].get("act_bits")): c["psnr_y"] for c in cells_of(tmp_path)}
    for row in rows:
        bits = (int(row["bits"]), 32) if row["quantized"] == "weights" else (32, int(row["bits"]))
        assert float(row["psnr_y"]) == psnr[bits]
    check_picture(tmp_path / "out" / "figure1.png")


def test_figure_two_quantizes_one_kind_of_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = (inspection.PRODUCTS, "projection", "deep blocks")
    groups = inspection.layer_groups
    monkeypatch.setattr(inspection, "layer_groups", lambda p: {k: v for k, v in groups(p).items() if k in chosen})
    rows = run("figure2", tmp_path, "--width", "2", "--method", "minmax")
    layers = [row["layers"] for row in rows if row["quantized"] == "both"]
    assert layers == list(chosen)
    assert len(rows) == 3 * len(layers) - 2
    assert len({row["psnr_y"] for row in rows}) == len(rows)
    check_picture(tmp_path / "out" / "figure2.png")


def test_figure_three_shows_what_calibration_changes(tmp_path: Path) -> None:
    rows = run("figure3", tmp_path, "--width", "3", "--projections", "none", "laplacian", "random")
    changes = {
        name: [float(r["relative_change"]) for r in rows if r["projection"] == name]
        for name in ("none", "laplacian", "random")
    }
    assert all(len(values) == 12 for values in changes.values())
    assert set(changes["none"]) == {0.0}
    assert max(changes["laplacian"]) > 0
    assert all(float(row["relative_error"]) > 0 for row in rows)
    check_picture(tmp_path / "out" / "figure3.png")


def test_figure_five_shows_pictures_with_their_scores(tmp_path: Path) -> None:
    rows = run("figure5", tmp_path, "--methods", "minmax", "dobi", "--zoom", "16", "--count", "1")
    assert [row["method"] for row in rows] == ["bicubic", "float", "MinMax", "DOBI"]
    images = {row["image"] for row in rows}
    assert len(images) == 1
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 4
    check_picture(tmp_path / "out" / "figure5.png")
    named = run("figure5", tmp_path, "--methods", "dobi", "--images", "chelsea", "astronaut", "--zoom", "16")
    assert {row["image"] for row in named} == {"chelsea", "astronaut"}
    run("figure5", tmp_path, "--methods", "dobi", "--images", "nobody", expected=options.EXIT_ERROR)


def test_convergence_plots_the_stored_traces(tmp_path: Path) -> None:
    rows = run("convergence", tmp_path, "--bits", "3")
    making = json.loads(next((tmp_path / "out" / "states").glob("*.json")).read_text())
    losses = [float(row["value"]) for row in rows if row["curve"] == "Refinement: training loss"]
    assert losses == pytest.approx(making["trace"]["refine"]["losses"])
    assert len({row["curve"] for row in rows}) >= 3
    check_picture(tmp_path / "out" / "convergence.png")


def test_a_failing_cell_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--bits", "4", "--set", "algorithm.projection=guess"]
    assert run("convergence", tmp_path, *more, expected=options.EXIT_PARTIAL) == []
    assert "guess" in capsys.readouterr().err


# --- looking inside ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated() -> h.PreparedModel:
    crops = [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    config = h.HarmoqConfig(4, 4, "paper", observer="minmax", joint_scale="none", relative_maps=False)
    return h.calibrate(h.prepare_harmoq(load_transformer(), config), crops)


def test_rules_quantize_the_chosen_sites_only(calibrated: h.PreparedModel) -> None:
    for sites in inspection.layer_groups(calibrated).values():
        for widths in ((2, 3), (2, 32), (32, 3)):
            config = h.HarmoqConfig(4, 4, "paper", inspection.only(sites, *widths))
            chosen = {site.name for site in sites}
            for module in calibrated.sites():
                settings, site = config.settings(module.site.name, module.site.kind), module.site
                right = widths[0] if site.kind == "linear" else widths[1]
                wanted = (right, widths[1]) if site.name in chosen else (32, 32)
                assert (settings.weight.bits, settings.act.bits) == wanted


@pytest.mark.parametrize("name", ["SwinIR/light", "HAT", "DAT/light"])
def test_every_linear_layer_of_a_block_has_a_kind(name: str) -> None:
    example = entry(name)
    prepared = h.prepare_harmoq(example.build(), h.HarmoqConfig(4, 4, "paper"), [example.example()])
    groups = inspection.layer_groups(prepared)
    kinds = [site.name for title, sites in groups.items() if "blocks" not in title for site in sites]
    assert len(kinds) == len(set(kinds))
    ends = ("qkv", "proj", "fc1", "fc2")
    assert {m.site.name for m in prepared.sites() if m.site.name.endswith(ends)} <= set(kinds)
    assert {"query, key, value", "projection", "MLP (GELU)", inspection.PRODUCTS} <= set(groups)


def test_attention_maps_are_those_of_the_model(calibrated: h.PreparedModel) -> None:
    """Float rows sum to one; quantized ones lie on the levels of their quantizer."""
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    exact = h.prepare_harmoq(load_transformer(), calibrated.config)
    maps = inspection.compare_attention(exact, {"W4A4": calibrated}, image)
    assert maps is not None
    assert maps.site == "blocks.1::matmul_1"
    torch.testing.assert_close(maps.maps["float"].sum(1), torch.ones(16))
    assert len(maps.maps["W4A4"].unique()) <= 16
    torch.testing.assert_close(maps.maps["W4A4"], maps.maps["float"], atol=0.05, rtol=0.0)
    first = inspection.compare_attention(exact, {}, image, "blocks.0::matmul_1")
    assert first is not None
    x = exact.model.head(image)
    windows = x.reshape(1, 8, 4, 4, 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 8)
    q, k, _ = exact.model.blocks[0].qkv(windows).chunk(3, -1)
    products = (q @ k.transpose(-2, -1)).softmax(-1)
    assert any(torch.allclose(product, first.maps["float"], atol=1e-5) for product in products)
    with pytest.raises(ConfigError, match="matmul_9"):
        inspection.compare_attention(exact, {}, image, "blocks.0::matmul_9")


def test_relative_maps_are_shown_as_they_weigh_the_values(calibrated: h.PreparedModel) -> None:
    """After rounding rows still sum to one; those that share one step do not."""
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    exact = h.prepare_harmoq(load_transformer(), calibrated.config)
    config = replace(calibrated.config, relative_maps=True)
    relative = h.calibrate(h.prepare_harmoq(load_transformer(), config), [image])
    maps = inspection.compare_attention(exact, {"shared": calibrated, "relative": relative}, image)
    assert maps is not None
    torch.testing.assert_close(maps.maps["relative"].sum(1), torch.ones(16))
    assert float((maps.maps["shared"].sum(1) - 1).abs().max()) > 1e-3
    torch.testing.assert_close(maps.maps["relative"], maps.maps["float"], atol=0.02, rtol=0.0)


def test_errors_and_changes_are_zero_for_the_float_model(calibrated: h.PreparedModel) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    exact = h.prepare_harmoq(load_transformer(), calibrated.config)
    wanted = inspection.site_outputs(Teacher(calibrated).exact, images)
    disable_fake_quant(exact)
    assert set(inspection.relative_errors(inspection.site_outputs(exact, images), wanted).values()) == {0.0}
    errors = inspection.relative_errors(inspection.site_outputs(calibrated, images), wanted)
    assert list(errors) == [s.site.name for s in inspection.linear_sites(calibrated)]
    assert min(errors.values()) > 0
    assert all(not change.any() for change in inspection.weight_changes(calibrated, exact).values())


def test_weight_changes_of_a_restored_model_are_against_the_float_weights(tmp_path: Path) -> None:
    cell = quick_cell("harmoq", 3).with_options({"refine": None})
    exact = tiny_study(tmp_path, load_transformer).fresh(cell.scale, cell.config(0))
    made = inspection.weight_changes(tiny_study(tmp_path, load_transformer).prepared(cell), exact)
    restored = inspection.weight_changes(tiny_study(tmp_path, load_transformer).prepared(cell), exact)
    assert any(bool(change.any()) for change in made.values())
    assert all(torch.equal(made[name], restored[name]) for name in made)


# --- curves -----------------------------------------------------------------------------------------------------------


def site(objectives: list[float], balances: list[tuple[int, float, float]]) -> dict[str, object]:
    return {"start": 4.0, "objectives": objectives, "balances": [list(b) for b in balances]}


def series(curves: pd.DataFrame) -> dict[str, list[tuple[float, float]]]:
    """Steps and values by curve."""
    return {name: list(zip(part["step"], part["value"], strict=True)) for name, part in curves.groupby("curve")}


def test_a_site_that_stopped_early_keeps_its_last_value_and_none_ends_above_its_best() -> None:
    sites = [site([2.0, 3.0, 1.0], [(1, 3.0, 1.0)]), site([4.0, 2.0], [(1, 1.0, 1.0), (2, 1.0, 0.0)]), site([], [])]
    found = series(convergence_curves("W2A2", {"algorithm": {"sites": sites}, "refine": None}))
    assert found == {
        curves.OBJECTIVE: [(0, 1.0), (1, 0.75), (2, 0.5), (3, 0.375)],
        curves.IMBALANCE: [(1, 0.25), (2, 0.75)],
    }


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=300))
def test_averaged_losses_keep_their_mean(losses: list[float]) -> None:
    found = series(convergence_curves("x", {"refine": {"losses": losses, "held_out": []}}))
    assert list(found) == [curves.LOSS]
    ends, means = zip(*found[curves.LOSS], strict=True)
    widths = [after - before for before, after in itertools.pairwise([0, *ends])]
    assert sum(widths) == len(losses)
    assert sum(w * v for w, v in zip(widths, means, strict=True)) == pytest.approx(sum(losses))
    assert convergence_curves("x", {}).empty


def test_held_out_curves_count_steps() -> None:
    trace = {"refine": {"losses": [], "held_out": [[0, 30.0], [50, 31.5]]}}
    assert series(convergence_curves("x", trace)) == {curves.HELD_OUT: [(0, 30.0), (50, 31.5)]}
