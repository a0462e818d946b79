"""A file of results that loses nothing: one JSON line for each step, appended as soon as it is known.

A line without ``step`` describes an environment (GPU, driver, versions); rows refer to it by its ``environment``. A row
belongs to the sources it was measured with (``sources``), so that a rerun repeats what was changed and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from harmoq_ao.common.errors import OutputError
from harmoq_ao.common.output import make_folder

ROOT = Path(__file__).parents[2]
FOLDER = Path("benchmarks/results/gpu")
"""Measurements of GPUs, in a file for each GPU; they are committed."""

STAND_IN = "Triton interpreter, no GPU"
"""The name of the stand-in device."""

_PEERS = ("benchmarks/gpu/contenders.py", "benchmarks/gpu/models.py", "benchmarks/peers.py")
_OURS = ("harmoq_ao/**/*.py", "triton_kernels/*.py", "benchmarks/gpu/*.py", "benchmarks/peers.py")


class Results:
    """The rows of one file.

    Args:
        path: The file; made when the first line is added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = list(_lines(path))

    def rows(self) -> list[dict[str, Any]]:
        """All rows, each with what its environment was."""
        known = {line["environment"]: line for line in self._lines if "step" not in line}
        return [known.get(line["environment"], {}) | line for line in self._lines if "step" in line]

    def add(self, environment: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        """Write a row down, on disk when this returns; its environment before it where that is new.

        Raises:
            OutputError: Results of the stand-in are on their way among those of GPUs.
        """
        stand_in = environment.get("gpu") == STAND_IN
        if stand_in and FOLDER.parts == self.path.parent.parts[-len(FOLDER.parts) :]:
            raise OutputError(
                "The stand-in's results are none of a GPU", found=self.path, expected=f"a file outside of {FOLDER}"
            )
        identity = digest(environment)
        if not any(line["environment"] == identity for line in self._lines if "step" not in line):
            self._append({"environment": identity, **environment})
        self._append({"step": row["step"], "environment": identity, **row})

    def _append(self, line: dict[str, Any]) -> None:
        make_folder(self.path.parent)
        text = json.dumps(finite(line), allow_nan=False) + "\n"
        with self.path.open("a+b") as file:
            if file.tell() and not self.path.read_bytes().endswith(b"\n"):
                text = "\n" + text  # a line that a killed process left half written
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self._lines.append(line)


def path_for(gpu: str, full_name: Path | None = None) -> Path:
    """The file of a GPU's results; of the stand-in outside of the repository's results."""
    if full_name is not None:
        return full_name
    if gpu == STAND_IN:
        return Path("build/bench-gpu/stand-in.jsonl")
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".jsonl")


def sources(ours: bool) -> str:
    """Check sum of the sources that a row depends on: our code, or for other contenders what prepares them."""
    total = hashlib.sha256()
    paths = (path for pattern in (_OURS if ours else _PEERS) for path in ROOT.glob(pattern))
    for path in sorted(paths):
        total.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return total.hexdigest()[:12]


def digest(value: Mapping[str, Any]) -> str:
    """Check sum of JSON-able values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def finite(value: Any) -> Any:
    """The value with infinities and NaN as text: JSON has no numbers for them."""
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return str(value)
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found = json.loads(line)
        except ValueError:  # half a line: its step is done again
            continue
        if isinstance(found, dict) and "environment" in found:
            yield found
