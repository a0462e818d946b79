"""`harmoq evaluate`."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from harmoq_ao.cli import evaluate
from tests.cli.command import fails, succeeds


def test_evaluate_prints_and_writes_the_same_numbers_each_time(folder: Path, tmp_path: Path) -> None:
    given = ("evaluate", folder / "w4", folder / "set", "--float", folder / "model.safetensors", "--bicubic")
    printed = succeeds(*given, "--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv")
    first = json.loads((tmp_path / "r.json").read_text())["models"]
    assert list(first) == [str(folder / "w4"), str(folder / "model.safetensors"), "bicubic"]
    for results in first.values():
        assert f"{results['mean']['psnr_y']:.3f}" in printed
        assert f"{results['mean']['ssim_y']:.4f}" in printed
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert [row["image"] for row in rows] == ["0", "1", "mean"] * 3
    separate = ("evaluate", folder / "w4", folder / "set" / "HR", folder / "set" / "LR_bicubic", "--scale", 2)
    succeeds(*separate, "--json", tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())["models"][str(folder / "w4")]
    assert again["mean"]["psnr_y"] == first[str(folder / "w4")]["mean"]["psnr_y"]


def test_evaluate_refuses_what_does_not_fit(folder: Path, tmp_path: Path) -> None:
    assert "The scales differ" in fails("evaluate", folder / "w4", folder / "set", "--scale", 3)
    assert "not a benchmark folder" in fails("evaluate", folder / "w4", folder / "photographs")
    assert "compared with itself" in fails("evaluate", folder / "w4", folder / "set", "--float", folder / "w4")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (folder / "w4").iterdir():
        data = bytearray(file.read_bytes())
        if file.suffix == ".safetensors":
            data[len(data) // 2] ^= 1
        (broken / file.name).write_bytes(data)
    assert "Error" in fails("evaluate", broken, folder / "set")


def test_results_are_written_before_they_are_shown(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError("the terminal has gone")

    monkeypatch.setattr(evaluate, "_score_table", broken)
    fails("evaluate", folder / "w4", folder / "set", "--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv")
    assert json.loads((tmp_path / "r.json").read_text())["models"]
    assert (tmp_path / "r.csv").read_text().count("\n") == 4


def test_outputs_are_checked_before_the_model_is_opened(folder: Path, tmp_path: Path) -> None:
    for option in ("--json", "--csv"):
        assert "cannot be written" in fails("evaluate", tmp_path / "none", folder / "set", option, tmp_path)


def test_other_names_by_a_pattern(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "set" / "HR", tmp_path / "HR")
    for path in (folder / "set" / "LR_bicubic" / "X2").iterdir():
        (tmp_path / "LR").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "LR" / f"small-{path.name.replace('x2', '')}")
    assert "--lr-name" in fails("evaluate", folder / "w4", tmp_path)
    succeeds("evaluate", folder / "w4", tmp_path, "--lr-name", "small-{name}")
    assert "with {name} once" in fails("evaluate", folder / "w4", tmp_path, "--lr-name", "small")
