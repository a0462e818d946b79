"""What an installation contains, and what imports cost."""

from __future__ import annotations

import importlib
import os
import pkgutil
import random
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import harmoq_ao

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MOVED = {"recipes": "harmoq_ao.recipes", "triton_kernels": "harmoq_ao.triton_kernels"}
COMMANDS = ("demo", "quantize", "evaluate", "upscale", "inspect", "report", "export")
MODULES = [
    module.name
    for module in pkgutil.walk_packages(harmoq_ao.__path__, "harmoq_ao.")
    if not module.name.endswith("__main__") and not module.name.startswith("harmoq_ao.recipes")
]
OPTIONAL = {"nncf", "onnx", "onnxruntime", "onnxscript", "openvino", "ray"}
HEAVY = OPTIONAL | {
    *("PIL", "datasets", "fsspec", "jinja2", "matplotlib", "numpy", "pandas", "safetensors", "scipy", "skimage"),
    *("spandrel", "tifffile", "torch", "torchao", "triton"),
}


def modules_after(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has imported after some code, which must log and warn of nothing."""
    report = r"import atexit, sys; atexit.register(lambda: print('\n@', *sys.modules))" + "\n"
    done = subprocess.run([sys.executable, "-c", report + code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return {name.partition(".")[0] for name in done.stdout.rpartition("\n@")[2].split()}


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
    assert PROJECT["project"]["version"] == harmoq_ao.__version__
    assert harmoq_ao.__version__ in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", harmoq_ao.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(harmoq_ao, name) is not None
    assert name in dir(harmoq_ao)


@pytest.mark.parametrize("code", ["import harmoq_ao", "from harmoq_ao import HarmoqError, METHODS"])
def test_importing_the_package_imports_nothing_else(code: str) -> None:
    assert not modules_after(code) & (HEAVY | {"typer", "rich"})


@pytest.mark.parametrize("arguments", [(), *((command,) for command in COMMANDS)], ids=" ".join)
def test_help_waits_for_no_library(arguments: tuple[str, ...]) -> None:
    code = f"import sys; sys.argv = {['harmoq', *arguments, '--help']}; from harmoq_ao.cli import app; app()"
    assert not modules_after(code) & HEAVY


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_modules_import_in_any_order_and_silently(seed: int) -> None:
    for extra in ("openvino", "onnxscript"):  # two modules of an extra import it
        pytest.importorskip(extra)
    modules_after("\n".join(f"import {name}" for name in random.Random(seed).sample(MODULES, len(MODULES))))


def test_rooms_import_without_extras() -> None:
    code = "import harmoq_ao; [getattr(harmoq_ao, name) for name in harmoq_ao.__all__]"
    assert not modules_after(code) & OPTIONAL


_EXAMPLE = """
import sys, torch, harmoq_ao
from harmoq_ao import HarmoqConfig, calibrate, convert_harmoq, prepare_harmoq
from harmoq_ao.recipes.architectures import ARCHITECTURES

model = next(entry for entry in ARCHITECTURES if entry.name == "SwinIR/light").build()
images = [torch.rand(1, 3, 16, 16)]
prepared = prepare_harmoq(model, HarmoqConfig(weight_bits=4, act_bits=4), images)
calibrate(prepared, images)
quantized = convert_harmoq(prepared)
assert quantized(images[0]).shape == (1, 3, 32, 32)
print(harmoq_ao.__file__)
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel installs that is built from the sdist, as PyPI's users get it."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("building needs setuptools >= 77")
    folder = tmp_path_factory.mktemp("packages")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False).stdout
    for name in tracked.decode().split("\0"):
        if name.startswith(("harmoq_ao", "recipes", "triton_kernels")) or (name.count("/") == 0 and name):
            target = folder / "tree" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target, follow_symlinks=False)
    if not (folder / "tree" / "pyproject.toml").exists():
        pytest.skip("no git checkout")
    sdist = _built("sdist", folder / "tree", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    with zipfile.ZipFile(_built("wheel", source, folder)) as wheel:
        wheel.extractall(folder / "installed")
    return folder / "installed"


def _built(kind: str, source: Path, folder: Path) -> Path:
    code = f"from setuptools import build_meta; print('@', build_meta.build_{kind}({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True)
    return folder / done.stdout.rpartition("@ ")[2].strip()


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["-c", _EXAMPLE], ["-m", "harmoq_ao.cli", "--help"]], ids=["example", "help"])
def test_what_is_installed_works_outside_the_checkout(arguments: list[str], unpacked: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(unpacked) in done.stdout or "quantize" in done.stdout


@pytest.mark.slow
def test_every_file_that_is_read_is_installed(unpacked: Path) -> None:
    named = PROJECT["tool"]["setuptools"]["package-data"]
    for package, patterns in named.items():
        folder = package.replace(".", "/")
        for pattern in patterns:
            here = {path.relative_to(ROOT / folder) for path in (ROOT / folder).glob(pattern) if path.is_file()}
            assert here
            assert here <= {path.relative_to(unpacked / folder) for path in (unpacked / folder).rglob("*")}
    assert "harmoq = harmoq_ao.cli:app" in next(unpacked.glob("*.dist-info/entry_points.txt")).read_text()
