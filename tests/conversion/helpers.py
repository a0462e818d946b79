"""Saved models on disk, for tests of saving, loading and the format."""

from __future__ import annotations

import errno
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

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


def denied(method: str) -> AbstractContextManager[object]:
    """Context manager under which the system refuses a method of every path."""
    return mock.patch.object(Path, method, side_effect=PermissionError(errno.EACCES, "Permission denied"))


def weights_of(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))
