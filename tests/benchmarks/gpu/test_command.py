"""`python -m benchmarks.gpu` in Triton's interpreter, from a copy of the checkout that is installed nowhere.

The copy runs without the packages that a bare machine lacks: it has torch, Triton, torchao and spandrel with what these
need. Kernels are made wrong in the copy's sources, and have to be found.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
BARE = """
import sys
from importlib.machinery import PathFinder

MISSING = {"datasets", "hypothesis", "imageio", "matplotlib", "openvino", "pandas", "pyarrow", "rich", "scipy",
           "skimage", "tifffile", "typer"}


class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in MISSING else super().find_spec(name, path, target)


finders = (Bare if finder is PathFinder else finder for finder in sys.meta_path)
sys.meta_path = [finder for finder in finders if "editable" not in repr(finder).lower()]
"""
PARTS = ("--only", "check/linear", "check/mlp, norm", "check/window")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    copy = tmp_path / "checkout"
    for name in ("benchmarks", "harmoq_ao", "recipes", "triton_kernels"):
        shutil.copytree(
            ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "results")
        )
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BARE)
    return copy


def benchmark(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command, as on a bare machine."""
    variables = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET", "HARMOQ_CPU_KERNELS")
    }
    variables |= {"PYTHONPATH": str(checkout.parent / "site"), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    variables |= {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--quick", "--jobs", "2", *arguments]
    return subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True, timeout=550)


def rows(checkout: Path) -> list[dict[str, Any]]:
    """Lines of results, without the environment."""
    lines = (checkout / "build/bench-gpu/stand-in.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "step" in row]


def test_quick_runs_whole_on_a_bare_machine_and_continues(checkout: Path) -> None:
    first = benchmark(
        checkout, "--only", "prepare", "check", "agree", "time/device", "time/linear", "float32 eager", "W8A8"
    )
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.startswith("Triton interpreter, no GPU: ")
    kinds = [row["step"].partition("/")[0] for row in rows(checkout)]
    assert {"prepare", "check", "agree", "time", "model"} == set(kinds)
    assert kinds.count("check") >= 10
    assert not (checkout / "benchmarks/results").exists()
    before = len(kinds)
    second = benchmark(checkout, "--only", "check", "bfloat16 eager")
    assert second.returncode == 0, second.stdout + second.stderr
    new = [row["step"] for row in rows(checkout)[before:]]
    assert new == ["model/swinir-tiny x2 16x16 b1/bfloat16 eager"]


@pytest.mark.parametrize(
    "wrong",
    [
        'constant = tl.load * float("nan")',
        pytest.param("constant = tl.load * 0.0", marks=pytest.mark.slow),
        pytest.param("scale = tl.load * 2.0", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_kernel_fails(checkout: Path, wrong: str) -> None:
    name, _, factor = wrong.partition(" = tl.load ")
    path = checkout / "triton_kernels" / "device.py"
    before, mark, after = path.read_text().partition("def dequantize(")
    changed, count = re.subn(rf"^( +{name} = tl\.load\(.*\))$", rf"\1 {factor}", after, count=1, flags=re.MULTILINE)
    assert count == 1
    path.write_text(before + mark + changed)
    done = benchmark(checkout, *PARTS)
    assert done.returncode == 1, done.stdout + done.stderr
    found = rows(checkout)
    failed = [row for row in found if not row["ok"]]
    assert {row["step"] for row in failed} == {row["step"] for row in found if "check/linear" not in row["step"]}
    assert len(failed) >= 5
    assert all("error" not in row for row in failed)  # it ran, and its result was found wrong
    assert f"WRONG ({len(failed)})" in done.stdout


def test_a_kernel_that_does_not_compile_fails_alone(checkout: Path) -> None:
    path = checkout / "triton_kernels" / "mlp.py"
    text = path.read_text()
    assert text.count("def launch_mlp(") == 1
    path.write_text(text.replace("def launch_mlp(", "def launch_mlp(x, *_, **__):\n    1 / 0\n\n\ndef _other("))
    done = benchmark(checkout, "--only", "check/mlp, norm, residual", "check/linear")
    assert done.returncode == 1, done.stdout + done.stderr
    assert {row["step"].split(":")[0]: row["ok"] for row in rows(checkout)} == {
        "check/linear": True,
        "check/linear, norm, gelu": True,
        "check/linear, gate, residual": True,
        "check/mlp, norm, residual": False,
    }
    assert "ZeroDivisionError" in done.stdout


def test_without_a_gpu_it_says_what_to_do(checkout: Path) -> None:
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "There is no GPU here" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr
