"""`harmoq demo`; `tests/recipes/test_demo.py` tests what it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import succeeds


def test_demo_runs_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    monkeypatch.setattr("harmoq_ao.recipes.demo.run_demo", lambda output, console: made.append(output))
    succeeds("demo", "--output", tmp_path / "out")
    assert made == [tmp_path / "out"]
