"""Tests of what torch compiles: with a C++ compiler, without one, and without its code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler"
)


def trace_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile traces is run as it is."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, **{**options, "backend": "aot_eager"}))


def run_without_compiler(program: str, folder: Path) -> str:
    """What a program prints, in a process of its own: torch looks for a compiler once, and keeps what it compiled."""
    missing = {"CXX": str(folder / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(command, env={**os.environ, **missing}, capture_output=True, text=True, check=True).stdout
