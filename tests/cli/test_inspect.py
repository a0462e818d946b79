"""`harmoq inspect`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.command import succeeds


def test_inspect_a_saved_model(folder: Path) -> None:
    printed = succeeds("inspect", folder / "w4")
    assert "W4A4" in printed
    assert "conv2d" not in printed
    assert "conv2d" in succeeds("inspect", folder / "w4", "--all")
    report = json.loads(succeeds("inspect", folder / "w4", "--json"))
    linears = [site for site in report["sites"] if site["kind"] == "linear"]
    assert all(site["kernel"] for site in linears if site["reason"] is None)


def test_inspect_a_checkpoint(folder: Path) -> None:
    printed = succeeds("inspect", folder / "model.safetensors")
    assert "W8A8" in printed
    assert "float model" in printed
