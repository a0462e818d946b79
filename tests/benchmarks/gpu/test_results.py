"""Lines of results: nothing is lost, nothing of the stand-in is among them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu import results
from benchmarks.gpu.results import FOLDER, STAND_IN, Results, finite, path_for, sources
from harmoq_ao.common.errors import OutputError

GPU = {"gpu": "NVIDIA Some 100", "torch": "2.11.0"}


def test_rows_are_on_disk_when_they_are_known(tmp_path: Path) -> None:
    path = tmp_path / "below" / "a.jsonl"
    first = Results(path)
    first.add(GPU, {"step": "check/a", "ok": True})
    first.add(GPU, {"step": "check/b", "ok": False, "error_rms": float("nan")})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("step") for line in lines] == [None, "check/a", "check/b"]  # the environment once
    assert lines[2]["error_rms"] == "nan"
    again = Results(path).rows()
    assert [row["step"] for row in again] == ["check/a", "check/b"]
    assert all(GPU.items() <= row.items() for row in again)


def test_a_half_written_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    Results(path).add(GPU, {"step": "check/a", "ok": True})
    with path.open("a") as file:
        file.write('{"step": "check/b", "o')  # killed while it wrote
    Results(path).add(GPU, {"step": "check/c", "ok": True})
    assert [row["step"] for row in Results(path).rows()] == ["check/a", "check/c"]


def test_the_stand_in_is_never_among_gpu_results(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="stand-in"):
        Results(tmp_path / FOLDER / "a.jsonl").add({"gpu": STAND_IN}, {"step": "check/a", "ok": True})
    assert not (tmp_path / FOLDER).exists()
    assert FOLDER not in path_for(STAND_IN).parents
    assert path_for("NVIDIA H100 80GB HBM3") == FOLDER / "nvidia-h100-80gb-hbm3.jsonl"
    assert path_for(STAND_IN, tmp_path) == tmp_path


def test_infinities_and_nan_are_text() -> None:
    assert finite({"a": [1.0, float("inf")], "b": -float("inf"), "c": "x"}) == {
        "a": [1.0, "inf"],
        "b": "-inf",
        "c": "x",
    }


def test_sources_tell_ours_from_those_of_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    for name in ("triton_kernels/mlp.py", "benchmarks/peers.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("a")
    ours, peers = sources(True), sources(False)
    (tmp_path / "triton_kernels/mlp.py").write_text("b")
    assert sources(True) != ours
    assert sources(False) == peers
    (tmp_path / "benchmarks/peers.py").write_text("b")
    assert sources(False) != peers
