"""What the benchmarks share: inputs, statistics, a description of the machine, and files of results."""

from __future__ import annotations

import json
import re
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from harmoq_ao.common.allocator import keep_memory
from harmoq_ao.recipes import store

_FOLDERS = re.compile(r"(?<![\w./])/(?:[^\s/'\"]+/)+")


def random_image(size: int | tuple[int, int], seed: int) -> torch.Tensor:
    """`[1, 3, height, width]`, uniform in 0..1, the same for the same seed; one number is the side of a square."""
    height, width = (size, size) if isinstance(size, int) else size
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 in milliseconds, not rounded, of at least two values."""
    cuts = statistics.quantiles(seconds, n=5)
    values = {"p20_ms": cuts[0], "p50_ms": statistics.median(seconds), "p80_ms": cuts[-1]}
    return {name: 1000 * value for name, value in values.items()}


def paired_ratio(base: Sequence[float], other: Sequence[float]) -> float:
    """Median over rounds of how many times faster the other one was than the base in the same round.

    Raises:
        ValueError: Not as many rounds of one as of the other.
    """
    return statistics.median(b / o for b, o in zip(base, other, strict=True))


def environment(packages: Iterable[str] = ()) -> dict[str, Any]:
    """Machine, versions, command, and whether freed memory is kept: asking keeps it, for every contender alike."""
    versions = {name: version_of(name) for name in packages}
    command = shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    return {**store.environment("cpu"), **versions, "keeps_memory": keep_memory(), "command": _FOLDERS.sub("", command)}


def read_results(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Environment and rows of a file of results; both are empty where there is no such file yet."""
    lines = path.read_text().splitlines() if path.exists() else ["{}"]
    environment, *rows = map(json.loads, lines)
    return environment, rows


def write_results(path: Path, environment: dict[str, Any], rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines, whole or not at all: the environment, then a line for each measurement."""
    store.write_text(path, "".join(json.dumps(line) + "\n" for line in (environment, *rows)))


def version_of(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def one_line(error: Exception) -> str:
    """Type and first line of an error, without the folders of this machine, for a table of results."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {_FOLDERS.sub('', text)}"[:300]
