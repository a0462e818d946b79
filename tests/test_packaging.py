"""What an installation contains."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MOVED = {"recipes": "harmoq_ao.recipes", "triton_kernels": "harmoq_ao.triton_kernels"}


def test_every_package_of_the_repository_is_installed() -> None:
    on_disk = set()
    for top in ("harmoq_ao", *MOVED):
        for init in (ROOT / top).rglob("__init__.py"):
            name = ".".join(init.parent.relative_to(ROOT).parts)
            on_disk.add(name.replace(top, MOVED.get(top, top), 1))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == on_disk


@pytest.mark.parametrize("folder", MOVED)
def test_folders_at_the_top_are_importable_below_the_package(folder: str) -> None:
    module = importlib.import_module(MOVED[folder])
    assert module.__file__ is not None
    assert Path(module.__file__).parent.name == folder


def test_the_published_versions_agree() -> None:
    version = importlib.import_module("harmoq_ao").__version__
    assert PROJECT["project"]["version"] == version
    assert version in (ROOT / "CHANGELOG.md").read_text()


def test_the_command_starts_without_what_only_some_of_it_needs() -> None:
    heavy = ("datasets", "jinja2", "matplotlib", "nncf", "onnx", "onnxruntime", "openvino", "pandas", "ray", "scipy")
    code = f"import sys, harmoq_ao.cli; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
