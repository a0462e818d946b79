"""Saved models on disk, for tests of saving, loading and the format."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from harmoq_ao.config import HarmoqConfig

SMALL = "SwinIR/light"
CONFIG = HarmoqConfig(4, 4, "paper")


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(weights_of(folder))
    return tensors


def weights_of(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))
