"""`harmoq evaluate`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

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
