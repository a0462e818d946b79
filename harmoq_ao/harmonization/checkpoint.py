"""A file that a long optimisation saves its progress to, and resumes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from harmoq_ao.common.errors import CheckpointError
from harmoq_ao.common.output import atomic_write

Progress = tuple[dict[str, Tensor], dict[str, Any]]
"""Contents of a file: tensors by name, and JSON-able data."""
_KEY = "harmoq_ao_progress"


class Checkpoint:
    """Tensors and JSON in one safetensors file, replaced atomically.

    Args:
        path: The file; None saves nothing.
        identity: JSON-able description of the work. A file of other work is refused.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any]) -> None:
        self.path = path
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))

    def save(self, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        """Write the file; an interrupted write leaves the previous one.

        Raises:
            OutputError: The file cannot be written.
        """
        if self.path is None:
            return
        text = json.dumps({"identity": self.identity, "data": data})
        content = safetensors.torch.save({k: t.cpu().contiguous() for k, t in tensors.items()}, {_KEY: text})
        with atomic_write(self.path) as file:
            file.write(content)

    def load(self) -> Progress | None:
        """Contents of the file, or None if there is no file.

        Raises:
            CheckpointError: It is damaged, not a checkpoint of this project, or of other work.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            with safe_open(str(self.path), framework="pt") as file:
                stored = json.loads((file.metadata() or {})[_KEY])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} is not a progress file",
                found=f"{type(error).__name__}: {error}",
                expected="a file that harmonization has saved",
                remedy="delete it to start over",
            ) from error
        if stored["identity"] != self.identity:
            raise CheckpointError(
                f"{self.path} holds the progress of other work",
                found=_difference(stored["identity"], self.identity),
                expected="the same model, data and settings",
                remedy="delete it to start over, or repeat the settings it was made with",
            )
        return tensors, stored["data"]


def _difference(stored: dict[str, Any], given: dict[str, Any]) -> str:
    keys = [key for key in {**stored, **given} if stored.get(key) != given.get(key)]
    return "; ".join(f"{key}: {stored.get(key)!r} instead of {given.get(key)!r}" for key in sorted(keys))[:400]
