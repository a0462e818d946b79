"""`harmoq export`."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch

from tests.cli.command import fails, succeeds


def test_export_a_checkpoint_and_compare(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "float.safetensors"
    printed = succeeds("export", folder / "w4", target, "--check", folder / "set")
    assert "float checkpoint" in printed
    original = safetensors.torch.load_file(folder / "model.safetensors")
    assert set(safetensors.torch.load_file(target)) == set(original)
    succeeds("evaluate", target, folder / "set", "--json", tmp_path / "r.json")
    (scores,) = json.loads((tmp_path / "r.json").read_text())["models"].values()
    assert scores["mean"]["psnr_y"] > 0


def test_export_refuses_what_does_not_fit(folder: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.pt2"
    there.touch()
    assert "--overwrite" in fails("export", folder / "w4", there)
    assert "--format" in fails("export", folder / "w4", tmp_path / "m.bin")
    assert ".safetensors" in fails("export", folder / "w4", tmp_path / "m.pth", "--format", "checkpoint")
    assert ".xml" in fails("export", folder / "w4", tmp_path / "m.ir", "--format", "openvino")
    (tmp_path / "taken.bin").touch()
    assert "taken.bin exists already" in fails("export", folder / "w4", tmp_path / "taken.xml")
    (tmp_path / "taken.bin").unlink()
    assert "Only quantized" in fails("export", folder / "model.safetensors", tmp_path / "m.onnx")
    assert "no folder" in fails("export", folder / "w4", tmp_path / "none" / "m.onnx")
    assert "HEIGHTxWIDTH" in fails("export", folder / "w4", tmp_path / "m.pt2", "--size", "large")
    assert "images of this size" in fails("export", folder / "w4", tmp_path / "m.pt2", "--size", "0x16")
    assert [path.name for path in tmp_path.iterdir()] == ["there.pt2"]
