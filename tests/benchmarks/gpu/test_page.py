"""Tables and charts: of what was measured, and of nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import page
from benchmarks.gpu.plan import MAIN
from benchmarks.gpu.results import STAND_IN, Results
from harmoq_ao.common.errors import InputError

GPU = {"gpu": "NVIDIA Some 100", "torch": "2.11.0", "triton": "3.6.0", "torchao": "0.18", "cuda": "13.0", "driver": "1"}
README = f"# Title\n\n{page.MARK}old\n<!-- end -->\n\nend\n"


def made(tmp_path: Path, rows: list[dict[str, Any]], about: dict[str, Any] = GPU) -> tuple[Path, str]:
    """The folder of results after a run, and the README."""
    folder, readme = tmp_path / "gpu", tmp_path / "README.md"
    results = Results(folder / "some.jsonl")
    for row in rows:
        results.add(about, {"ok": True, "sources": "b"} | row)
    folder.mkdir(exist_ok=True)
    readme.write_text(README)
    page.main(["--results", str(folder), "--readme", str(readme)])
    return folder, readme.read_text()


def model(contender: str, speed: float, side: int = 256, **others: Any) -> dict[str, Any]:
    row = {"p50_ms": 10 / speed, "speed_vs_float32_eager": speed, "peak_mb": 4.0 * side, "psnr_db": 51.234}
    return {"step": f"model/swinir-light x2 {side}x{side} b1/{contender}", "sources": "peers"} | row | others


def test_without_results_it_says_so_and_writes_nothing_else(tmp_path: Path) -> None:
    folder, readme = made(tmp_path, [])
    assert readme == README.replace("old\n", page.NONE)
    assert "No GPU results yet" in readme
    assert list(folder.iterdir()) == []


def test_checks_alone_show_no_speed(tmp_path: Path) -> None:
    _, readme = made(tmp_path, [{"step": "check/mlp: a"}])
    assert "No GPU results yet" in readme


def test_the_stand_in_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stand-in"):
        made(tmp_path, [model("W8A8", 7.0)], GPU | {"gpu": STAND_IN})


def test_the_table_shows_times_ratios_memory_and_failures(tmp_path: Path) -> None:
    rows = [
        {"step": "check/mlp: a"},
        {"step": "time/mlp: a", "p50_ms": 0.5, "graph_ms": 0.4, "floor_ms": 0.1, "of_floor": 0.2},
        model("W8A8", 6.0, sources="b"),
        model("bfloat16 compile, CUDA graphs", 4.0),
        model("float32 eager", 1.0),
        {"step": f"model/{MAIN.name}/torchao int8, CUDA graphs", "ok": False, "error": "no | op", "sources": "peers"},
    ]
    folder, readme = made(tmp_path, rows)
    assert "| **W8A8** | 1.67 | 6.00x | 1.50x | 1024 | 51.2 |" in readme
    assert "| float32 eager | 10 | 1.00x | 0.25x | 1024 |  |" in readme
    assert "| torchao int8, CUDA graphs | no \\| op |" in readme
    assert "1 checks right, none wrong" in readme
    assert "| mlp: a | 0.5 | 0.4 | 0.1 | 20 % |" in (folder / "gpu.md").read_text()
    assert (folder / "some.png").stat().st_size > 1000
    assert not (folder / "some-growth.png").exists()


def test_growth_is_drawn_where_sizes_were_measured(tmp_path: Path) -> None:
    folder, _ = made(tmp_path, [model("float32 eager", 1.0, side) for side in (64, 256, 1024)])
    assert (folder / "some-growth.png").stat().st_size > 1000


def test_where_something_of_ours_is_wrong_no_speed_is_shown(tmp_path: Path) -> None:
    rows = [{"step": "check/mlp: a", "ok": False, "not_finite": 3}, model("W8A8", 9.0, sources="b")]
    folder, readme = made(tmp_path, rows)
    assert "1 steps are wrong" in readme
    assert "9.00x" not in readme
    assert "WRONG: check/mlp: a" in (folder / "gpu.md").read_text()


def test_what_was_mended_is_not_held_against_it(tmp_path: Path) -> None:
    rows = [
        {"step": "check/old: a", "ok": False, "sources": "a"},
        {"step": "check/mlp: a"},
        model("W8A8", 9.0, sources="b"),
    ]
    _, readme = made(tmp_path, rows)
    assert "9.00x" in readme
    assert "old" not in readme
