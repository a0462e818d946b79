"""A file that a long optimisation saves its progress to, and resumes from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from harmoq_ao.common.distributed import is_first
from harmoq_ao.common.errors import CheckpointError, shown
from harmoq_ao.common.files import NOTHING, check_file, found_at
from harmoq_ao.common.output import atomic_write

Progress = tuple[dict[str, Tensor], dict[str, Any]]
"""Contents of a file: tensors by name, and JSON-able data."""
_KEY = "harmoq_ao_progress"
_MAX_BYTES = 16 << 30


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
        """Write the file, by the first rank only; an interrupted write leaves the previous one.

        Raises:
            OutputError: The file cannot be written.
        """
        if self.path is None or not is_first():
            return
        text = json.dumps({"identity": self.identity, "data": data})
        content = safetensors.torch.save({k: t.cpu().contiguous() for k, t in tensors.items()}, {_KEY: text})
        with atomic_write(self.path) as file:
            file.write(content)

    def load(self) -> Progress | None:
        """Contents of the file, or None if there is no file.

        Raises:
            CheckpointError: It is damaged, larger than 16 GiB, not a checkpoint of this project, or of other work.
        """
        if self.path is None or found_at(self.path) == NOTHING:
            return None
        check_file(self.path, CheckpointError, "a file that harmonization has saved", _MAX_BYTES)
        try:
            with safe_open(str(self.path), framework="pt") as file:
                stored = json.loads((file.metadata() or {})[_KEY])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            identity, data = dict(stored["identity"]), dict(stored["data"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} is not a progress file",
                found=f"{type(error).__name__}: {error}",
                expected="a file that harmonization has saved",
                remedy="delete it to start over",
            ) from error
        if identity != self.identity:
            raise CheckpointError(
                f"{self.path} holds the progress of other work",
                found="; ".join(_differences(identity, self.identity))[:400],
                expected="the same method, model, images, bits and settings",
                remedy="delete it to start over, or repeat what it was made with",
            )
        return tensors, data


def _differences(stored: dict[str, Any], given: dict[str, Any], path: str = "") -> Iterator[str]:
    """What differs, entry by entry."""
    for key in sorted({**stored, **given}):
        before, now = stored.get(key), given.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(before, now, f"{path}{key}.")
        elif before != now:
            yield f"{path}{key}: {shown(before)} in the file, {shown(now)} now"
