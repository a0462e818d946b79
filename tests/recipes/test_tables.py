"""Tables: plans, bold numbers, margins, and files that agree with the cells."""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import harmoq_ao as h
from harmoq_ao.common.errors import CheckpointError, ConfigError
from harmoq_ao.recipes import options, study, tables
from harmoq_ao.recipes.cells import Cell, float_cell
from harmoq_ao.recipes.documents import Entry, Plan, grid, numbers, provenance, references, to_markdown
from harmoq_ao.recipes.making import Made
from harmoq_ao.recipes.study import Outcome, Result
from harmoq_ao.zoo.checkpoints import LoadedModel
from tests.recipes.studies import load_transformer, read_csv, run_command, write_checkpoint


def run(table: str, folder: Path, *more: str, expected: int = 0) -> tuple[list[dict[str, str]], str, str]:
    """Rows of the CSV, the Markdown, and what was printed."""
    printed = run_command(tables.main, folder, table, *more, expected=expected)
    name = "ours" if "ours" in more else table
    return read_csv(folder / "out" / f"{name}.csv"), (folder / "out" / f"{name}.md").read_text(), printed


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(options, "loader", lambda checkpoints: load_transformer)
    monkeypatch.chdir(tmp_path)


def check_picture(path: Path) -> None:
    """Drawn on white, wide enough, and not empty."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] >= 1400
    assert (pixels[0] == 255).all()
    assert (pixels < 128).mean() > 0.002


# --- whole tables -----------------------------------------------------------------------------------------------------


def test_table_one_agrees_with_its_cells(tmp_path: Path) -> None:
    rows, markdown, printed = run("table1", tmp_path, "--bits", "3", "8", "--methods", "harmoq", "minmax", "dobi")
    compared = ["MinMax", "DOBI"]
    assert [row["row"] for row in rows] == [
        "bicubic",
        "float",
        *([*compared, "HarmoQ (Algorithm 1)", "HarmoQ + refinement"] * 2),
    ]
    cells = [json.loads(path.read_text()) for path in (tmp_path / "out" / "cells").iterdir()]
    assert len(cells) == len(rows)
    for row in rows:
        alone = row["row"] == "HarmoQ (Algorithm 1)"
        wanted = (int(row["weight_bits"] or 0), row["method"], alone)
        (record,) = (c for c in cells if _described(c["cell"]) == wanted)
        assert float(row["psnr_y"]) == pytest.approx(record["psnr_y"], abs=1e-6)
        assert float(row["ssim_y"]) == pytest.approx(record["ssim_y"], abs=1e-6)
        for text in (markdown, printed):
            assert re.search(rf"{record['psnr_y']:.3f}\W+{record['ssim_y']:.4f}", text)
    exact = float(rows[1]["psnr_y"])
    for row in rows[2:]:
        assert float(row["drop_psnr"]) == pytest.approx(exact - float(row["psnr_y"]), abs=2e-6)
        assert f"({float(row['psnr_y']) - exact:+.3f})" in markdown
    for group in ("W3A3", "W8A8"):
        rivals = [row for row in rows if row["group"] == group]
        best = max(float(row["psnr_y"]) for row in rivals)
        assert {row["row"] for row in rivals if row["best_psnr"] == "1"} == {
            row["row"] for row in rivals if float(row["psnr_y"]) == best
        }
        assert f"**{best:.3f}**" in markdown
        ours = rivals[-1]
        strongest = max(rivals[:2], key=lambda row: float(row["psnr_y"]))
        margin = float(ours["psnr_y"]) - float(strongest["psnr_y"])
        assert ours["strongest_baseline"] == strongest["row"]
        assert float(ours["margin_psnr"]) == pytest.approx(margin, abs=2e-6)
        assert f"{margin:+.3f} ({strongest['row']})" in markdown
    assert "python -m harmoq_ao.recipes.tables table1 --output out" in markdown
    assert "torch" in markdown
    assert "SRC, HSO and ABR; nothing is learned" in markdown
    check_picture(tmp_path / "out" / "table1.png")


def _described(cell: dict[str, Any]) -> tuple[int, str, bool]:
    """Bits, method, and whether it is Algorithm 1 without refinement."""
    settings = cell.get("settings", {})
    alone = settings.get("algorithm") is not None and settings.get("refine") is None
    return cell.get("weight_bits", 0), cell["method"], alone


def test_a_preset_without_refinement_gives_one_row_of_harmoq() -> None:
    plan = tables.table1(parse("table1", "--bits", "4", "--methods", "harmoq", "minmax", "--preset", "algorithm"))
    assert [entry.row for entry in plan.entries if entry.group] == ["MinMax", "HarmoQ"]


def test_bits_by_patch_have_a_row_of_their_own_wherever_there_is_something_to_trade(tmp_path: Path) -> None:
    rows, markdown, _ = run("table1", tmp_path, "--bits", "2", "4", "--methods", "granular-dq", "--converted")
    simulated = "Granular-DQ by patch (simulated)"
    assert [row["row"] for row in rows] == ["bicubic", "float", "Granular-DQ", "Granular-DQ", simulated]
    measured = {
        c["cell"]["options"].get("by_patch", False): c["measured"]
        for path in (tmp_path / "out" / "cells").iterdir()
        if "granular" in (c := json.loads(path.read_text()))["cell"]["method"]
    }
    assert measured[False] == "integer model"
    found = re.search(r"simulation in float .*: (\d\.\d\d) bits of activations on average", measured[True])
    assert found, measured
    assert 3 <= float(found[1]) <= 5
    assert found[0] in markdown


def test_no_other_method_takes_bits_by_patch() -> None:
    with pytest.raises(ConfigError, match="by_patch"):
        Cell("minmax", 4, 4, options=(("by_patch", True),)).settings()


@pytest.fixture
def perturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of quantizing, a cell's model is the float one with noise of its own on the weights."""

    def fake(cell: Cell, loaded: LoadedModel, *rest: Any) -> Made:
        prepared = h.prepare_harmoq(loaded, cell.config(0))
        generator = torch.Generator().manual_seed(int(cell.identity({}).rpartition("-")[2], 16))
        with torch.no_grad():
            for parameter in prepared.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        return Made(prepared)

    monkeypatch.setattr(study, "quantize", fake)


def options_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Options of every quantized cell by its score."""
    records = [json.loads(path.read_text()) for path in (folder / "out" / "cells").iterdir()]
    return {f"{r['psnr_y']:.6f}": r["cell"].get("options", {}) for r in records}


@pytest.mark.usefixtures("perturbed")
def test_table_two_has_all_combinations_and_a_refined_column(tmp_path: Path) -> None:
    rows, markdown, _ = run("table2", tmp_path, "--bits", "3", "--refined")
    labels = [row["row"] for row in rows if row["variant"] == "" and row["group"]]
    assert labels == [
        "none (MSE bounds)",
        *("SRC", "HSO", "ABR"),
        *("SRC + HSO", "SRC + ABR", "HSO + ABR"),
        "SRC + HSO + ABR",
    ]
    assert [row["row"] for row in rows if row["variant"] == tables.REFINED and row["group"]] == labels
    chosen = options_of(tmp_path)
    for row in rows[4:]:
        given = chosen[row["psnr_y"]]
        on = [name for name in tables.COMPONENTS if given.get(f"algorithm.{name}", False)]
        assert row["row"] == (" + ".join(on).upper() or "none (MSE bounds)")
        assert ("algorithm" in given) == (not on)
        assert ("refine" in given) == (row["variant"] == "")
        assert given.get("config.joint_scale") == (None if "hso" in on else "none")
    assert "Mini, then refined" in markdown
    check_picture(tmp_path / "out" / "table2.png")


@pytest.mark.usefixtures("perturbed")
def test_table_three_compares_projections(tmp_path: Path) -> None:
    rows, _, _ = run("table3", tmp_path, "--bits", "3", "--projections", "none", "laplacian", "learned")
    chosen = {row["row"]: options_of(tmp_path)[row["psnr_y"]] for row in rows if row["group"]}
    assert list(chosen) == ["none", "laplacian", "learned"]
    assert chosen["none"]["algorithm.src"] is False
    assert [chosen[name]["algorithm.projection"] for name in list(chosen)[1:]] == ["laplacian", "learned"]
    check_picture(tmp_path / "out" / "table3.png")


@pytest.mark.usefixtures("perturbed")
def test_additions_take_variations_from_a_file(tmp_path: Path) -> None:
    variations = {"bare": tables.BARE, "bounds": {"algorithm": None, "refine.rates.weights": 0.0}}
    (tmp_path / "own.json").write_text(json.dumps(variations))
    more = ["--bits", "W3A4", "--variations", "own.json", "--name", "ours", "--title", "Own stages"]
    rows, markdown, _ = run("additions", tmp_path, *more)
    assert [(row["group"], row["row"]) for row in rows[2:]] == [("W3A4", "bare"), ("W3A4", "bounds")]
    assert markdown.startswith("# Own stages\n")
    check_picture(tmp_path / "out" / "ours.png")


def test_a_failed_cell_is_shown_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.json").write_text(json.dumps({"good": tables.BARE, "bad": {"algorithm.projection": "guess"}}))
    more = ["--bits", "4", "--variations", "own.json", "--name", "ours"]
    rows, markdown, printed = run("additions", tmp_path, *more, expected=options.EXIT_PARTIAL)
    assert rows[-1]["psnr_y"] == ""
    assert "| W4A4 | bad | failed |" in markdown
    assert "failed" in printed
    assert "guess" in capsys.readouterr().err


# --- plans ------------------------------------------------------------------------------------------------------------


def left_out(stage: dict[str, Any]) -> set[str]:
    """What a stage of the additions does without, by the names of the settings."""
    missing = {name for name, value in stage.items() if not value or value == "none"}
    if "refine" in missing:
        missing |= {f"refine.rates.{kind}" for kind in ("scales", "weights", "rest")}
    return missing | ({"config.joint_shift"} if "config.joint_scale" in missing else set())


def test_the_stages_build_on_each_other() -> None:
    stages = [stage for stage in tables.ADDITIONS.values() if "algorithm.src" not in stage]
    for before, after in itertools.pairwise(stages):
        assert left_out(dict(after)) < left_out(dict(before))
    assert left_out(dict(stages[-1])) == set()
    given = parse("additions", "--bits", "2")
    cells = [entry.cell for entry in tables.additions(given).entries if entry.group]
    assert len(set(cells)) == len(tables.ADDITIONS)


def parse(*arguments: str) -> argparse.Namespace:
    folders = ["--output", "o", "--benchmark", "b", "--calibration", "c"]
    return tables.parser().parse_args([arguments[0], *folders, *arguments[1:]])


def test_bits_and_options_are_read() -> None:
    given = parse("table1", "--bits", "4", "W2A32", "--set", "refine.steps=5", "--set", "crops=3")
    assert given.bits == [(4, 4), (2, 32)]
    cell = options.template(given, "harmoq", 2, (4, 4))
    assert dict(cell.options) == {"refine.steps": 5, "crops": 3}
    assert options.template(given, "dobi", 2, (4, 4)).options == (("crops", 3),)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--bits", "1"],
        ["--bits", "W4"],
        ["--methods", "magic"],
        ["--set", "refine.steps"],
        ["--set", "refine.steps=[1]"],
    ],
)
def test_wrong_arguments_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("table1", *wrong)
    assert wrong[0].strip("-") in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"a": 1}'])
def test_wrong_variations_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "own.json").write_text(text)
    with pytest.raises(ConfigError, match=r"own\.json"):
        tables.read_variations(tmp_path / "own.json")


def test_a_device_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--output", str(tmp_path / "out"), "--benchmark", "b", "--calibration", "c", "--device", "tpu"]
    assert tables.main(["table1", *given]) == options.EXIT_ERROR
    assert "Unknown device" in capsys.readouterr().err


def test_an_error_ends_the_command_with_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--output", "out", "--benchmark", "nowhere", "--calibration", "nowhere"]
    assert tables.main(["table1", *given]) == options.EXIT_ERROR
    assert "nowhere does not exist" in capsys.readouterr().err


def test_an_interrupted_command_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(study.Study, "run", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(FileNotFoundError):  # no table is written
            run("table1", tmp_path, expected=options.EXIT_INTERRUPTED)
    assert "same command" in capsys.readouterr().err


def test_checkpoints_are_found_by_their_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    load = options.loader([write_checkpoint(tmp_path / "swinir.pth")])
    assert load(2).scale == 2
    assert load(2) is load(2)
    with pytest.raises(CheckpointError, match="scale 4"):
        load(4)
    assert isinstance(load(2), LoadedModel)


# --- bold numbers and margins -----------------------------------------------------------------------------------------


@st.composite
def measured(draw: st.DrawFn) -> tuple[Plan, Outcome]:
    """A plan of up to two groups and sets, with scores on a coarse grid (ties) and failures."""
    sets = draw(st.sampled_from([("A",), ("A", "B")]))
    groups = draw(st.sampled_from([("W2A2",), ("W2A2", "W4A4")]))
    rows = ("one", "two", "ours")[: draw(st.integers(1, 3))]
    made = [Entry(g, row, Cell("dobi", 2 + i, 2 + j)) for i, g in enumerate(groups) for j, row in enumerate(rows)]
    plan, outcome = Plan("name", "Title", sets, [*references([2]), *made], "ours"), Outcome()
    for cell in plan.cells():
        for name in sets:
            if cell.is_reference or draw(st.booleans()):
                psnr, ssim = draw(st.integers(200, 400)) / 10, draw(st.integers(0, 5)) / 5
                outcome.results[cell, name] = Result(psnr, ssim, seconds_quantize=1.0, seconds_evaluate=2.0)
    return plan, outcome


@given(measured())
def test_exactly_the_best_of_each_group_are_bold(given: tuple[Plan, Outcome]) -> None:
    plan, outcome = given
    found = numbers(plan, outcome)
    for (group, _), rivals in found.groupby(["group", "set"]):
        contested = bool(group) and rivals["psnr_y"].count() > 1
        for _, entry in rivals[rivals["psnr_y"].notna()].iterrows():
            assert entry["best_psnr"] == (contested and entry["psnr_y"] == rivals["psnr_y"].max())
            assert entry["best_ssim"] == (contested and entry["ssim_y"] == rivals["ssim_y"].max())
    bold = found["best_psnr"].sum() + found["best_ssim"].sum()
    assert to_markdown(plan, found, "", "").count("**") == 2 * bold
    assert sum(cell.count("**") for row in grid(plan, found).to_numpy() for cell in row) == 2 * bold


@given(measured())
def test_margins_are_over_the_strongest_other_row(given: tuple[Plan, Outcome]) -> None:
    plan, outcome = given
    found = numbers(plan, outcome)
    scores = {(e["group"], e["set"], e["row"]): e["psnr_y"] for _, e in found.dropna(subset="psnr_y").iterrows()}
    assert found[found["row"] != "ours"]["margin_psnr"].isna().all()
    for _, entry in found[found["row"] == "ours"].iterrows():
        place = entry["group"], entry["set"]
        others = [scores[*place, name] for name in ("one", "two") if (*place, name) in scores]
        known = (*place, "ours") in scores and bool(others)
        assert math.isnan(entry["margin_psnr"]) != known
        if known:
            assert entry["margin_psnr"] == entry["psnr_y"] - max(others)
            assert scores[*place, entry["strongest_baseline"]] == max(others)


def test_another_row_of_ours_is_no_baseline() -> None:
    cells = {
        "MinMax": Cell("minmax", 4, 4),
        "alone": Cell("harmoq", 4, 4, preset="algorithm"),
        "ours": Cell("harmoq", 4, 4),
    }
    plan = Plan("name", "Title", ("A",), [Entry("W4A4", row, cell) for row, cell in cells.items()], "ours")
    scores = dict(zip(cells.values(), (30.0, 32.0, 31.0), strict=True))
    found = numbers(plan, Outcome({(cell, "A"): Result(psnr, 0.9) for cell, psnr in scores.items()}))
    assert found["strongest_baseline"].iloc[-1] == "MinMax"
    assert found["margin_psnr"].iloc[-1] == 1.0


@given(measured())
def test_there_is_a_line_for_every_number(given: tuple[Plan, Outcome]) -> None:
    plan, outcome = given
    found = numbers(plan, outcome)
    assert len(found) == len(plan.entries) * len(plan.sets)
    for (entry, name), (_, line) in zip(itertools.product(plan.entries, plan.sets), found.iterrows(), strict=True):
        expected, exact = outcome.get(entry.cell, name), outcome.results[float_cell(2), name]
        assert (line["row"], line["set"]) == (entry.row, name)
        assert math.isnan(line["psnr_y"]) == (expected is None)
        if expected is not None:
            assert line["psnr_y"] == expected.psnr_y
            assert line["drop_psnr"] == exact.psnr_y - expected.psnr_y


def test_provenance_names_every_machine_once() -> None:
    def result(measured: str, **environment: Any) -> Result:
        return Result(1.0, 1.0, measured=measured, environment=environment)

    versions = {"torch": "2.15", "numpy": "1.26", "harmoq_ao": "0.1", "python": "3.11"}
    text = provenance([result("simulation in float", cpu="A", **versions), result("", cpu="A", gpu="G", **versions)])
    assert text.count("2.15") == 1
    assert "Machine: A; G." in text
    assert "simulation in float" in text
    assert "Quantized" not in provenance([result("", cpu="A", **versions)])


def test_a_reference_has_no_bits_in_the_csv() -> None:
    text = numbers(Plan("name", "Title", ["A"], references([2])), Outcome()).to_csv(index=False)
    line = next(csv.DictReader(io.StringIO(text)))
    assert (line["weight_bits"], line["profile"], line["set"], line["psnr_y"]) == ("", "", "A", "")
